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
from jaxtyping import Bool, Float, Int32, Key, Shaped

from fr3e_jax.engine.caches import empty_cache
from fr3e_jax.engine.draws import draw_first, draw_rows
from fr3e_jax.engine.sampler import Drawn, Sampling
from fr3e_jax.engine.seats import Leg, Seats
from fr3e_jax.engine.stops import is_complete, state_after
from fr3e_jax.models.attention import Part, Partial, Segment, attend_part, join
from fr3e_jax.models.decoder import Decoder
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import AnyArray, Rollouts, StopTable, pytree


@pytree
class Branches:
    """C branches of each of N trajectories, as they start; none of it changes while they are decoded."""

    token: Int32[AnyArray, "N C"]
    """The last token of each branch's state."""
    position: Int32[AnyArray, "N C"]
    """Its place in the whole sequence."""
    context: tuple[Segment, ...]
    """Segments that the branches of a trajectory share: keys and values [L, N, K, S, D], length [N, C]."""
    limit: Int32[AnyArray, "N C"]
    """Most tokens that a branch may draw; 0 leaves it empty."""
    key: Key[AnyArray, "N C"]
    """PRNG keys."""
    stops: StopTable | None = None
    """Recognises texts that end an answer."""
    begun: Int32[AnyArray, "N C"] | None = None
    """How much of a stop text the state of each branch ends with (`StopTable`)."""
    rank: Int32[AnyArray, "N C"] | None = None
    """The next token of a branch: 1 is the most likely one, 2 the second, and 0 one that is drawn. None: all
    are drawn."""


@pytree
class Decoding:
    """The state of branches between two steps of decoding."""

    rollouts: Rollouts
    """What the branches have generated."""
    running: Bool[AnyArray, "N C"]
    """Which have not stopped yet."""
    last: Int32[AnyArray, "N C"]
    """The token to run next."""
    own: Segment
    """The rows' own segment: keys and values [L, P, K, R x S, D], length [] of all rows.

    S slots of each of the R rows of a part lie one after the other in one axis, so that it can be divided
    anew in place."""
    row_steps: Int32[AnyArray, ""]
    """Rows decoded so far, added up over steps: the sum of `rollouts.length` if no row were ever idle."""
    begun: Int32[AnyArray, "N C"] | None = None
    """How much of a stop text each branch ends with (`StopTable`)."""


def pick(x: Shaped[Array, "P A *rest"], index: Int32[Array, "P B"]) -> Shaped[Array, "P B *rest"]:
    """Index within each part."""
    return jax.vmap(lambda x, index: x[index], spmd_axis_name=BATCH_AXES)(x, index)


@dataclasses.dataclass(frozen=True)
class SeatMap:
    """Moves arrays between branches, rows and the groups of a trajectory."""

    placement: Placement
    seats: Seats

    def of_branches(self, x: Shaped[Array, "N C *rest"]) -> Shaped[Array, "P R *rest"]:
        """Give each row what its branch has."""
        parts = self.seats.branch.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.branch)

    def to_branches(self, x: Shaped[Array, "P R"], like: Shaped[Array, "N C"]) -> Shaped[Array, "N C"]:
        """Give each branch what its row has, or row 0 where it has none, in the shape of `like`."""
        return self.placement.shard(pick(x, self.seats.row).reshape(like.shape), "batch")

    def to_groups(self, x: Shaped[Array, "P R *rest"]) -> Shaped[Array, "N W *rest"]:
        """Bring the rows of each trajectory side by side."""
        parts, n, width = self.seats.group.shape
        grouped = pick(x, self.seats.group.reshape(parts, -1))
        return self.placement.shard(grouped.reshape(parts * n, width, *x.shape[2:]), "batch")

    def of_groups(self, x: Shaped[Array, "N W *rest"]) -> Shaped[Array, "P R *rest"]:
        """Bring what the rows of each trajectory have back to the rows."""
        parts = self.seats.group.shape[0]
        return pick(x.reshape(parts, -1, *x.shape[2:]), self.seats.lane)


