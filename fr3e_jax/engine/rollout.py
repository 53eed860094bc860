"""First return and explore: the two jitted rollout functions of a step.

`first_return` samples R trajectories per query and hands their caches over; `explore` restarts from
states of the kept ones on those caches. Only tokens and statistics come to the host.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fr3e_jax.engine.branches import (
    Branches,
    Decoding,
    advance_branches,
    prefill,
    start_branches,
)
from fr3e_jax.engine.sampler import row_key
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.qwen2 import Params, Qwen2
from fr3e_jax.parallel.mesh import Placement, row_parts
from fr3e_jax.types import Queries, Rollouts, States


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
    """What exploration restarts from: the segments of a round's queries and base trajectories.

    query: key, value [L, B, P, K, D], length [B]. base: key, value [L, B, S, K, R, D].
    """

    query: Segment
    base: Segment


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Engine:
    """The rollouts of one model on one mesh.

    `first_return` and `explore`, and `begin` and `advance`, run as one jitted program each.
    """

    graph: nnx.GraphDef[Qwen2]
    placement: Placement
    max_new: int  # most tokens of a response
    end_tokens: tuple[int, ...]

    @functools.partial(jax.jit, static_argnames=("self", "count", "temperature"))
    def first_return(
        self,
        params: Params,
        queries: Queries,
        seed_key: Array,
        step: Array | int,
        count: int,
        temperature: float,
    ) -> tuple[Rollouts, Caches]:
        """Sample `count` base trajectories from every query.

        Returns:
          (Rollouts with N = B and C = count, the caches).
        """
        model = nnx.merge(self.graph, params)
        number = jnp.broadcast_to(jnp.arange(count), (queries.length.shape[0], count))
        branches = self.root_branches(model, queries, number, seed_key, step)
        decoding = self.decode(model, branches, temperature)
        (query_segment,) = branches.context
        query_segment = query_segment._replace(length=queries.length)
        return decoding.rollouts, Caches(query_segment, decoding.own)

    def root_branches(
        self, model: Qwen2, queries: Queries, number: Array, seed_key: Array, step: Array | int
    ) -> Branches:
        """Prefill the queries, each once, and open branches with the numbers int32 [B, C] from them."""
        query_segment = prefill(model, self.placement, queries.token, queries.length)
        shape = number.shape
        last = queries.length[:, None] - 1
        position = jnp.broadcast_to(last, shape)
        return Branches(
            token=jnp.broadcast_to(jnp.take_along_axis(queries.token, last, axis=1), shape),
            position=position,
            context=(query_segment._replace(length=position),),
            limit=jnp.full(shape, self.max_new, jnp.int32),
            key=branch_keys(seed_key, step, queries.index, number),
        )

    def decode(self, model: Qwen2, branches: Branches, temperature: float) -> Decoding:
        """Generate until every branch has stopped."""
        decoding = start_branches(model, self.placement, branches, self.max_new)
        return advance_branches(
            model, self.placement, branches, decoding, self.max_new, self.end_tokens, temperature
        )

    @functools.partial(jax.jit, static_argnames=("self",))
    def begin(
        self, params: Params, queries: Queries, number: Array, seed_key: Array, step: Array | int
    ) -> tuple[Branches, Decoding]:
        """`first_return` in pieces, to be shown as it goes on: before the first token.

        Args:
          number: int32 [B, C], the branches' numbers, which their randomness is a function of.
        """
        model = nnx.merge(self.graph, params)
        branches = self.root_branches(model, queries, number, seed_key, step)
        return branches, start_branches(model, self.placement, branches, self.max_new)

    @functools.partial(jax.jit, static_argnames=("self", "temperature"), donate_argnames=("decoding",))
    def advance(
        self, params: Params, branches: Branches, decoding: Decoding, until: Array | int, temperature: float
    ) -> Decoding:
        """`first_return` in pieces: up to `until` generated tokens, at most `max_new`."""
        model = nnx.merge(self.graph, params)
        return advance_branches(
            model, self.placement, branches, decoding, until, self.end_tokens, temperature
        )

    @functools.partial(jax.jit, static_argnames=("self", "rollouts", "temperature"))
    def explore(
        self,
        params: Params,
        queries: Queries,
        caches: Caches,
        states: States,
        seed_key: Array,
        step: Array | int,
        rollouts: int,
        temperature: float,
    ) -> Rollouts:
        """Sample `rollouts` continuations from every valid state.

        Args:
          queries, caches: as given to and returned by `first_return`.
          states: of N trajectories, N dividing by the mesh's row parts.

        Returns:
          Rollouts with N trajectories and C = J x rollouts branches, state-major.
        """
        model = nnx.merge(self.graph, params)

        def per_branch(x: Array) -> Array:
            return jnp.repeat(x, rollouts, axis=1)

        # The kept trajectories' rows are taken out once; their branches share them.
        query_length = queries.length[states.query][:, None]
        query_segment = Segment(
            caches.query.key[:, states.query],
            caches.query.value[:, states.query],
            per_branch(jnp.broadcast_to(query_length - 1, states.prefix_length.shape)),
        )
        base_segment = Segment(
            take_trajectory(caches.base.key, states),
            take_trajectory(caches.base.value, states),
            per_branch(states.prefix_length),
        )
        before = jnp.take_along_axis(states.response, jnp.maximum(states.prefix_length - 1, 0), axis=1)
        last = jnp.take_along_axis(queries.token[states.query], query_length - 1, axis=1)
        token = jnp.where(states.prefix_length > 0, before, last)

        # A whole answer, prefix included, has at most max_new tokens.
        limit = jnp.where(states.valid, self.max_new - states.prefix_length, 0)
        count = states.prefix_length.shape[1] * rollouts
        # Branch numbers continue after the base trajectories', one range per trajectory of the query.
        number = caches.base.key.shape[4] + states.base[:, None] * count + jnp.arange(count)[None, :]
        branches = Branches(
            token=per_branch(token),
            position=per_branch(query_length - 1 + states.prefix_length),
            context=(query_segment, base_segment),
            limit=per_branch(limit),
            key=branch_keys(seed_key, step, queries.index[states.query], number),
        )
        return self.decode(model, branches, temperature).rollouts

    def bucket(self, rows: int) -> int:
        """The number of trajectories to compile for: the mesh's row parts times a power of two."""
        parts = row_parts(self.placement.mesh)
        return parts * 2 ** int(np.ceil(np.log2(max(-(-rows // parts), 1))))


def take_trajectory(cache: Array, states: States) -> Array:
    """The kept trajectories of a base cache: [L, B, S, K, R, D] -> [L, N, S, K, D]."""

    def one(query: Array, base: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(cache, query, 1, keepdims=False)
        return jax.lax.dynamic_index_in_dim(row, base, 3, keepdims=False)

    return jax.vmap(one, out_axes=1)(states.query, states.base)


def branch_keys(seed_key: Array, step: Array | int, query: Array, branch: Array) -> Array:
    """Keys [N, C] of branches int32 [N, C] of queries int32 [N]."""
    keys = jax.vmap(row_key, in_axes=(None, None, None, 0))
    return jax.vmap(keys, in_axes=(None, None, 0, 0))(seed_key, step, query, branch)
