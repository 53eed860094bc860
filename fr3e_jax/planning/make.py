"""Making a plan, from compiled programs or by arithmetic, and looking for a slice that is large enough."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence

from jax.sharding import Mesh
from rich.console import Console

from fr3e_jax.config import Config, ConfigError, MeshConfig, check, resolve
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.parallel.mesh import PlacementError, row_parts
from fr3e_jax.planning.cache_budget import cache_bytes_of, caches_fit
from fr3e_jax.planning.estimate import estimate_step
from fr3e_jax.planning.fit import RESERVE, Plan
from fr3e_jax.planning.programs import compile_step
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.slices import GIB, Slice, find_slice, other_slices
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.times import Rates, phases_of
from fr3e_jax.planning.topology import mesh_sizes, positions_in, run_mesh, splits
from fr3e_jax.planning.update_layout import fastest_fitting, with_update_tensor
from fr3e_jax.planning.workload import Assumptions, Workload, planned_queries
from fr3e_jax.run.queries import round_sizes

MARGIN = 1.25  # programs whose estimate leaves less than this of a chip are compiled to see whether they fit


@dataclasses.dataclass(frozen=True)
class Question:
    """What a plan is asked for.

    name: of the configuration, for the report. config: as given, not resolved. topology: name of the slice.
    price: of a chip-hour.
    """

    name: str
    config: Config
    model: DecoderConfig
    topology: str
    assumptions: Assumptions
    price: float | None = None


def compiled_plan(question: Question, console: Console, peak: bool = False) -> Plan:
    """The plan of a run whose programs are compiled for its slice.

    Args:
      console: where a line is printed for each program when it is compiled.
      peak: compile only the programs that may need most memory, and estimate the others; such a plan has no
        times.

    Raises:
      ConfigError, PlacementError: the run cannot start on the slice; the message says what to change.
    """
    tpu = find_slice(question.topology)
    setup = setup_on(question, run_mesh(tpu, question.config.mesh), tpu)
    work = setup.work(question.assumptions)
    estimates = {key_of(stage): stage for stage in estimate_step(setup, work)} if peak else {}
    wanted = may_be_peak(list(estimates.values()), tpu.chip.usable - RESERVE) if peak else None
    with warnings.catch_warnings(), console.status("compiling") as status:
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")

        def started(phase: str, name: str) -> None:
            status.update(f"compiling {phase}: {name}")

        def finished(stage: Stage, seconds: float) -> None:
            outcome = "is too large for a chip" if stage.program.refusal else f"{stage.total / GIB:.1f} GiB"
            line = f"{stage.phase}: {stage.program.name}, {outcome} (compiled in {seconds:.0f} s)"
            console.print(line, soft_wrap=True, highlight=False)

        compiled = {key_of(stage): stage for stage in compile_step(setup, work, started, finished, wanted)}
    plan = plan_of(question, tpu, setup, work, list((estimates | compiled).values()))
    return plan if plan.fits else dataclasses.replace(plan, alternative=smallest_slice(question, tpu))


def key_of(stage: Stage) -> tuple[str, str]:
    """The names of a stage's phase and program, which no other stage of a step has."""
    return stage.phase, stage.program.name


def may_be_peak(estimates: Sequence[Stage], available: float) -> set[tuple[str, str]]:
    """The programs that may not fit by their estimates, and the one with the largest.

    Args:
      available: bytes on a chip that the run may take.
    """
    largest = max(estimates, key=lambda stage: stage.total)
    close = [stage for stage in estimates if MARGIN * stage.total > available]
    return {key_of(stage) for stage in (largest, *close)}


def quick_plan(question: Question) -> Plan:
    """The plan of a run by arithmetic, in seconds and without libtpu.

    Raises:
      ConfigError, PlacementError: as `compiled_plan`.
    """
    tpu = find_slice(question.topology)
    plan = estimated_plan(question, tpu)
    return plan if plan.fits else dataclasses.replace(plan, alternative=smallest_slice(question, tpu))


def estimated_plan(question: Question, tpu: Slice) -> Plan:
    """The plan of a run on a slice by arithmetic, without alternatives."""
    setup = setup_on(question, run_mesh(tpu, question.config.mesh, positions_in(tpu)), tpu)
    work = setup.work(question.assumptions)
    return plan_of(question, tpu, setup, work, estimate_step(setup, work))


def setup_on(question: Question, mesh: Mesh, tpu: Slice) -> Setup:
    """Set the run up on a mesh of a slice, checked as training checks it.

    It has a number of queries where that is `auto`, and is updated in the layout that training takes.

    Raises:
      ConfigError, PlacementError: the run cannot start on the mesh; the message says what to change.
    """
    config, parts = resolve(question.config), row_parts(mesh)
    check(config, parts, question.model.context)
    setup = Setup(config, question.model, mesh)
    _ = setup.placements  # refuses a model that does not divide by the mesh
    cache_bytes = cache_bytes_of(setup, tpu.chip.usable)
    fits = functools.partial(caches_fit, setup, cache_bytes)
    queries = planned_queries(config, parts, question.assumptions, fits)
    sizes = tuple(size for size in round_sizes(config.rollout, parts) if fits(size)) or (queries,)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, queries=queries))
    setup = dataclasses.replace(setup, config=config, sizes=sizes)
    if config.mesh.update_tensor is None:
        setup = with_update_tensor(setup, fastest_fitting(config, question.model, mesh, tpu))
    return dataclasses.replace(setup, cache_bytes=cache_bytes)


def plan_of(question: Question, tpu: Slice, setup: Setup, work: Workload, stages: list[Stage]) -> Plan:
    """The plan from its stages."""
    mixed = len({stage.program.estimated for stage in stages}) > 1
    rates = Rates(tpu, setup.mesh, question.assumptions)
    phases = [] if mixed else phases_of(setup, work, stages, rates)
    return Plan(
        name=question.name,
        setup=setup,
        slice=tpu,
        work=work,
        assumptions=question.assumptions,
        stages=stages,
        phases=phases,
        price=question.price,
        auto_queries=question.config.rollout.queries == "auto",
    )


def smallest_slice(question: Question, tpu: Slice) -> str | None:
    """The smallest slice that a run fits by an estimate, with its mesh; None if there is none.

    Tried are the larger slices of the same generation, then those of others, each with the run's own mesh
    and with all that have one data part. Of the meshes that fit, the one with the shortest step is named.
    Updates are in the layout of sampling where the run has no other: training takes another if that fits too.
    """
    for other in other_slices(tpu):
        fitting = []
        for mesh in meshes_for(question.config.mesh, other.chips):
            try:
                tensor = mesh.update_tensor or mesh_sizes(mesh, other.chips)[2]
                laid = dataclasses.replace(mesh, update_tensor=tensor)
                config = dataclasses.replace(question.config, mesh=laid)
                plan = estimated_plan(dataclasses.replace(question, config=config), other)
            except (ConfigError, PlacementError):
                continue  # the run cannot start on this mesh
            if plan.fits and plan.step_seconds is not None:
                fitting.append((plan.step_seconds, mesh))
        if fitting:
            _, mesh = min(fitting, key=lambda x: x[0])
            sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if size is not None}
            flags = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items())
            return f"{other.name} with {flags}"
    return None


def meshes_for(given: MeshConfig, chips: int) -> list[MeshConfig]:
    """The meshes that are tried on a slice: the given one, and all with one data part."""
    whole = (dataclasses.replace(given, data=1, fsdp=fsdp, tensor=tensor) for fsdp, tensor in splits(chips))
    return [given, *whole]
