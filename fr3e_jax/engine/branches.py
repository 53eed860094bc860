"""Decoding many branches of many trajectories, in rows that belong to none of them.

A branch starts from a state. Its chain of segments is [query and base response up to the state] + [its own
tokens]. The first input of its own segment is the *last token of the state*. So the first draw needs no
logits from elsewhere: the shared segment is read one token short, and nothing is prefilled twice.

The rows of a few blocks, a span, run through the layers together. Attention to what branches share runs
trajectory by trajectory, attention to their own tokens block by block, and the two are joined (reading.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int32, Key

from fr3e_jax.engine.draws import draw_first, draw_rows
from fr3e_jax.engine.pages import Pages, PageSizes, empty_pages, store_tokens
from fr3e_jax.engine.reading import Reach, attend_span
from fr3e_jax.engine.rows import LegRows, of_branches, of_span, over, to_branches, write_rows
from fr3e_jax.engine.sampler import Drawn, Sampling
from fr3e_jax.engine.seats import Leg
from fr3e_jax.engine.stops import is_complete, state_after
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.types import AnyArray, Rollouts, StopTable, pytree


@pytree
class Branches:
    """C branches of each of N trajectories, as they start; none of it changes while they are decoded."""

    token: Int32[AnyArray, "N C"]
    """The last token of each branch's state."""
    position: Int32[AnyArray, "N C"]
    """Its place in the whole sequence."""
    context: Segment
    """What the branches of a trajectory share: keys and values [L, N, K, S, D], length [N, C]."""
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
    root: Bool[AnyArray, "N C"] | None = None
    """Which branches start from the bare query, where the first tokens of the others are drawn otherwise."""

    def with_context(self, caches: Segment) -> "Branches":
        """Add the keys and values that the branches of a trajectory share."""
        return dataclasses.replace(self, context=caches._replace(length=self.context.length))


@pytree
class Decoding:
    """The state of branches between two legs."""

    rollouts: Rollouts
    """What the branches have generated."""
    running: Bool[AnyArray, "N C"]
    """Which have not stopped yet, whether they have begun or wait."""
    last: Int32[AnyArray, "N C"]
    """The token to run next."""
    pages: Pages
    """Keys and values of what the branches have generated."""
    row_steps: Int32[AnyArray, ""]
    """LegRows decoded so far, added up over steps: the sum of `rollouts.length` if no row were ever idle."""
    begun: Int32[AnyArray, "N C"] | None = None
    """How much of a stop text each branch ends with (`StopTable`)."""


def decode_token(
    model: Decoder,
    placement: Placement,
    sizes: PageSizes,
    token: Int32[Array, "P R"],
    position: Int32[Array, "P R"],
    *,
    context: Segment,
    pages: Pages,
    reach: Reach,
    slot: Int32[Array, ""],
) -> tuple[Float[Array, "P R E"], Pages]:
    """Run one token of every row of a span against its chain of segments.

    The loop over layers only reads the KV caches. The new keys and values of all layers are stored at once
    after it: where a program reads and changes a cache by turns, XLA copies each layer of it.

    Args:
      token, position: of each row.
      context: keys and values [L, N, K, S, D] that the branches of a trajectory share.
      pages: of the branches' own tokens.
      reach: what each row attends to.
      slot: of the last page of each block, where the new token is stored.

    Returns:
      (hidden states after the final norm, the pages with one token more of each row).
    """
    graph, stacked = nnx.split(model.layers)
    shard = placement.shard

    def layer(x: Float[Array, "P R E"], inputs: Any) -> tuple[Float[Array, "P R E"], tuple[Array, Array]]:
        params, number = inputs
        block = nnx.merge(graph, params)
        query, key, value = over(lambda x, position: block.project(x, position, shard))(x, position)
        attended = attend_span(placement, sizes, number, query, key, value, pages, context, reach)
        x = over(lambda x, attended: block.finish(x, attended, shard))(x, attended)
        return x, (key, value)

    x = over(lambda token: model.embed(token, shard))(token)
    x, (key, value) = jax.lax.scan(layer, x, (stacked, jnp.arange(model.config.num_hidden_layers)))
    page = jnp.take_along_axis(reach.table, jnp.maximum(reach.count - 1, 0)[:, None], axis=1)[:, 0]
    return model.norm(x), store_tokens(placement, pages, key, value, page, reach.running, slot)


def start_branches(
    model: Decoder, placement: Placement, branches: Branches, *, max_new: int, sizes: PageSizes, pages: int
) -> Decoding:
    """Make the state of branches that have generated nothing.

    Args:
      max_new: the largest limit. pages: that are allocated on each part.
    """
    n, count = branches.token.shape

    def numbers(dtype: Any) -> Array:
        return placement.shard(jnp.zeros((n, count, max_new), dtype), "batch")

    empty = Rollouts(
        token=numbers(jnp.int32),
        logprob=numbers(jnp.float32),
        sampled_logprob=numbers(jnp.float32),
        entropy=numbers(jnp.float32),
        length=placement.shard(jnp.zeros((n, count), jnp.int32), "batch"),
        stopped=placement.shard(jnp.zeros((n, count), bool), "batch"),
    )
    return Decoding(
        rollouts=empty,
        running=branches.limit > 0,
        last=branches.token,
        pages=empty_pages(model, placement, sizes, pages),
        row_steps=jnp.int32(0),
        begun=branches.begun,
    )


