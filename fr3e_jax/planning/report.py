"""What a plan says: memory against the chip's, the time of a step, and whether it fits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from fr3e_jax.planning.programs import Compiled, Costs, Setup, Stage, cache_bytes
from fr3e_jax.planning.topology import GIB, Slice, lane_of, warnings_of
from fr3e_jax.planning.workload import Assumptions, Decode, Leg, Work, work_of

RESERVE = GIB // 4
"""Bytes of what XLA may use that a plan leaves free, for small arrays and what else the runtime holds."""

COPIES = ("sampling copy", "compute copy", "reference copy", "reference")
CACHES = ("shared caches", "branch caches", "queries' caches", "trunk caches")
GROUPS: Mapping[str, Sequence[str]] = {
    "parameters": ("parameters",),
    "optimizer": ("optimizer",),
    "copies": COPIES,
    "gradient": ("gradient",),
    "caches": CACHES,
}


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one chip. compute, memory, network: of each alone; total: of all, partly at the same time."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    total: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )

    @property
    def bound(self) -> str:
        """Which of the three is longest."""
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a slice is assumed to reach."""

    at: Slice
    mesh: Mesh
    told: Assumptions

    def seconds(self, costs: Costs) -> Seconds:
        """Of a program.

        Products and memory traffic overlap, and so do collectives over data and fsdp, which can be started
        early; those over tensor are waited for.
        """
        chip, told = self.at.chip, self.told
        compute = costs.flops / (told.compute * chip.flops)
        memory = costs.bytes / (told.memory * chip.memory)
        early = late = 0.0
        for (_, axes), received in costs.wire.items():
            lane = lane_of(self.at, self.mesh, axes)
            taken = received / (told.network * lane.bandwidth(chip.link))
            early, late = (early, late + taken) if "tensor" in axes else (early + taken, late)
        if any("tensor" in axes for _, axes in costs.wire):
            late += costs.calls * told.latency
        else:
            early += costs.calls * told.latency
        return Seconds(compute, memory, early + late, max(compute, memory, early) + late)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a step, all its rounds. costs: of one chip."""

    name: str
    costs: Costs
    seconds: Seconds


def scaled(costs: Costs, ratio: float, fixed: float) -> Costs:
    """Of a program of the same kind on `ratio` times the tokens.

    Args:
      fixed: bytes that it reads or writes whatever the tokens are: weights and their gradient.
    """
    fixed = min(fixed, costs.bytes)
    wire = {key: size * (ratio if key[1] == ("tensor",) else 1.0) for key, size in costs.wire.items()}
    return Costs(costs.flops * ratio, fixed + (costs.bytes - fixed) * ratio, wire, costs.calls)


def leg_costs(setup: Setup, leg: Leg, compiled: Compiled, as_compiled: Leg) -> Costs:
    """Of a call of the decoding program, from one that is compiled."""
    rows = leg.rows / as_compiled.rows
    read = cache_bytes(setup, leg) - cache_bytes(setup, as_compiled)
    each = compiled.each
    each = dataclasses.replace(
        each,
        flops=each.flops * rows,
        bytes=max(each.bytes + read, 0.0),
        wire={key: size * rows for key, size in each.wire.items()},
    )
    total = each.times(leg.steps)
    return total + compiled.once if leg.moves and as_compiled.moves else total


def phases_of(setup: Setup, work: Work, stages: Sequence[Stage], rates: Rates) -> list[Phase]:
    """The phases of a step, those whose programs are all known."""
    programs = {(stage.phase, stage.program.name): stage.program for stage in stages}
    if any(program.short for program in programs.values()):
        return []

    def phase(name: str, runs: Sequence[tuple[float, Costs]]) -> Phase:
        total, seconds = Costs(), Seconds()
        for times, costs in runs:
            total = total + costs.times(times)
            one = rates.seconds(costs)
            seconds = seconds + Seconds(*(times * x for x in dataclasses.astuple(one)))
        return Phase(name, total, seconds)

    def decoding(plan: Decode, compiled: Sequence[tuple[Compiled, Leg]]) -> list[tuple[float, Costs]]:
        found = []
        for leg in plan.legs:
            # The one whose rows are nearest.
            program, like = min(compiled, key=lambda x: (abs(x[1].rows - leg.rows), x[1].slots < leg.slots))
            found.append((float(work.rounds), leg_costs(setup, leg, program, like)))
        return found

    first = work.first_return
    found = [
        phase("reshard", [(1.0, programs["reshard", "cast"].once)]),
        phase(
            "first return",
            [
                (float(work.rounds), programs["first return", "prefill"].once),
                *decoding(first, [(programs["first return", "decode"], first.largest)]),
            ],
        ),
    ]
    if work.explore is not None:
        compiled = [
            (stage.program, stage.leg)
            for stage in stages
            if stage.phase == "explore" and stage.leg is not None
        ]
        found.append(
            phase(
                "explore",
                [
                    (float(work.rounds), programs["explore", "open states"].once),
                    *decoding(work.explore, compiled),
                ],
            )
        )
    found.append(phase("update", update_runs(setup, work, stages)))
    return found


def update_runs(setup: Setup, work: Work, stages: Sequence[Stage]) -> list[tuple[float, Costs]]:
    """How often each program of the update runs, and what it costs."""
    programs = {stage.program.name: stage for stage in stages if stage.phase == "update"}
    optimizer = setup.config.optimizer
    updates = float(optimizer.minibatches * optimizer.epochs)
    chunk = next(stage for stage in stages if stage.chunk is not None)
    like = chunk.chunk
    assert like is not None
    weights, gradient = chunk.own["compute copy"], chunk.own["gradient"]
    # Weights are read forward, backward and once more where layers are recomputed; the gradient is added to.
    split = setup.mesh.shape["fsdp"]
    fixed = 3.0 * weights * split + 2.0 * gradient
    found = [(updates, programs["begin"].program.once), (updates, programs["apply"].program.once)]
    for shape, times in work.chunks.items():
        found.append((float(times), scaled(chunk.program.once, shape.tokens / like.tokens, fixed)))
    for (count, width), times in work.trunks.items():
        ratio = count * width / (work.widest_trunks[0] * work.widest_trunks[1])
        found.append(
            (float(times), scaled(programs["open trunks"].program.once, ratio, float(weights * split)))
        )
        found.append((float(times), scaled(programs["close trunks"].program.once, ratio, fixed)))
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a run on a slice. `phases` is empty where a program is too large for the chip."""

    name: str
    setup: Setup
    at: Slice
    work: Work
    told: Assumptions
    stages: Sequence[Stage]
    phases: Sequence[Phase]
    price: float | None

    @property
    def available(self) -> float:
        """Bytes on a chip that a run may take."""
        return self.at.chip.usable - RESERVE

    @property
    def largest(self) -> Stage:
        """What needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def short(self) -> float:
        """Bytes on a chip that are missing; not above 0 where it fits."""
        over = self.largest.total - self.available
        # XLA may find a program too large that would fit by its own size.
        refused = any(stage.program.short for stage in self.stages)
        return max(over, 1.0) if refused else over

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.short <= 0

    @property
    def step_seconds(self) -> float | None:
        """Of a step, None where it is not known."""
        return sum(phase.seconds.total for phase in self.phases) if self.phases else None

    @property
    def tokens(self) -> int:
        """That are generated in a step."""
        explored = self.work.explore.tokens if self.work.explore is not None else 0
        return self.work.rounds * (self.work.first_return.tokens + explored)

    @property
    def occupancy(self) -> float:
        """Tokens generated for each row that is decoded."""
        plans = [x for x in (self.work.first_return, self.work.explore) if x is not None]
        return sum(x.tokens for x in plans) / sum(x.row_steps for x in plans)

    @property
    def cost(self) -> float | None:
        """Of 1,000 steps, in the unit of the price."""
        if self.price is None or self.step_seconds is None:
            return None
        return self.price * self.at.chips * self.step_seconds / 3.6

    @property
    def longest_answers(self) -> float:
        """About how many bytes more exploration needs if every restart is from the root and goes to the
        limit.
        """
        if self.work.explore is None:
            return 0.0
        told = work_of(self.setup.config, self.setup.parts, self.told, worst=True)
        assert told.explore is not None
        ours, worst = self.work.explore.largest, told.explore.largest
        slot = cache_bytes(self.setup, dataclasses.replace(ours, rows=1, slots=1))
        return float(slot * max(worst.cache - ours.cache, 0))

    def longest_short(self) -> float:
        """Bytes that are missing then."""
        explore = [stage.total for stage in self.stages if stage.phase == "explore"]
        return max(explore, default=0) + self.longest_answers - self.available


def parts_of(stage: Stage) -> dict[str, float]:
    """Bytes of a stage by what they are for; together its total."""
    every = {**stage.held, **{k: stage.own[k] + stage.held.get(k, 0) for k in stage.own}}
    found = {group: float(sum(every.get(name, 0) for name in members)) for group, members in GROUPS.items()}
    found["temporaries"] = float(stage.program.temporary)
    found["other"] = stage.total - sum(found.values())
    return found


def suggestions(plan: Plan) -> list[str]:
    """What to try, the most promising first."""
    config, stage = plan.setup.config, plan.largest
    sizes, mesh, found = parts_of(stage), plan.setup.mesh.shape, list[str]()
    parts = plan.setup.parts
    order = sorted(sizes, key=lambda name: -sizes[name])
    for name in order[:4]:
        if name == "caches" or (
            name in ("temporaries", "other") and stage.phase in ("first return", "explore")
        ):
            if config.rollout.queries > parts:
                found.append(f"--rollout.queries {max(config.rollout.queries // 2 // parts, 1) * parts}")
            elif config.explore.rollouts > 4 and stage.phase == "explore":
                found.append(f"--explore.rollouts {config.explore.rollouts // 2}")
            if parts > 1 and config.rollout.queries <= parts:
                found.append("a larger --mesh.tensor with a smaller --mesh.fsdp")
        elif name in ("temporaries", "other") and stage.phase == "update":
            found.append(f"--optimizer.micro_tokens {config.optimizer.micro_tokens // 2}")
        elif name == "optimizer" and config.optimizer.moments == "float32":
            found.append("--optimizer.moments bfloat16")
        elif name in ("parameters", "gradient", "optimizer") and mesh["data"] > 1:
            found.append(f"--mesh.fsdp {mesh['data'] * mesh['fsdp']} --mesh.data 1")
        elif name == "copies" and stage.phase in ("first return", "explore", "reshard"):
            found.append("a larger --mesh.tensor, which is what the copy for sampling is split over")
    return [*dict.fromkeys(found), "a larger slice"]


def gib(size: float) -> float:
    """Bytes in GiB, for people."""
    return round(size / GIB, 2) + 0.0  # no -0.0


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one object. Sizes are GiB of a chip, FLOPs, bytes and seconds those of a step."""
    config, seconds = plan.setup.config, plan.step_seconds
    return {
        "config": plan.name,
        "model": config.model.path,
        "topology": plan.at.name,
        "jax_topology": plan.at.topology,
        "chips": plan.at.chips,
        "mesh": dict(plan.setup.mesh.shape),
        "fits": plan.fits,
        "short_gib": gib(max(plan.short, 0.0)),
        "longest_answers_short_gib": gib(max(plan.longest_short(), 0.0)),
        "available_gib": gib(plan.available),
        "installed_gib": gib(plan.at.chip.installed),
        "reserve_gib": gib(RESERVE),
        "largest": {"phase": plan.largest.phase, "program": plan.largest.program.name},
        "try": [] if plan.fits else suggestions(plan),
        "warnings": warnings_of(plan.at, plan.setup.mesh),
        "programs": [
            {
                "phase": stage.phase,
                "program": stage.program.name,
                "total_gib": gib(stage.total),
                "gib": {name: gib(size) for name, size in parts_of(stage).items()},
                "arguments_gib": gib(stage.program.arguments),
                "flops": stage.program.once.flops + stage.program.each.flops,
                "bytes": stage.program.once.bytes + stage.program.each.bytes,
                "collectives": wires(stage.program.once + stage.program.each),
                "compile_seconds": round(stage.program.seconds, 1),
                "refused": stage.program.short,
            }
            for stage in plan.stages
        ],
        "phases": [
            {
                "phase": phase.name,
                "seconds": phase.seconds.total,
                "bound": phase.seconds.bound,
                "compute_seconds": phase.seconds.compute,
                "memory_seconds": phase.seconds.memory,
                "network_seconds": phase.seconds.network,
                "flops": phase.costs.flops,
                "bytes": phase.costs.bytes,
                "collectives": wires(phase.costs),
            }
            for phase in plan.phases
        ],
        "step_seconds": seconds,
        "tokens_generated": plan.tokens,
        "tokens_per_second": None if seconds is None else plan.tokens / seconds,
        "rounds": plan.work.rounds,
        "occupancy": plan.occupancy,
        "price_per_chip_hour": plan.price,
        "cost_per_1000_steps": plan.cost,
        "assumptions": dataclasses.asdict(plan.told)
        | {
            "peak_flops": plan.at.chip.flops,
            "memory_bytes_per_second": plan.at.chip.memory,
            "link_bytes_per_second": plan.at.chip.link,
        },
    }


