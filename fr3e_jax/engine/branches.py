"""Decoding many branches of many trajectories, in lockstep, against shared segments.

A branch starts from a state. Its chain is [query] + [base response up to the state] + [its own
tokens]. The first input of its own segment is the *last token of the state*, so that the first draw
needs no logits from elsewhere: a segment is read one token short, and nothing is prefilled twice.

Branches sit in rows (seats.py). What a branch shares is attended to trajectory by trajectory, what is its
own row by row, and the two are joined.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fr3e_jax.engine.sampler import Drawn, Sampling, draw, draw_uniform
from fr3e_jax.engine.seats import Seats
from fr3e_jax.engine.stops import is_complete, state_after
from fr3e_jax.models.attention import Part, Partial, Segment, attend_part, join
from fr3e_jax.models.decoder import Decoder, cache_axes
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import Rollouts, StopTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """What is fixed for C branches of each of N trajectories while they are decoded in lockstep.

    token: int32 [N, C], last token of each branch's state. position: int32 [N, C], its place in the whole
    sequence. context: segments that the branches of a trajectory share: key, value [L, N, K, S, D], length
    int32 [N, C]. limit: int32 [N, C], most tokens that a branch may draw; 0 leaves it empty. key: PRNG
    keys [N, C]. stops: texts that end an answer, or None. begun: int32 [N, C], its state for each branch's
    state, or None.
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
    """How far the branches have come.

    rollouts: what they have generated. running: bool [N, C], not stopped yet. last: int32 [N, C], the
    token to run next. own: the rows' own segment: key, value [L, P, K, R x S, D], for the R rows of each of
    the P parts of the mesh S slots one after the other, length int32 [] of all rows. row_steps: int32 [],
    rows decoded so far, added up over steps: what `rollouts.length` would add up to if no row ever idled.
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
    """Within each part: x [P, A, ...] at index int32 [P, B], giving [P, B, ...]."""
    return jax.vmap(lambda x, index: x[index], spmd_axis_name=BATCH_AXES)(x, index)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Moves arrays between branches, rows and the groups of a trajectory."""

    placement: Placement
    seats: Seats

    def of_branches(self, x: Array) -> Array:
        """[N, C, ...] -> [P, R, ...]."""
        parts = self.seats.branch.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.branch)

    def to_branches(self, x: Array, like: Array) -> Array:
        """[P, R, ...] -> [N, C, ...], `like` being [N, C]; a branch without a row gets what is in row 0."""
        return self.placement.shard(pick(x, self.seats.row).reshape(like.shape), "batch")

    def to_groups(self, x: Array) -> Array:
        """[P, R, ...] -> [N, W, ...]."""
        parts, n, width = self.seats.group.shape
        grouped = pick(x, self.seats.group.reshape(parts, -1))
        return self.placement.shard(grouped.reshape(parts * n, width, *x.shape[2:]), "batch")

    def of_groups(self, x: Array) -> Array:
        """[N, W, ...] -> [P, R, ...]."""
        parts = self.seats.group.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.lane)


