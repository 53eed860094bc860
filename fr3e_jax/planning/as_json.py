"""A plan as one JSON object."""

import dataclasses
from typing import Any

from fr3e_jax.planning.fit import RESERVE, Plan, memory_parts, suggestions
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.slices import GIB
from fr3e_jax.planning.topology import mesh_warnings


def gib(size: float) -> float:
    """Bytes as GiB, rounded to two places."""
    return round(size / GIB, 2) + 0.0  # no -0.0


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one object. Sizes are GiB of a chip; FLOPs, bytes and seconds are those of a step."""
    config, seconds = plan.setup.config, plan.step_seconds
    return {
        "config": plan.name,
        "model": config.model.path,
        "topology": plan.slice.name,
        "jax_topology": plan.slice.topology,
        "chips": plan.slice.chips,
        "mesh": dict(plan.setup.mesh.shape),
        "update_mesh": dict(plan.setup.update.mesh.shape),
        "estimated": plan.estimated,
        "fits": plan.fits,
        "short_gib": gib(max(plan.missing, 0.0)),
        "available_gib": gib(plan.available),
        "installed_gib": gib(plan.slice.chip.installed),
        "reserve_gib": gib(RESERVE),
        "largest": {"phase": plan.largest.phase, "program": plan.largest.program.name},
        "try": [] if plan.fits else suggestions(plan),
        "smallest_slice": plan.alternative,
        "warnings": mesh_warnings(plan.slice, plan.setup.mesh),
        "programs": [
            {
                "phase": stage.phase,
                "program": stage.program.name,
                "total_gib": gib(stage.total),
                "gib": {name: gib(size) for name, size in memory_parts(stage).items()},
                "arguments_gib": gib(stage.program.arguments),
                "flops": stage.program.once.flops + stage.program.each.flops,
                "bytes": stage.program.once.bytes + stage.program.each.bytes,
                "collectives": collectives_as_json(stage.program.once + stage.program.each),
                "compile_seconds": round(stage.program.seconds, 1),
                "refused": stage.program.refusal,
                "estimated": stage.program.estimated,
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
                "collectives": collectives_as_json(phase.costs),
            }
            for phase in plan.phases
        ],
        "step_seconds": seconds,
        "tokens_generated": plan.work.tokens,
        "tokens_per_second": None if seconds is None else plan.work.tokens / seconds,
        "rounds": plan.work.rounds,
        "queries": plan.setup.queries,
        "occupancy": plan.work.occupancy,
        "price_per_chip_hour": plan.price,
        "cost_per_1000_steps": plan.cost,
        "assumptions": dataclasses.asdict(plan.assumptions)
        | {
            "peak_flops": plan.slice.chip.flops,
            "memory_bytes_per_second": plan.slice.chip.memory,
            "link_bytes_per_second": plan.slice.chip.link,
        },
    }


def collectives_as_json(costs: Costs) -> list[dict[str, Any]]:
    """The collectives of some costs, with the bytes that a chip receives."""
    return [
        {"kind": kind, "axes": list(axes), "bytes": size} for (kind, axes), size in sorted(costs.wire.items())
    ]