def decode_token(
    model: Decoder,
    rows: SeatMap,
    token: Int32[Array, "P R"],
    position: Int32[Array, "P R"],
    *,
    context: tuple[Segment, ...],
    own: Segment,
    window: int,
) -> tuple[Float[Array, "P R E"], Segment]:
    """Run one token of every row against its chain of segments.

    The loop over layers only reads the KV cache. The new keys and values of all layers are stored at once
    after it: where a program reads and changes the cache by turns, XLA copies each layer of it.

    Args:
      rows: moves arrays between rows and the groups of a trajectory.
      token, position: of each row.
      context: segments shared by the branches of a trajectory: keys and values [L, N, K, S, D], length
        [N, W].
      own: the rows' own segment: keys and values [L, P, K, R, S, D], length [], the slot to fill.
      window: slots of `own` that are read.

    Returns:
      (hidden states after the final norm, `own` with one token more).
    """
    graph, stacked = nnx.split(model.layers)
    shard = rows.placement.shard
    held = (jnp.arange(window) < own.length)[None]

    def over(function: Any) -> Any:
        """Map a function over parts or trajectories, the axis that is split over the mesh."""
        return jax.vmap(function, spmd_axis_name=BATCH_AXES)

    def attend_own(
        query: Float[Array, "G D"], key: Float[Array, "S D"], value: Float[Array, "S D"]
    ) -> Partial:
        """Attend from a row's query heads to its own tokens, in one key-value head."""
        part = Part(key[None, :window], value[None, :window], held)
        return jax.tree.map(lambda x: x[0, 0], attend_part(query[None], part))

    def attend_itself(
        query: Float[Array, "H D"], key: Float[Array, "K D"], value: Float[Array, "K D"]
    ) -> Partial:
        """Attend from a row's token to itself."""
        part = Part(key[:, None], value[:, None], jnp.ones((1, 1), bool))
        return jax.tree.map(lambda x: x[0], attend_part(query[None], part))

    def attend_shared(
        query: Float[Array, "W H D"],
        key: Float[Array, "K S D"],
        value: Float[Array, "K S D"],
        length: Int32[Array, " W"],
    ) -> Partial:
        """Attend from a trajectory's rows to the first `length` slots of what they share."""
        return attend_part(query, Part(key, value, jnp.arange(key.shape[1])[None] < length[:, None]))

    def layer(x: Float[Array, "P R E"], inputs: Any) -> tuple[Float[Array, "P R E"], tuple[Array, Array]]:
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

    def store(
        cache: Float[Array, "L P K R S D"], new: Float[Array, "L P R K D"]
    ) -> Float[Array, "L P K R S D"]:
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
      sampling: the distribution that tokens are drawn from. With a first temperature, which is for
        branches of base trajectories alone, or with ranks, the leg is one token long.
    """
    ends = jnp.asarray(end_tokens, jnp.int32)[None, None]
    rows = SeatMap(placement, leg.seats)
    parts, count = leg.seats.branch.shape
    window = min(leg.slots, decoding.rollouts.token.shape[2])
    start, key = rows.of_branches(branches.position), rows.of_branches(branches.key)
    context = tuple(
        segment._replace(length=rows.to_groups(rows.of_branches(segment.length)))
        for segment in branches.context
    )

    heated = rank = None
    if sampling.first_temperature is not None:
        # The root keeps its temperature: its rollouts are what the query's success rate is measured by.
        heated = rows.of_branches(branches.context[-1].length) > 0
    if branches.rank is not None:
        rank = rows.of_branches(branches.rank)

    def divided(cache: Float[Array, "L P K slots D"]) -> Float[Array, "L P K R S D"]:
        """Divide the slots of all rows into rows and slots."""
        return cache.reshape(*cache.shape[:3], count, -1, cache.shape[4])

    def step(before: Decoding) -> Decoding:
        rollouts, running, slot = before.rollouts, before.running, before.own.length
        position = start + slot
        token = rows.of_branches(before.last)
        hidden, own = decode_token(
            model, rows, token, position, context=context, own=before.own, window=window
        )
        drawn = draw_rows(model, placement, hidden, position, key, sampling)
        if heated is not None or rank is not None:
            drawn = draw_first(model, placement, hidden, position, key, sampling, drawn, heated, rank)
        drawn = Drawn(*(rows.to_branches(x, running) for x in drawn))

        def write(buffer: Shaped[Array, "N C S"], value: Shaped[Array, "N C"]) -> Shaped[Array, "N C S"]:
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

    def unfinished(decoding: Decoding) -> Bool[Array, ""]:
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