def advance_branches(
    model: Decoder,
    placement: Placement,
    sizes: PageSizes,
    branches: Branches,
    decoding: Decoding,
    leg: Leg,
    *,
    end_tokens: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Decoding, Int32[Array, ""]]:
    """Generate until so many branches have stopped that rows should move, or the leg ends.

    Args:
      model: merged with parameters in the compute dtype.
      placement: mesh and table for sampling; trajectories are rows.
      branches: as given to `start_branches`.
      decoding: what `start_branches` or a call before this one returned, with pages as the leg has them.
      leg: where the running branches sit, and when to return.
      end_tokens: a branch stops after drawing one of these, which belongs to the answer. It also stops where
        a stop text is complete.
      sampling: the distribution that tokens are drawn from. With a first temperature or ranks, which are for
        the first tokens of branches, the leg is one token long.

    Returns:
      (the state after the leg, how many tokens it had).
    """
    ends = jnp.asarray(end_tokens, jnp.int32)[None, None]
    seats, size = leg.seats, leg.span * sizes.rows
    start, key = of_branches(branches.position, seats), of_branches(branches.key, seats)
    limit, shared = of_branches(branches.limit, seats), of_branches(branches.context.length, seats)
    before = of_branches(decoding.rollouts.length, seats)
    heated = rank = None
    if sampling.first_temperature is not None and branches.root is not None:
        # The root keeps its temperature: its rollouts are what the query's success rate is measured by.
        heated = ~of_branches(branches.root, seats) & (before == 0)
    if branches.rank is not None:
        rank = jnp.where(before == 0, of_branches(branches.rank, seats), 0)
    none = jnp.zeros((*before.shape, sizes.slots), jnp.float32)
    rows = LegRows(
        running=of_branches(decoding.running, seats) & seats.taken,
        last=of_branches(decoding.last, seats),
        length=before,
        stopped=jnp.zeros(before.shape, bool),
        begun=None if decoding.begun is None else of_branches(decoding.begun, seats),
        drawn=Drawn(jnp.zeros(none.shape, jnp.int32), none, none, none),
    )
    spans = (leg.blocks + leg.span - 1) // leg.span

    def run_span(number: Any, state: tuple[Any, LegRows, Pages]) -> tuple[Any, LegRows, Pages]:
        step, rows, pages = state
        first, block = number * size, number * leg.span
        mine = jax.tree.map(lambda x: of_span(x, first, size), dataclasses.replace(rows, drawn=None))
        filled = leg.filled + step

        def of_blocks(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, block, leg.span)

        count = of_blocks(seats.count)
        reach = Reach(
            table=of_blocks(seats.table),
            count=count,
            filled=(count - 1) * sizes.slots + filled,
            running=jnp.clip(leg.blocks - block, 0, leg.span),
            first=of_span(seats.first, first, size),
            lane=of_span(seats.lane, first, size),
            row=seats.place[:, number],
            strip=seats.strip[:, number],
            strips=seats.strips[:, number],
            length=of_span(shared, first, size),
        )
        position = of_span(start, first, size) + mine.length
        hidden, pages = decode_token(
            model, placement, sizes, mine.last, position,
            context=branches.context, pages=pages, reach=reach, slot=filled,
        )  # fmt: skip
        keys = of_span(key, first, size)
        drawn = draw_rows(model, placement, hidden, position, keys, sampling)
        if heated is not None or rank is not None:
            hot, ranks = (None if x is None else of_span(x, first, size) for x in (heated, rank))
            drawn = draw_first(model, placement, hidden, position, keys, sampling, drawn, hot, ranks)
        ends_here, begun = jnp.any(drawn.token[..., None] == ends, axis=-1), mine.begun
        if branches.stops is not None and begun is not None:
            begun = state_after(branches.stops, begun, drawn.token)
            ends_here |= is_complete(branches.stops, begun)
        ended = mine.running & ends_here
        length = mine.length + mine.running
        after = LegRows(
            running=mine.running & ~ended & (length < of_span(limit, first, size)),
            last=drawn.token,
            length=length,
            stopped=mine.stopped | ended,
            begun=begun,
            drawn=Drawn(*(x[..., None] for x in drawn)),
        )

        def put(whole: Array, x: Array) -> Array:
            start = (0, first) if whole.ndim == 2 else (0, first, step)
            return jax.lax.dynamic_update_slice(whole, x.astype(whole.dtype), start)

        return step, jax.tree.map(put, rows, after), pages

    def step(state: tuple[Any, LegRows, Pages]) -> tuple[Any, LegRows, Pages]:
        number, rows, pages = state
        with jax.named_scope("spans"):
            _, rows, pages = jax.lax.fori_loop(0, spans, run_span, (number, rows, pages))
        return number + 1, rows, pages

    def unfinished(state: tuple[Any, LegRows, Pages]) -> Bool[Array, ""]:
        number, rows, _ = state
        return (jnp.max(jnp.sum(rows.running, axis=1)) > leg.leave) & (number < leg.until)

    with jax.named_scope("tokens"):
        steps, rows, pages = jax.lax.while_loop(unfinished, step, (jnp.int32(0), rows, decoding.pages))
    back = [
        to_branches(placement, old, new, seats)
        for old, new in (
            (decoding.running, rows.running),
            (decoding.last, rows.last),
            (decoding.rollouts.length, rows.length),
            (decoding.rollouts.stopped, rows.stopped),
        )
    ]
    running, last, length, stopped = back
    begun = decoding.begun
    if begun is not None and rows.begun is not None:
        begun = to_branches(placement, begun, rows.begun, seats)
    written = write_rows(placement, decoding.rollouts, rows, before, seats)
    decoding = Decoding(
        rollouts=dataclasses.replace(written, length=length, stopped=stopped),
        running=running,
        last=last,
        pages=pages,
        row_steps=decoding.row_steps + steps * spans * (size * before.shape[0]),
        begun=begun,
    )
    return decoding, steps
