"""Seconds of a step: from the costs of its compiled programs to the time of each phase."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from jax.sharding import Mesh

from fr3e_jax.parallel.mesh import MESH_AXES
from fr3e_jax.planning.compiled import CompiledProgram
from fr3e_jax.planning.decodes import Decode, LegWork
from fr3e_jax.planning.position_programs import SECOND_PASS
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.rollout_programs import prefilled_share, prefilled_trajectories
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.slices import Slice
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.topology import lane_of
from fr3e_jax.planning.update_programs import FORWARD
from fr3e_jax.planning.workload import Assumptions, Workload

Runs = list[tuple[float, Costs]]
"""Programs with their number of runs: (runs, costs of one run)."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time on one chip, seconds.

    compute, memory, network: of FLOPs, memory traffic and collectives, each alone. total: of all three, which
    partly overlap.
    """

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    total: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )

    def times(self, factor: float) -> "Seconds":
        """The time of `factor` runs."""
        return Seconds(*(factor * x for x in dataclasses.astuple(self)))

    @property
    def bound(self) -> str:
        """The name of the longest of compute, memory and network."""
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates that programs are assumed to reach on a slice."""

    slice: Slice
    mesh: Mesh
    assumptions: Assumptions
    joined: Collection[str] = ()
    """Axes of `mesh` that are made of parts of two axes, which are gone through one after the other."""

    def of_updates(self, setup: Setup) -> "Rates":
        """The rates of updates, whose mesh may be another than that of sampling."""
        mesh = setup.update.mesh
        joined = [name for name in MESH_AXES if mesh.shape[name] > self.mesh.shape[name]]
        return dataclasses.replace(self, mesh=mesh, joined=tuple(joined))

    def seconds(self, costs: Costs) -> Seconds:
        """The time of a program.

        Matrix products and memory traffic overlap, and so do collectives over data and fsdp, which can start
        early. Collectives over tensor are waited for.
        """
        chip, assumptions = self.slice.chip, self.assumptions
        compute = costs.flops / (assumptions.compute * chip.flops)
        memory = costs.bytes / (assumptions.memory * chip.memory)
        early = late = 0.0
        for (_, axes), received in costs.wire.items():
            lane = lane_of(self.slice, self.mesh, axes, self.joined)
            taken = received / (assumptions.network * lane.bandwidth(chip.link))
            early, late = (early, late + taken) if "tensor" in axes else (early + taken, late)
        if any("tensor" in axes for _, axes in costs.wire):
            late += costs.calls * assumptions.latency
        else:
            early += costs.calls * assumptions.latency
        return Seconds(compute, memory, early + late, max(compute, memory, early) + late)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a step, all its rounds together. costs: of one chip."""

    name: str
    costs: Costs
    seconds: Seconds


def phases_of(setup: Setup, work: Workload, stages: Sequence[Stage], rates: Rates) -> list[Phase]:
    """The phases of a step; none if a program is too large, since the costs of later ones are not known."""
    programs = {(stage.phase, stage.program.name): stage.program for stage in stages}
    if any(program.refusal for program in programs.values()):
        return []
    rounds, first = float(work.rounds), work.first_return
    stage_by_phase = {stage.phase: stage for stage in stages if stage.leg is not None}
    runs: dict[str, Runs] = {"reshard": [(1.0, programs["reshard", "cast"].once)]}
    if first is not None:
        of_first = decode_costs(setup, first, stage_by_phase["first return"])
        of_first = [programs["first return", "prefill"].once, *of_first]
        runs["first return"] = [(rounds, costs) for costs in of_first]
    for phase in prefilled_trajectories(setup.config.explore, work):
        share = 1.0
        if phase == "explore" and work.explore is not None:
            share = prefilled_share(work.explore)
        runs[phase] = [(rounds * share, programs[phase, "prefill trajectories"].once)]
    if SECOND_PASS in programs:
        runs["positions"].append((rounds, programs[SECOND_PASS].once))
    restarts = {"positions": ("open pilots", work.pilots), "explore": (work.opening, work.explore)}
    for phase, (opening, decoding) in restarts.items():
        if decoding is None:
            continue
        of_phase = [
            programs[phase, opening].once,
            *decode_costs(setup, decoding, stage_by_phase[phase]),
        ]
        runs.setdefault(phase, []).extend((rounds, costs) for costs in of_phase)
    phases = [phase_of(name, of_phase, rates) for name, of_phase in runs.items()]
    update = update_runs(setup.update, work, stages)
    return [*phases, phase_of("update", update, rates.of_updates(setup))]


def phase_of(name: str, runs: Runs, rates: Rates) -> Phase:
    """A phase from the runs of its programs."""
    costs, seconds = Costs(), Seconds()
    for times, one in runs:
        costs, seconds = costs + one.times(times), seconds + rates.seconds(one).times(times)
    return Phase(name, costs, seconds)


def decode_costs(setup: Setup, decode: Decode, stage: Stage) -> list[Costs]:
    """The costs of each leg of a decoding.

    Args:
      stage: of its program.
    """
    assert stage.leg is not None
    span, weights = stage.leg.span, float(stage.own["sampling copy"])
    sizes = decode.room.sizes
    row = float(setup.slot_bytes * sizes.slots)
    return [
        leg_costs(leg, stage.program, leg.span / span, weights)
        + Costs(bytes=2 * leg.copies * row + leg.moved * sizes.rows * row)
        for leg in decode.legs
    ]


def leg_costs(leg: LegWork, program: CompiledProgram, ratio: float, weights: float) -> Costs:
    """The costs of a leg.

    Args:
      program: compiled for spans of another number of blocks.
      ratio: blocks of the leg's spans, to those.
      weights: bytes that a span reads, however many rows it has.
    """
    total = program.once
    for name, costs in program.loops.items():
        each = scaled_costs(costs, ratio, weights) if name == "spans" else costs
        total = total + each.times(leg.times(name))
    return total


def update_runs(setup: Setup, work: Workload, stages: Sequence[Stage]) -> Runs:
    """The programs of the update with their number of runs; shapes that were not compiled are scaled.

    Args:
      setup: on the mesh of updates.
      work, stages: of the step.
    """
    programs = {stage.program.name: stage.program for stage in stages if stage.phase == "update"}
    optimizer = setup.config.optimizer
    updates = float(optimizer.minibatches * optimizer.epochs)
    stage = next(stage for stage in stages if stage.chunk is not None)
    compiled = stage.chunk
    assert compiled is not None
    weights, gradient = stage.own["compute copy"], stage.own["gradient"]
    # Weights are read forward, backward and once more where layers are recomputed; the gradient is added to.
    split = setup.mesh.shape["fsdp"]
    fixed = 3.0 * weights * split + 2.0 * gradient
    runs: Runs = [(updates, programs["cast and zero gradient"].once), (updates, programs["apply"].once)]
    for chunk, times in work.chunks.items():
        ratio = chunk.tokens / compiled.tokens
        runs.append((float(times), scaled_costs(stage.program.once, ratio, fixed)))
    opening, closing = programs["prefill trunks"].once, programs["add trunks"].once
    for (count, width), times in work.trunks.items():
        ratio = count * width / (work.widest_trunks[0] * work.widest_trunks[1])
        runs.append((float(times), scaled_costs(opening, ratio, float(weights * split))))
        runs.append((float(times), scaled_costs(closing, ratio, fixed)))
    if FORWARD in programs:
        runs.extend(forward_runs(setup, work, programs, compiled.tokens, float(weights * split)))
    return runs


def forward_runs(
    setup: Setup, work: Workload, programs: Mapping[str, CompiledProgram], tokens: int, weights: float
) -> Runs:
    """The programs of the forward pass before the update (loss.mismatch), over what one epoch runs.

    Args:
      tokens: of the chunk that its program was compiled for.
      weights: bytes of the weights that a program reads.
    """
    epochs = setup.config.optimizer.epochs
    runs: Runs = [(1.0, programs["cast and zero gradient"].once)]
    for chunk, times in work.chunks.items():
        costs = scaled_costs(programs[FORWARD].once, chunk.tokens / tokens, weights)
        runs.append((times / epochs, costs))
    for (count, width), times in work.trunks.items():
        ratio = count * width / (work.widest_trunks[0] * work.widest_trunks[1])
        runs.append((times / epochs, scaled_costs(programs["prefill trunks"].once, ratio, weights)))
    return runs


def scaled_costs(costs: Costs, ratio: float, fixed: float) -> Costs:
    """The costs of a program on `ratio` times the tokens.

    Args:
      fixed: bytes that it reads or writes for any number of tokens: weights and their gradient.
    """
    fixed = min(fixed, costs.bytes)
    wire = {key: size * (ratio if key[1] == ("tensor",) else 1.0) for key, size in costs.wire.items()}
    return Costs(costs.flops * ratio, fixed + (costs.bytes - fixed) * ratio, wire, costs.calls)
