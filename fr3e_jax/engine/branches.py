"""Decoding many branches of many trajectories, in lockstep, against shared segments.

A branch starts from a state. Its chain of segments is [query] + [base response up to the state] + [its own
tokens]. The first input of its own segment is the *last token of the state*. So the first draw needs no
logits from elsewhere: the shared segments are read one token short, and nothing is prefilled twice.

Branches sit in batch rows (seats.py). Attention to what branches share runs trajectory by trajectory,
attention to their own tokens row by row, and the two are joined.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fr3e_jax.engine.caches import empty_cache
from fr3e_jax.engine.sampler import Drawn, Sampling, draw, draw_uniform
from fr3e_jax.engine.seats import Leg, Seats
from fr3e_jax.engine.stops import is_complete, state_after
from fr3e_jax.models.attention import Part, Partial, Segment, attend_part, join
from fr3e_jax.models.decoder import Decoder
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import Rollouts, StopTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """What is fixed for C branches of each of N trajectories while they are decoded in lockstep.

    token: int32 [N, C], last token of each branch's state. position: int32 [N, C], its place in the whole
    sequence. context: segments that the branches of a trajectory share: key, value [L, N, K, S, D], length
    int32 [N, C]. limit: int32 [N, C], most tokens that a branch may draw; 0 leaves it empty. key: PRNG
    keys [N, C]. stops: recognises texts that end an answer, or None. begun: int32 [N, C], how much of a stop
    text the state of each branch ends with, or None.
    """

    token: Array
    position: Array
    context: tuple[Segment, ...]
    limit: Array
    key: Array
    stops: StopTable | None = None
    begun: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The state of branches between two steps of decoding.

    rollouts: what they have generated. running: bool [N, C], not stopped yet. last: int32 [N, C], the
    token to run next. own: the rows' own segment: key, value [L, P, K, R x S, D], for the R rows of each of
    the P parts of the mesh S slots one after the other, length int32 [] of all rows. row_steps: int32 [],
    rows decoded so far, added up over steps: the sum of `rollouts.length` if no row were ever idle.
    begun: int32 [N, C], how much of a stop text each branch ends with (`StopTable`), or None without any.

    R x S is one axis, so that it can be divided anew in place.
    """

    rollouts: Rollouts
    running: Array
    last: Array
    own: Segment
    row_steps: Array
    begun: Array | None = None


def pick(x: Array, index: Array) -> Array:
    """Index within each part: x [P, A, ...] at index int32 [P, B] gives [P, B, ...]."""
    return jax.vmap(lambda x, index: x[index], spmd_axis_name=BATCH_AXES)(x, index)


@dataclasses.dataclass(frozen=True)
class SeatMap:
    """Moves arrays between branches, rows and the groups of a trajectory."""

    placement: Placement
    seats: Seats

    def of_branches(self, x: Array) -> Array:
        """Give each row what its branch has: [N, C, ...] -> [P, R, ...]."""
        parts = self.seats.branch.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.branch)

    def to_branches(self, x: Array, like: Array) -> Array:
        """Give each branch what its row has, or row 0 where it has none: [P, R, ...] -> [N, C], as `like`."""
        return self.placement.shard(pick(x, self.seats.row).reshape(like.shape), "batch")

    def to_groups(self, x: Array) -> Array:
        """Bring the rows of each trajectory side by side: [P, R, ...] -> [N, W, ...]."""
        parts, n, width = self.seats.group.shape
        grouped = pick(x, self.seats.group.reshape(parts, -1))
        return self.placement.shard(grouped.reshape(parts * n, width, *x.shape[2:]), "batch")

    def of_groups(self, x: Array) -> Array:
        """Bring what the rows of each trajectory have back to the rows: [N, W, ...] -> [P, R, ...]."""
        parts = self.seats.group.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.lane)