def wires(costs: Costs) -> list[dict[str, Any]]:
    """Collectives, with the bytes that a chip receives."""
    return [
        {"kind": kind, "axes": list(axes), "bytes": size} for (kind, axes), size in sorted(costs.wire.items())
    ]


def show(plan: Plan, console: Console) -> None:
    """The plan for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.setup.mesh.shape.items())
    console.print(
        f"{plan.name}: {plan.setup.config.model.path} on {plan.at.name} ({plan.at.chips} chip(s), "
        f"{'x'.join(map(str, plan.at.shape))}), mesh {mesh}"
    )
    for warning in warnings_of(plan.at, plan.setup.mesh):
        console.print(f"warning: {warning}")
    console.print(memory_table(plan))
    if plan.phases:
        console.print(time_table(plan))
    for line in verdict(plan):
        console.print(line)


def memory_table(plan: Plan) -> Table:
    """GiB of a chip, program by program."""
    columns = [*GROUPS, "temporaries", "other"]
    table = Table(title=f"memory of a chip, GiB of {gib(plan.available)} (results count as other)")
    for name in ("phase", "program", *columns, "total"):
        table.add_column(name, justify="left" if name in ("phase", "program") else "right")
    for stage in plan.stages:
        sizes = parts_of(stage)
        mark = " refused by XLA" if stage.program.short else ""
        style = "red" if stage.total > plan.available or mark else None
        cells = [f"{sizes[name] / GIB:.2f}" for name in columns]
        table.add_row(stage.phase, stage.program.name + mark, *cells, f"{stage.total / GIB:.2f}", style=style)
    return table


def time_table(plan: Plan) -> Table:
    """A step, phase by phase."""
    table = Table(title=f"a step of {plan.work.rounds} round(s), one chip")
    for name in ("phase", "TFLOP", "GB memory", "GB received", "collectives", "bound", "seconds"):
        table.add_column(name, justify="left" if name in ("phase", "collectives", "bound") else "right")
    for phase in plan.phases:
        wire = phase.costs.wire
        kinds = ", ".join(
            f"{kind} over {'+'.join(axes)} {size / 1e9:,.1f}"
            for (kind, axes), size in sorted(wire.items())
            if size > 5e7
        )
        table.add_row(
            phase.name,
            f"{phase.costs.flops / 1e12:,.1f}",
            f"{phase.costs.bytes / 1e9:,.0f}",
            f"{sum(wire.values()) / 1e9:,.1f}",
            kinds,
            phase.seconds.bound,
            f"{phase.seconds.total:,.1f}",
        )
    return table


def verdict(plan: Plan) -> list[str]:
    """The end of the report: time, money, assumptions, and whether it fits."""
    found = list[str]()
    if (seconds := plan.step_seconds) is not None:
        rate = plan.tokens / seconds
        found.append(
            f"a step: {seconds:,.0f} s, {plan.tokens:,} tokens generated, {rate:,.0f} tokens/s, "
            f"{plan.occupancy:.0%} of the decoded rows busy"
        )
    if plan.cost is not None:
        found.append(f"1,000 steps at {plan.price:g} per chip-hour: {plan.cost:,.0f}")
    found.append(assumed(plan))
    where = f"{plan.largest.phase}: {plan.largest.program.name}"
    if plan.fits:
        found.append(f"fits: {gib(-plan.short)} GiB of a chip are left ({where})")
        if (missing := plan.longest_short()) > 0:
            found.append(
                "but if every restart of a round were from the root and went to the limit, exploration would "
                f"be short by about {gib(missing)} GiB; then --rollout.queries or --explore.rollouts have to "
                "be smaller, or the slice larger"
            )
        return found
    sizes = parts_of(plan.largest)
    most = sorted(sizes, key=lambda name: -sizes[name])[:3]
    largest = ", ".join(f"{name} {gib(sizes[name])}" for name in most)
    return [
        *found,
        f"does not fit, short by {gib(plan.short)} GiB ({where}); the largest are {largest}; try "
        f"{' or '.join(suggestions(plan))}",
    ]


def assumed(plan: Plan) -> str:
    """What the numbers rest on."""
    told, chip = plan.told, plan.at.chip
    return (
        f"assumed (--assume): answers of {told.response:.0%} of the limit and queries of {told.prompt:.0%} "
        f"of theirs on average, {told.kept:g} trajectories kept of a query, {told.accepted:.0%} of states "
        f"accepted; {told.compute:.0%} of {chip.flops / 1e12:.0f} TFLOP/s, {told.memory:.0%} of "
        f"{chip.memory / 1e12:.2f} TB/s, {told.network:.0%} of {chip.link / 1e9:.0f} GB/s a link and way, "
        f"{told.latency * 1e6:g} us a collective at least; verifying and data are left out. Of "
        f"{chip.installed / GIB:.0f} GiB XLA uses {chip.usable / GIB:.2f}, and {RESERVE / GIB:g} are kept "
        "free"
    )


MARKDOWN = (
    "| config | slice | mesh | memory of a chip, GiB | | all at the limit | step | tokens/s | phases |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def markdown_row(plan: Plan) -> str:
    """A row of the table on the page of planning."""
    mesh, seconds, missing = plan.setup.mesh.shape.values(), plan.step_seconds, plan.longest_short()
    phases = [
        f"{phase.name} {phase.seconds.total:,.0f} s ({phase.seconds.bound})"
        for phase in plan.phases
        if phase.name != "reshard"
    ]
    cells = [
        f"`{plan.name}`",
        plan.at.name,
        " x ".join(map(str, mesh)),
        f"{plan.largest.total / GIB:.1f} of {plan.available / GIB:.1f} ({plan.largest.phase})",
        "fits" if plan.fits else f"short by {plan.short / GIB:.1f}",
        "fits" if missing <= 0 else f"short by {missing / GIB:.1f}",
        "" if seconds is None else f"{seconds:,.0f} s",
        "" if seconds is None else f"{plan.tokens / seconds:,.0f}",
        ", ".join(phases),
    ]
    return f"| {' | '.join(cells)} |"
