"""The state of batch rows within a leg, taken from branches and given back to them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, Shaped

from fr3e_jax.engine.sampler import Drawn
from fr3e_jax.engine.seats import Seats
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import AnyArray, Rollouts, pytree


@pytree
class LegRows:
    """The state of the rows of all blocks within a leg. Axis `steps` has the tokens of the leg."""

    running: Bool[AnyArray, "P R"]
    last: Int32[AnyArray, "P R"]
    length: Int32[AnyArray, "P R"]
    """Tokens that the branch of each row has drawn."""
    stopped: Bool[AnyArray, "P R"]
    begun: Int32[AnyArray, "P R"] | None
    drawn: Drawn | None
    """What each row has drawn in the leg, each [P, R, steps]; anything where it did not run."""


def over(function: Any) -> Any:
    """Map a function over parts, the axis that is split over the mesh."""
    return jax.vmap(function, spmd_axis_name=BATCH_AXES)


def pick(x: Shaped[Array, "P A *rest"], index: Int32[Array, "P B"]) -> Shaped[Array, "P B *rest"]:
    """Take entries of each part by their numbers in it."""
    return over(lambda x, index: x[index])(x, index)


def of_branches(x: Shaped[Array, "N C *rest"], seats: Seats) -> Shaped[Array, "P R *rest"]:
    """Give each row what its branch has."""
    return pick(x.reshape(seats.branch.shape[0], -1, *x.shape[2:]), seats.branch)


def to_branches(
    placement: Placement, before: Shaped[Array, "N C"], x: Shaped[Array, "P R"], seats: Seats
) -> Shaped[Array, "N C"]:
    """Give each branch that has a row what the row has; the others keep what they have."""
    own = pick(x, seats.row).reshape(before.shape)
    return placement.shard(jnp.where(seats.seated.reshape(before.shape), own, before), "batch")


def of_span(x: Shaped[Array, "P R *rest"], first: Any, size: int) -> Shaped[Array, "P S *rest"]:
    """Take `size` rows of each part, those of a span, from row `first` on."""
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)


def write_rows(
    placement: Placement, rollouts: Rollouts, rows: LegRows, before: Int32[Array, "P R"], seats: Seats
) -> Rollouts:
    """Write what the rows have drawn in a leg behind what their branches had drawn `before`."""

    def write(
        buffer: Array, drawn: Array, before: Array, length: Array, branch: Array, taken: Array
    ) -> Array:
        step = jnp.arange(drawn.shape[1])[None]
        real = taken[:, None] & (step < (length - before)[:, None])
        at = jnp.where(real, before[:, None] + step, buffer.shape[1])  # there is no such place: it is dropped
        return buffer.at[branch[:, None], at].set(drawn, mode="drop")

    def one(buffer: Array, drawn: Array) -> Array:
        parts = before.shape[0]
        flat = buffer.reshape(parts, -1, buffer.shape[2])
        flat = over(write)(flat, drawn, before, rows.length, seats.branch, seats.taken)
        return placement.shard(flat.reshape(buffer.shape), "batch")

    drawn = rows.drawn
    assert drawn is not None
    return dataclasses.replace(
        rollouts,
        token=one(rollouts.token, drawn.token),
        logprob=one(rollouts.logprob, drawn.logprob),
        sampled_logprob=one(rollouts.sampled_logprob, drawn.sampled_logprob),
        entropy=one(rollouts.entropy, drawn.entropy),
    )
