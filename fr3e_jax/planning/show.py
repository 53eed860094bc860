"""A plan for people: tables of memory and time, and whether the run fits."""

from rich.console import Console
from rich.table import Table

from fr3e_jax.parallel.mesh import describe_mesh
from fr3e_jax.planning.as_json import gib
from fr3e_jax.planning.fit import MEMORY_GROUPS, RESERVE, Plan, memory_parts, suggestions
from fr3e_jax.planning.slices import GIB
from fr3e_jax.planning.topology import mesh_warnings

ESTIMATED = (
    "estimated by arithmetic (--quick), nothing was compiled: parameters, moments, copies and KV caches are "
    "exact; of temporaries only logits, activations, gathered weights and caches of a few sequences count. "
    "Left out are XLA's own buffers, padding and code. Compiled plans of shipped configurations need 0.99 to "
    "1.24 times as much memory, and their steps take 0.95 to 1.03 times as long"
)


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan."""
    mesh = describe_mesh(plan.setup.mesh)
    if plan.setup.update.mesh != plan.setup.mesh:
        mesh += f", in updates {describe_mesh(plan.setup.update.mesh)}"
    console.print(
        f"{plan.name}: {plan.setup.config.model.path} on {plan.slice.name} ({plan.slice.chips} chip(s), "
        f"{'x'.join(map(str, plan.slice.shape))}), mesh {mesh}"
    )
    if plan.estimated:
        console.print(ESTIMATED)
    for warning in mesh_warnings(plan.slice, plan.setup.mesh):
        console.print(f"warning: {warning}")
    console.print(memory_table(plan))
    if plan.phases:
        console.print(time_table(plan))
    for line in conclusion(plan):
        console.print(line)


def memory_table(plan: Plan) -> Table:
    """The memory of a chip in GiB, program by program."""
    columns = [*MEMORY_GROUPS, "temporaries", "other"]
    table = Table(title=f"memory of a chip, GiB of {gib(plan.available)} (results count as other)")
    for name in ("phase", "program", *columns, "total"):
        table.add_column(name, justify="left" if name in ("phase", "program") else "right")
    for stage in plan.stages:
        sizes = memory_parts(stage)
        refused, estimated = bool(stage.program.refusal), stage.program.estimated and not plan.estimated
        mark = " refused by XLA" if refused else " (estimated)" if estimated else ""
        style = "red" if stage.total > plan.available or refused else None
        cells = [f"{sizes[name] / GIB:.2f}" for name in columns]
        table.add_row(stage.phase, stage.program.name + mark, *cells, f"{stage.total / GIB:.2f}", style=style)
    return table


def time_table(plan: Plan) -> Table:
    """The time of a step, phase by phase."""
    table = Table(title=f"a step of {plan.work.rounds:.3g} round(s), one chip")
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


def conclusion(plan: Plan) -> list[str]:
    """The last lines of the report: time, cost, assumptions, and whether the run fits."""
    lines = list[str]()
    if (seconds := plan.step_seconds) is not None:
        rate = plan.work.tokens / seconds
        lines.append(
            f"a step: {seconds:,.0f} s, {plan.work.tokens:,} tokens generated, {rate:,.0f} tokens/s, "
            f"{plan.work.occupancy:.0%} of the decoded rows busy"
        )
    if plan.cost is not None:
        lines.append(f"1,000 steps at {plan.price:g} per chip-hour: {plan.cost:,.0f}")
    if plan.auto_queries:
        lines.append(
            f"rollout.queries auto: rounds of {plan.setup.queries} queries fill the batch if states are "
            "accepted as assumed; where fewer are, rounds have up to rollout.max_queries "
            f"{plan.setup.config.rollout.max_queries}, as far as their KV caches fit"
        )
    if plan.work.first_return is None and (decode := plan.work.explore) is not None:
        left, branches = int((decode.left > 0).sum()), int((decode.lengths > 0).sum())
        lines.append(
            f"rollout.wait_for {plan.setup.config.rollout.wait_for:g}: a step decodes {branches:,} branches, "
            f"those that the step before has left included, and leaves {left:,}; {decode.trajectories} of "
            f"{decode.room.n} trajectories of a part have branches"
        )
    lines.append(assumptions_line(plan))
    where = f"{plan.largest.phase}: {plan.largest.program.name}"
    by = ", by the estimate" if plan.estimated else ""
    if plan.fits:
        lines.append(f"fits{by}: {gib(-plan.missing)} GiB of a chip are left ({where})")
        lines.append(
            "so it does if all answers go to the limit: KV caches are allocated before a decoding, and "
            "branches wait for pages where they need more"
        )
        return lines
    sizes = memory_parts(plan.largest)
    most = sorted(sizes, key=lambda name: -sizes[name])[:3]
    largest = ", ".join(f"{name} {gib(sizes[name])}" for name in most)
    other = "no known slice is large enough for these settings"
    if plan.alternative is not None:
        other = f"the smallest slice that it fits is {plan.alternative}"
    return [
        *lines,
        f"does not fit{by}, short by {gib(plan.missing)} GiB ({where}); the largest are {largest}; try "
        f"{' or '.join(suggestions(plan))}",
        f"by an estimate without compiling, {other}",
    ]


def assumptions_line(plan: Plan) -> str:
    """The assumptions behind the numbers, in one line."""
    assumptions, chip = plan.assumptions, plan.slice.chip
    return (
        f"assumed (--assume): answers of {assumptions.response:.0%} of the limit and queries of "
        f"{assumptions.prompt:.0%} of theirs on average, {assumptions.kept:g} trajectories kept of a query, "
        f"{assumptions.accepted:.0%} of states accepted; {assumptions.compute:.0%} of "
        f"{chip.flops / 1e12:.0f} TFLOP/s, {assumptions.memory:.0%} of {chip.memory / 1e12:.2f} TB/s, "
        f"{assumptions.network:.0%} of {chip.link / 1e9:.0f} GB/s a link and way, "
        f"{assumptions.latency * 1e6:g} us a collective at least; verifying and data are left out. Of "
        f"{chip.installed / GIB:.0f} GiB XLA uses {chip.usable / GIB:.2f}, and {RESERVE / GIB:g} are kept "
        "free"
    )


MARKDOWN_HEAD = (
    "| config | slice | mesh | memory of a chip, GiB | | step | tokens/s | phases |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def markdown_row(plan: Plan) -> str:
    """A row of the table in planning/README.md."""
    seconds = plan.step_seconds
    meshes = [
        " x ".join(map(str, mesh.shape.values()))
        for mesh in dict.fromkeys((plan.setup.mesh, plan.setup.update.mesh))
    ]
    phases = [
        f"{phase.name} {phase.seconds.total:,.0f} s ({phase.seconds.bound})"
        for phase in plan.phases
        if phase.name != "reshard"
    ]
    cells = [
        f"`{plan.name}`",
        plan.slice.name,
        ", update ".join(meshes),
        f"{plan.largest.total / GIB:.1f} of {plan.available / GIB:.1f} ({plan.largest.phase})",
        "fits" if plan.fits else f"short by {plan.missing / GIB:.1f}",
        "" if seconds is None else f"{seconds:,.0f} s",
        "" if seconds is None else f"{plan.work.tokens / seconds:,.0f}",
        ", ".join(phases),
    ]
    return f"| {' | '.join(cells)} |"