def decode_token(
    model: Decoder,
    rows: SeatMap,
    token: Array,
    position: Array,
    *,
    context: tuple[Segment, ...],
    own: Segment,
    window: int,
) -> tuple[Array, Segment]:
    """Run one token of every row against its chain of segments.

    The loop over layers only reads the KV cache. The new keys and values of all layers are stored at once
    after it: where a program reads and changes the cache by turns, XLA copies each layer of it.

    Args:
      rows: moves arrays between rows and the groups of a trajectory.
      token, position: int32 [P, R].
      context: segments shared by the branches of a trajectory: key, value [L, N, K, S, D], length int32
        [N, W].
      own: the rows' own segment: key, value [L, P, K, R, S, D], length int32 [], the slot to fill.
      window: slots of `own` that are read.

    Returns:
      (hidden [P, R, E] after the final norm, `own` with one token more).
    """
    graph, stacked = nnx.split(model.layers)
    shard = rows.placement.shard
    held = (jnp.arange(window) < own.length)[None]

    def over(function: Any) -> Any:
        """Map a function over parts or trajectories, the axis that is split over the mesh."""
        return jax.vmap(function, spmd_axis_name=BATCH_AXES)

    def attend_own(query: Array, key: Array, value: Array) -> Partial:
        """Attend from a row's query heads [G, D] to its own tokens [S, D], in one key-value head."""
        part = Part(key[None, :window], value[None, :window], held)
        return jax.tree.map(lambda x: x[0, 0], attend_part(query[None], part))

    def attend_itself(query: Array, key: Array, value: Array) -> Partial:
        """Attend from a row's token, query [H, D], to itself, key and value [K, D]."""
        part = Part(key[:, None], value[:, None], jnp.ones((1, 1), bool))
        return jax.tree.map(lambda x: x[0], attend_part(query[None], part))

    def attend_shared(query: Array, key: Array, value: Array, length: Array) -> Partial:
        """Attend from a trajectory's rows [W, H, D] to the `length` [W] slots that they share, [K, S, D]."""
        return attend_part(query, Part(key, value, jnp.arange(key.shape[1])[None] < length[:, None]))

    def layer(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        params, own_key, own_value, keys, values = inputs
        block = nnx.merge(graph, params)
        query, key, value = over(lambda x, position: block.project(x, position, shard))(x, position)
        by_head = query.reshape(*query.shape[:2], own_key.shape[1], -1, query.shape[3])
        partials = [
            # Head by head and then row by row, as the cache lies: the other way round XLA lays it out anew.
            over(jax.vmap(jax.vmap(attend_own), (1, 0, 0), 1))(by_head, own_key, own_value),
            over(jax.vmap(attend_itself))(query, key, value),
        ]
        grouped = rows.to_groups(query)
        for segment, shared_key, shared_value in zip(context, keys, values, strict=True):
            shared = over(attend_shared)(grouped, shared_key, shared_value, segment.length)
            partials.append(jax.tree.map(rows.of_groups, shared))
        attended = join(partials).astype(x.dtype)
        x = over(lambda x, attended: block.finish(x, attended, shard))(x, attended)
        return x, (key, value)

    def store(cache: Array, new: Array) -> Array:
        new = jnp.einsum("lprkd->lpkrd", new)[..., None, :]
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, 0, own.length, 0))

    inputs = (
        stacked,
        own.key,
        own.value,
        tuple(segment.key for segment in context),
        tuple(segment.value for segment in context),
    )
    x = over(lambda token: model.embed(token, shard))(token)
    x, (key, value) = jax.lax.scan(layer, x, inputs)
    return model.norm(x), Segment(store(own.key, key), store(own.value, value), own.length + 1)


def start_branches(
    model: Decoder, placement: Placement, branches: Branches, *, max_new: int, rows: int, slots: int
) -> Decoding:
    """Make the state of branches that have generated nothing.

    Args:
      max_new: the largest limit. rows: of a part. slots: of each row of the branch cache, to begin with.
    """
    n, count = branches.token.shape

    def numbers(dtype: Any) -> Array:
        return jnp.zeros((n, count, max_new), dtype)

    empty = Rollouts(
        token=numbers(jnp.int32),
        logprob=numbers(jnp.float32),
        sampled_logprob=numbers(jnp.float32),
        entropy=numbers(jnp.float32),
        length=jnp.zeros((n, count), jnp.int32),
        stopped=jnp.zeros((n, count), bool),
    )
    size = rows * slots
    own = Segment(empty_cache(model, placement, size), empty_cache(model, placement, size), jnp.int32(0))
    return Decoding(
        rollouts=by_row(placement, empty),
        running=branches.limit > 0,
        last=branches.token,
        own=own,
        row_steps=jnp.int32(0),
        begun=branches.begun,
    )