def decode_token(
    model: Decoder,
    rows: Rows,
    token: Array,
    position: Array,
    context: tuple[Segment, ...],
    own: Segment,
    window: int,
) -> tuple[Array, Segment]:
    """Run one token of every row against its chain of segments.

    The caches are only read while the layers are gone through, and the new keys and values of all layers
    stored at once after them: read and changed by turns, XLA copies a layer of the cache to read it.

    Args:
      token, position: int32 [P, R].
      context: segments shared by the branches of a trajectory: key, value [L, N, K, S, D], length int32
        [N, W].
      own: the rows' own segment: key, value [L, P, K, R, S, D], length int32 [], the slot to fill.
      window: slots of it that are read.

    Returns:
      (hidden [P, R, E] after the final norm, `own` with one token more).
    """
    graph, stacked = nnx.split(model.layers)
    shard = rows.placement.shard
    held = (jnp.arange(window) < own.length)[None]

    def over(function: Any) -> Any:
        """`function`, over parts or trajectories, which are what is split over the mesh."""
        return jax.vmap(function, spmd_axis_name=BATCH_AXES)

    def attend_own(query: Array, key: Array, value: Array) -> Partial:
        """[G, D] and [S, D], of a row and a key-value head."""
        part = Part(key[None, :window], value[None, :window], held)
        return jax.tree.map(lambda x: x[0, 0], attend_part(query[None], part))

    def attend_itself(query: Array, key: Array, value: Array) -> Partial:
        """[H, D] and [K, D], of a row."""
        part = Part(key[:, None], value[:, None], jnp.ones((1, 1), bool))
        return jax.tree.map(lambda x: x[0], attend_part(query[None], part))

    def attend_shared(query: Array, key: Array, value: Array, length: Array) -> Partial:
        """[W, H, D], [K, S, D] and [W], of a trajectory."""
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
    model: Decoder, placement: Placement, branches: Branches, max_new: int, rows: int, slots: int
) -> Decoding:
    """Branches that have generated nothing.

    Args:
      max_new: the largest limit. rows: of a part. slots: of the branch cache, to begin with.
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
    running = branches.limit > 0
    return Decoding(by_row(placement, empty), running, branches.token, own, jnp.int32(0), branches.begun)


CACHE_AXES = cache_axes("batch")


def empty_cache(model: Decoder, placement: Placement, size: int) -> Array:
    """Keys or values of `size` tokens in each part of the mesh, zero."""
    config = model.config
    heads = (config.num_key_value_heads, size, config.head_dim)
    zeros = jnp.zeros((config.num_hidden_layers, row_parts(placement.mesh), *heads), model.dtype)
    return placement.shard(zeros, *CACHE_AXES)


def reseat(
    model: Decoder, placement: Placement, own: Segment, origin: Array, before: int, rows: int, slots: int
) -> Segment:
    """Move rows of the branch cache together: within it, if its size stays the same.

    Args:
      own: key, value [L, P, K, R x S, D] with R = `before`.
      origin: int32 [P, `rows`], the row that each row's tokens are in.
      slots: to have from now on.
    """

    def moved(layer: Array) -> Array:
        """[P, K, R x S, D] -> [P, K, rows x slots, D]."""
        parts, heads, size, width = layer.shape
        held = layer.reshape(parts, heads, before, size // before, width)[:, :, :, :slots]
        held = jax.vmap(lambda x, index: x[:, index], spmd_axis_name=BATCH_AXES)(held, origin)
        held = jnp.pad(held, ((0, 0), (0, 0), (0, 0), (0, slots - held.shape[3]), (0, 0)))
        return placement.shard(held.reshape(parts, heads, rows * slots, width), *CACHE_AXES[1:])

    def move(cache: Array) -> Array:
        target = cache if cache.shape[3] == rows * slots else empty_cache(model, placement, rows * slots)

        def one(number: Array, target: Array) -> Array:
            source = target if target.shape == cache.shape else cache
            layer = jax.lax.dynamic_index_in_dim(source, number, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(target, moved(layer), number, 0)

        return jax.lax.fori_loop(0, cache.shape[0], one, target)

    return own._replace(key=move(own.key), value=move(own.value))


def advance_branches(
    model: Decoder,
    placement: Placement,
    branches: Branches,
    decoding: Decoding,
    seats: Seats,
    until: Array | int,
    leave: Array | int,
    window: int,
    end_tokens: tuple[int, ...],
    sampling: Sampling,
) -> Decoding:
    """Generate until every branch has stopped, few enough are left to move, or `until` tokens are generated.

    Args:
      model: merged with parameters in the compute dtype.
      placement: mesh and table for sampling; trajectories are rows.
      branches: as given to `start_branches`.
      decoding: what `start_branches` or a call before this one returned.
      seats: where the running branches sit in `decoding.own`.
      until: int32 [], at most `window`.
      leave: int32 []; as soon as no part has more running branches, return.
      window: slots of the branch cache that are read.
      end_tokens: a branch stops after drawing one of these; it belongs to the answer. It also stops where
        a stop text is complete.
    """
    ends = jnp.asarray(end_tokens, jnp.int32)[None, None]
    rows = Rows(placement, seats)
    parts, count = seats.branch.shape
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
        return cache.reshape(*cache.shape[:3], count, -1, cache.shape[4])

    def step(before: Decoding) -> Decoding:
        rollouts, running, slot = before.rollouts, before.running, before.own.length
        position = start + slot
        token = rows.of_branches(before.last)
        hidden, own = decode_token(model, rows, token, position, context, before.own, window)
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
        running = running & ~ended & (rollouts.length < branches.limit)
        row_steps = before.row_steps + parts * count
        return Decoding(by_row(placement, rollouts), running, drawn.token, own, row_steps, begun)

    def unfinished(decoding: Decoding) -> Array:
        fullest = jnp.max(jnp.sum(decoding.running.reshape(parts, -1), axis=1))
        return (fullest > leave) & (decoding.own.length < until)

    own = decoding.own._replace(key=divided(decoding.own.key), value=divided(decoding.own.value))
    done = jax.lax.while_loop(unfinished, step, dataclasses.replace(decoding, own=own))
    shape = decoding.own.key.shape
    own = done.own._replace(key=done.own.key.reshape(shape), value=done.own.value.reshape(shape))
    return dataclasses.replace(done, own=own)


def by_row(placement: Placement, tree: Rollouts) -> Rollouts:
    """Constrain arrays whose first axis is trajectories."""
    return jax.tree.map(lambda x: placement.shard(x, "batch"), tree)


def prefill(model: Decoder, placement: Placement, token: Array, length: Array) -> Segment:
    """Keys and values of B queries, each computed once.

    Args:
      token: int32 [B, P], right-padded. length: int32 [B].

    Returns:
      Segment with key, value [L, B, K, P, D], length int32 [B].
    """
    position = jnp.arange(token.shape[1])

    def one(token: Array, length: Array) -> Segment:
        return model(token, position, length, placement.shard)[1]

    rows = jax.vmap(
        one,
        out_axes=Segment(1, 1, 0),
        spmd_axis_name=BATCH_AXES,
    )
    return rows(token, length)
