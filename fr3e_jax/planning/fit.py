"""A plan: whether a run fits a slice, by how much, and what to change if it does not."""

import dataclasses
from collections.abc import Mapping, Sequence

from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.slices import GIB, Slice
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.times import Phase
from fr3e_jax.planning.workload import Assumptions, Workload

RESERVE = GIB // 4
"""Bytes of the memory that XLA may use which a plan leaves free, for small arrays and for the runtime."""

COPIES = ("sampling copy", "compute copy", "reference")
CACHES = ("shared caches", "branch caches", "trunk caches")
MEMORY_GROUPS: Mapping[str, Sequence[str]] = {
    "parameters": ("parameters",),
    "optimizer": ("optimizer",),
    "copies": COPIES,
    "gradient": ("gradient",),
    "caches": CACHES,
}
"""Column of the report -> names of the arrays that it adds up."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a run on a slice.

    name: of the configuration. stages: programs with their memory. phases: with their time; none if a program
    is too large for the chip, or if not all were compiled or all estimated. price: of a chip-hour, None if it
    is not given. alternative: the smallest slice that the run fits by an estimate, if it does not fit this.
    auto_queries: whether rollout.queries is `auto`; the setup has the number that is planned for.
    """

    name: str
    setup: Setup
    slice: Slice
    work: Workload
    assumptions: Assumptions
    stages: Sequence[Stage]
    phases: Sequence[Phase]
    price: float | None
    alternative: str | None = None
    auto_queries: bool = False

    @property
    def estimated(self) -> bool:
        """Whether all programs are estimated, not compiled."""
        return all(stage.program.estimated for stage in self.stages)

    @property
    def available(self) -> float:
        """Bytes on a chip that the run may take."""
        return self.slice.chip.usable - RESERVE

    @property
    def largest(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def missing(self) -> float:
        """Bytes on a chip that are missing; 0 or negative if the run fits."""
        over = self.largest.total - self.available
        # XLA may find a program too large that would fit by its own size.
        refused = any(stage.program.refusal for stage in self.stages)
        return max(over, 1.0) if refused else over

    @property
    def fits(self) -> bool:
        """Whether the run fits the slice."""
        return self.missing <= 0

    @property
    def step_seconds(self) -> float | None:
        """Time of a step, seconds; None if it is not known."""
        return sum(phase.seconds.total for phase in self.phases) if self.phases else None

    @property
    def cost(self) -> float | None:
        """Cost of 1,000 steps in the currency of the price; None if price or time are not known."""
        if self.price is None or self.step_seconds is None:
            return None
        return self.price * self.slice.chips * self.step_seconds / 3.6


def memory_parts(stage: Stage) -> dict[str, float]:
    """Bytes of a stage by column of the report; they add up to its total."""
    sizes = {**stage.held, **{name: stage.own[name] + stage.held.get(name, 0) for name in stage.own}}
    parts = {
        group: float(sum(sizes.get(name, 0) for name in members)) for group, members in MEMORY_GROUPS.items()
    }
    parts["temporaries"] = float(stage.program.temporary)
    parts["other"] = stage.total - sum(parts.values())
    return parts


def suggestions(plan: Plan) -> list[str]:
    """Changes that would save memory, the most promising first."""
    config, stage = plan.setup.config, plan.largest
    sizes, mesh, changes = memory_parts(stage), plan.setup.mesh.shape, list[str]()
    parts, tensor = plan.setup.parts, plan.setup.update.mesh.shape["tensor"]
    queries = plan.setup.queries
    option = "--rollout.max_queries" if plan.auto_queries else "--rollout.queries"
    order = sorted(sizes, key=lambda name: -sizes[name])
    for name in order[:4]:
        if name == "caches" or (
            name in ("temporaries", "other") and stage.phase in ("first return", "explore")
        ):
            if queries > parts:
                changes.append(f"{option} {max(queries // 2 // parts, 1) * parts}")
            elif config.explore.rollouts > 4 and stage.phase == "explore":
                changes.append(f"--explore.rollouts {config.explore.rollouts // 2}")
            if parts > 1 and queries <= parts:
                changes.append("a larger --mesh.tensor with a smaller --mesh.fsdp")
        elif name in ("temporaries", "other") and stage.phase == "update":
            changes.append(f"--optimizer.micro_tokens {config.optimizer.micro_tokens // 2}")
            if tensor < mesh["tensor"]:
                changes.append(f"--mesh.update_tensor {mesh['tensor']}")
        elif name == "optimizer" and config.optimizer.moments == "float32":
            changes.append("--optimizer.moments bfloat16")
        elif name in ("parameters", "gradient", "optimizer") and mesh["data"] > 1:
            changes.append(f"--mesh.fsdp {mesh['data'] * mesh['fsdp']} --mesh.data 1")
        elif name == "copies" and stage.phase in ("first return", "explore", "reshard"):
            changes.append("a larger --mesh.tensor, which is what the copy for sampling is split over")
    return [*dict.fromkeys(changes), "a larger slice"]