def advance_branches(
    model: Decoder,
    placement: Placement,
    branches: Branches,
    decoding: Decoding,
    leg: Leg,
    *,
    end_tokens: tuple[int, ...],
    sampling: Sampling,
) -> Decoding:
    """Generate until every branch has stopped, or the leg ends.

    Args:
      model: merged with parameters in the compute dtype.
      placement: mesh and table for sampling; trajectories are rows.
      branches: as given to `start_branches`.
      decoding: what `start_branches` or a call before this one returned, with rows as the leg has them.
      leg: where the running branches sit in `decoding.own`, and when to return.
      end_tokens: a branch stops after drawing one of these, which belongs to the answer. It also stops where
        a stop text is complete.
      sampling: the distribution that tokens are drawn from.
    """
    ends = jnp.asarray(end_tokens, jnp.int32)[None, None]
    rows = SeatMap(placement, leg.seats)
    parts, count = leg.seats.branch.shape
    window = min(leg.slots, decoding.rollouts.token.shape[2])
    vocabulary_parts = placement.mesh.shape["tensor"]
    start, key = rows.of_branches(branches.position), rows.of_branches(branches.key)
    context = tuple(
        segment._replace(length=rows.to_groups(rows.of_branches(segment.length)))
        for segment in branches.context
    )

    def draw_part(hidden: Array, position: Array, key: Array) -> Drawn:
        def draw_row(logits: Array, position: Array, key: Array) -> Drawn:
            uniform = draw_uniform(key, position)
            return draw(logits, uniform, sampling, vocabulary_parts, placement.shard)

        return jax.vmap(draw_row)(model.logits(hidden, placement.shard), position, key)

    draw_all = jax.vmap(draw_part, spmd_axis_name=BATCH_AXES)

    def divided(cache: Array) -> Array:
        """Rows and slots as 2 axes: [L, P, K, R x S, D] -> [L, P, K, R, S, D]."""
        return cache.reshape(*cache.shape[:3], count, -1, cache.shape[4])

    def step(before: Decoding) -> Decoding:
        rollouts, running, slot = before.rollouts, before.running, before.own.length
        position = start + slot
        token = rows.of_branches(before.last)
        hidden, own = decode_token(
            model, rows, token, position, context=context, own=before.own, window=window
        )
        drawn = Drawn(*(rows.to_branches(x, running) for x in draw_all(hidden, position, key)))

        def write(buffer: Array, value: Array) -> Array:
            value = jnp.where(running, value, 0)[..., None]
            return jax.lax.dynamic_update_slice(buffer, value, (0, 0, slot))

        ends_here, begun = jnp.any(drawn.token[..., None] == ends, axis=-1), before.begun
        if branches.stops is not None and begun is not None:
            begun = state_after(branches.stops, begun, drawn.token)
            ends_here |= is_complete(branches.stops, begun)
        ended = running & ends_here
        rollouts = Rollouts(
            token=write(rollouts.token, drawn.token),
            logprob=write(rollouts.logprob, drawn.logprob),
            sampled_logprob=write(rollouts.sampled_logprob, drawn.sampled_logprob),
            entropy=write(rollouts.entropy, drawn.entropy),
            length=rollouts.length + running,
            stopped=rollouts.stopped | ended,
        )
        return Decoding(
            rollouts=by_row(placement, rollouts),
            running=running & ~ended & (rollouts.length < branches.limit),
            last=drawn.token,
            own=own,
            row_steps=before.row_steps + parts * count,
            begun=begun,
        )

    def unfinished(decoding: Decoding) -> Array:
        fullest = jnp.max(jnp.sum(decoding.running.reshape(parts, -1), axis=1))
        return (fullest > leg.leave) & (decoding.own.length < leg.until)

    own = decoding.own._replace(key=divided(decoding.own.key), value=divided(decoding.own.value))
    done = jax.lax.while_loop(unfinished, step, dataclasses.replace(decoding, own=own))
    shape = decoding.own.key.shape
    own = done.own._replace(key=done.own.key.reshape(shape), value=done.own.value.reshape(shape))
    return dataclasses.replace(done, own=own)


def by_row(placement: Placement, tree: Rollouts) -> Rollouts:
    """Constrain arrays whose first axis is trajectories to be split over the mesh."""
    return jax.tree.map(lambda x: placement.shard(x, "batch"), tree)
