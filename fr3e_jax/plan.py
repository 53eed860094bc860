"""Whether a run fits a slice of TPUs, and how long its steps take: `python -m fr3e_jax.plan --config
configs/slices/qwen2.5_7b_v5e16.yaml --topology v5e-16`.

Every program of a step is compiled for the slice, on any Linux machine with libtpu (`pip install
'fr3e_jax[tpu]'`) and without a TPU, in minutes. The exit code is 0 where the run fits, 1 where it does not, 2
for a mistake in the settings, 3 where the compiler fails for another reason than memory.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator, Sequence

import jax
from rich.console import Console

from fr3e_jax.cli import fail, one_line, parse
from fr3e_jax.config import Config, ConfigError, check, check_options, resolve
from fr3e_jax.config.values import Name, NonNegativeNumber
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.models.hf import CheckpointError, read_config
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import PlacementError, row_parts
from fr3e_jax.planning.programs import Setup, Stage, compile_step
from fr3e_jax.planning.report import MARKDOWN, Plan, Rates, as_json, markdown_row, phases_of, show
from fr3e_jax.planning.topology import find_slice, run_mesh
from fr3e_jax.planning.workload import Assumptions, work_of
from fr3e_jax.pretrained.hub import local_model

PLANS = {
    "qwen2.5_0.5b_v5e1": "v5e-1",
    "qwen2.5_0.5b_v5e8": "v5e-8",
    "qwen2.5_1.5b_v5e8": "v5e-8",
    "qwen2.5_7b_v5e16": "v5e-16",
    "qwen2.5_7b_v5p16": "v5p-16",
    "qwen2.5_math_7b_v5e16": "v5e-16",
    "qwen2.5_math_7b_v5p16": "v5p-16",
    "qwen2.5_7b_16k_v5p16": "v5p-16",
    "qwen2.5_14b_v6e16": "v6e-16",
    "qwen2.5_32b_v5p128": "v5p-128",
    "qwen2.5_32b_v5e256": "v5e-256",
    "qwen2.5_72b_v5p256": "v5p-256",
}
"""The shipped configurations that are planned -> the slice that each is for."""


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """Compile a step's programs for a slice of TPUs, without one, and tell what they need. The options of
    training are taken too.
    """

    topology: Name | None = None
    """The slice as it is rented, such as v5litepod-16, v5e-16, v5p-128, v6e-256, v4-64, or as jax has it,
    such as v5p:2x2x1."""
    json: bool = False
    """Print one object instead of tables."""
    markdown: bool = False
    """Print rows of the table in fr3e_jax/planning/README.md instead."""
    all: bool = False
    """Plan all shipped configurations, each for its slice: an hour or more."""
    price_per_chip_hour: NonNegativeNumber | None = None
    """In any currency; a cost of 1,000 steps is told in it."""
    assume: Assumptions = dataclasses.field(default_factory=Assumptions)
    """What cannot be known before."""


def model_of(name: str) -> DecoderConfig:
    """The shape of a model, without looking anything up elsewhere.

    Args:
      name: as `model.path`.

    Raises:
      ConfigError: it is neither a directory nor a model whose shape is known.
      CheckpointError: its config.json is not one of a supported model.
    """
    repository = name.partition("@")[0]
    for preset in PRESETS.values():
        if repository in preset.checkpoints:
            return preset.config
    if (directory := local_model(name)) is not None:
        return read_config(directory)
    known = [preset.checkpoints[0] for preset in PRESETS.values()]
    raise ConfigError(
        f"model.path {name!r} is no directory, and its shape is not known here; known are "
        f"{', '.join(known)} and their variants"
    )


def make_plan(
    config: Config,
    name: str,
    topology: str,
    told: Assumptions,
    price: float | None = None,
    quiet: bool = False,
) -> Plan:
    """Compile a run's programs for a slice.

    Args:
      config: as given, not resolved.
      name: of the configuration, for the report.
      quiet: do not tell on stderr what is being compiled.

    Raises:
      ConfigError, PlacementError, CheckpointError: what cannot run.
    """
    config = resolve(config)
    at = find_slice(topology)
    model = model_of(config.model.path)
    mesh = run_mesh(at, config.mesh)
    setup = Setup(config, model, mesh)
    check(config, row_parts(mesh), model.context)
    _ = setup.placements  # refuses a model that does not divide by the mesh
    work = work_of(config, setup.parts, told)
    console, stages = Console(stderr=True, quiet=quiet), list[Stage]()
    with warnings.catch_warnings(), console.status("compiling") as status:
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        for stage in compile_step(setup, work, lambda program: status.update(f"compiling {program}")):
            stages.append(stage)
    phases = phases_of(setup, work, stages, Rates(at, mesh, told))
    return Plan(name, setup, at, work, told, stages, phases, price)


def arguments(argv: Sequence[str]) -> list[str]:
    """Flags with dashes in them as they are declared."""
    return [
        part.partition("=")[0].replace("-", "_").replace("__", "--", 1) + "".join(part.partition("=")[1:])
        if part.startswith("--")
        else part
        for part in argv
    ]


def plans(given: PlanConfig, name: str) -> Iterator[Plan]:
    """Those that are asked for, one after the other."""
    check_options(given)
    if not given.all:
        if given.topology is None:
            raise ConfigError("--topology says for which slice: v5e-16, v5p-128, ...")
        config = Config(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Config)})
        yield make_plan(config, name, given.topology, given.assume, given.price_per_chip_hour)
        return
    for shipped, topology in PLANS.items():
        config, _ = parse(Config, "plan", f"configs/slices/{shipped}.yaml", [], lambda _: None)
        yield make_plan(config, shipped, topology, given.assume, given.price_per_chip_hour)


def main() -> None:
    """Parse the command line, compile, report; a user's mistake is one line and exit code 2."""
    applied: list[str] = []
    default, argv = "configs/quickstart.yaml", arguments(sys.argv[1:])
    given, name = parse(PlanConfig, "plan", default, argv, applied.append)
    fit, table = True, list(MARKDOWN)
    with one_line("plan", (ConfigError, PlacementError, CheckpointError)):
        try:
            for plan in plans(given, name):
                fit &= plan.fits
                while applied:
                    print(applied.pop(), file=sys.stderr)
                if given.json:
                    print(json.dumps(as_json(plan)), flush=True)
                elif given.markdown:
                    print("\n".join([*table, markdown_row(plan)]), flush=True)
                    table.clear()
                else:
                    show(plan, Console(width=None if sys.stdout.isatty() else 160))
        except jax.errors.JaxRuntimeError as error:
            fail("plan", f"the compiler failed: {error}", 3)
    raise SystemExit(0 if fit else 1)


if __name__ == "__main__":
    main()
