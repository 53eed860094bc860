"""Where branches start, or go on: what `Branches` are opened from, beside KV caches."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Int32, Key, Shaped

from fr3e_jax.engine.branches import Branches
from fr3e_jax.engine.caches import take_queries
from fr3e_jax.engine.sampler import branch_keys
from fr3e_jax.engine.stops import states_along
from fr3e_jax.models.attention import Segment
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.types import AnyArray, Queries, States, StopTable, pytree


@pytree
class Starts:
    """Where C branches of each of N trajectories start or go on; each follows the first tokens of its own."""

    query: Int32[AnyArray, " N"]
    """Row of `Queries`, in the same part of the mesh."""
    response: Int32[AnyArray, "N S"]
    """The tokens of the trajectory."""
    prefix_length: Int32[AnyArray, "N C"]
    """How many of them a branch follows; 0: the query alone."""
    drawn: Bool[AnyArray, "N C"]
    """Which branches there are; the others stay empty."""
    number: Int32[AnyArray, "N C"]
    """The branches' numbers among those of their query, which their randomness is a function of."""
    step: Int32[AnyArray, " N"]
    """Of the run, which it is a function of too."""
    at_position: Bool[AnyArray, "N C"]
    """Which branches begin with the token at a position, which may be drawn at another temperature."""


def root_branches(queries: Queries, count: int) -> Int32[np.ndarray, "B {count}"]:
    """Number `count` branches from each query alone, on the host."""
    return np.broadcast_to(np.arange(count, dtype=np.int32), (queries.length.shape[0], count))


def starts_of_queries(
    queries: Queries, number: Int32[AnyArray, "B C"], step: Int[AnyArray, ""] | int
) -> Starts:
    """Start branches of these numbers from each query alone, without any trajectory."""
    count, nothing = number.shape[0], jnp.zeros_like(number)
    return Starts(
        query=jnp.arange(count, dtype=jnp.int32),
        response=nothing[:, :1],
        prefix_length=nothing,
        drawn=nothing == 0,
        number=number,
        step=jnp.full(count, step, jnp.int32),
        at_position=nothing > 0,
    )


def branch_number(base: Any, column: Any, columns: int, after: int) -> Any:
    """Number a partial rollout among the branches of its query, behind the base trajectories.

    Args:
      base: number of the trajectory that it starts from. column: its own, of the `columns` of each
        trajectory. Both are integers or arrays of them.
      after: number of base trajectories.
    """
    return after + base * columns + column


def starts_of(states: States, rollouts: int, after: int, step: Int[AnyArray, ""] | int) -> Starts:
    """Start `rollouts` branches from every valid state; the arguments are those of `Engine.explore`.

    Branch numbers continue after the base trajectories', one range per trajectory of the query.
    """
    count = states.prefix_length.shape[1] * rollouts
    prefix_length, valid = (jnp.repeat(x, rollouts, axis=1) for x in (states.prefix_length, states.valid))
    if states.rollouts is not None:
        valid &= jnp.arange(count)[None] % rollouts < states.rollouts[:, None]
    return Starts(
        query=states.query,
        response=states.response,
        prefix_length=prefix_length,
        drawn=valid,
        number=branch_number(states.base[:, None], jnp.arange(count)[None, :], count, after),
        step=jnp.broadcast_to(jnp.asarray(step, jnp.int32), states.query.shape),
        at_position=prefix_length > 0,
    )


def branches_at(
    starts: Starts,
    queries: Queries,
    caches: Segment,
    placement: Placement,
    *,
    seed_key: Key[AnyArray, ""],
    max_new: int,
    stops: StopTable | None,
    ranks: tuple[int, ...] | None = None,
) -> Branches:
    """Make the branches of starts, without the keys and values that they share.

    Args:
      starts: where they start. queries: that their trajectories answer.
      caches: of the trajectories.
      placement: of their rows.
      seed_key: what is drawn is a function of it, and of step, query, number and position.
      max_new: most tokens of a whole answer, prefix included.
      stops: recognises texts that end a branch.
      ranks: of the first tokens of the branches of a state, as `Branches.rank`; None: they are drawn.
    """
    prefix_length = starts.prefix_length

    def of_queries(x: Shaped[AnyArray, " B *rest"]) -> Shaped[Array, " N *rest"]:
        return take_queries(x, starts, placement)

    query_length = of_queries(queries.length)[:, None]
    begun = None
    if stops is not None:
        begun = jnp.take_along_axis(states_along(stops, starts.response), prefix_length, axis=1)
    before = jnp.take_along_axis(starts.response, jnp.maximum(prefix_length - 1, 0), axis=1)
    last = jnp.take_along_axis(of_queries(queries.token), query_length - 1, axis=1)
    position = query_length - 1 + prefix_length
    rank = None
    if ranks is not None:
        tiled = jnp.tile(jnp.array(ranks, jnp.int32), prefix_length.shape[1] // len(ranks))
        rank = jnp.broadcast_to(tiled, prefix_length.shape)
    return Branches(
        token=jnp.where(prefix_length > 0, before, last),
        position=position,
        context=caches._replace(key=None, value=None, length=position),
        limit=jnp.where(starts.drawn, max_new - prefix_length, 0),
        key=branch_keys(seed_key, starts.step, of_queries(queries.index), starts.number),
        stops=stops,
        begun=begun,
        rank=rank,
        root=~starts.at_position,
    )
