"""Attention of the rows of a span to their context, to their own pages, and to themselves.

The context of a trajectory is read once for all its rows in the span, a row's own pages once. Each device
computes its own heads of its own rows: nothing is exchanged.

Axis letters beside those of the decoder: P parts of the mesh, n trajectories of a part, R rows of the span, W
rows that a trajectory may have in it, B rows of a block, T slots of a page.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from fr3e_jax.engine.pages import PAGE_AXES, Pages, PageSizes
from fr3e_jax.models.attention import MASKED, Partial, Segment
from fr3e_jax.models.decoder import cache_axes
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.parallel.sizes import ceil_divide


class Reach(NamedTuple):
    """What the R rows of a span attend to, of each part.

    The context of a trajectory is read once for all its rows in the span. Trajectories are gone through in
    strips of a few that follow each other.
    """

    table: Int32[Any, "blocks most"]
    """The pages of each block in their order; the same in all parts."""
    count: Int32[Any, " blocks"]
    """How many pages of the table each block has."""
    filled: Int32[Any, " blocks"]
    """Slots of each block that are filled; the next is the one to fill."""
    running: Int32[Any, ""]
    """How many blocks of the span run; the first ones do."""
    first: Int32[Any, "P R"]
    """The slot where the tokens of each row begin."""
    lane: Int32[Any, "P R"]
    """The place of each row in n x W, rows by trajectory."""
    row: Int32[Any, "P n W"]
    """The row in each place, 0 where none is."""
    strip: Int32[Any, "P strips"]
    """The strips that have rows in the span, and any numbers after them."""
    strips: Int32[Any, " P"]
    """How many strips of each part have rows in the span."""
    length: Int32[Any, "P R"]
    """How much of the context of its trajectory a row sees."""


@runtime_checkable
class Pick(Protocol):
    """Takes the key-value heads that a device needs of those that it holds, along an axis."""

    def __call__(self, x: Any, *, axis: int) -> Any:
        """Return the heads that are needed of x, whose axis of heads is `axis`."""


def as_it_is(x: Any, *, axis: int) -> Any:
    """Return all heads, where each device holds those that it needs."""
    return x


def combine(a: Partial, b: Partial) -> Partial:
    """Join attention to two parts, not yet normalised."""
    top = jnp.maximum(a.top, b.top)
    left, right = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Partial(
        top, left * a.total + right * b.total, left[..., None] * a.output + right[..., None] * b.output
    )


def partial_of(
    query: Float[Array, "*b G D"], key: Float[Array, "*b S D"], value: Float[Array, "*b S D"], mask: Any
) -> Partial:
    """Attend from the queries of a key-value head to some slots; scores and sums are float32.

    Args:
      mask: which slots are seen, of the shape of the scores [*b, G, S] or one that is broadcast to it.
    """
    batch = tuple(range(query.ndim - 2))
    last = query.ndim - 1
    score = jax.lax.dot_general(
        query, key, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.float32
    )
    score = jnp.where(mask, score * query.shape[-1] ** -0.5, MASKED)
    top = jnp.max(score, axis=-1)
    weight = jnp.exp(score - top[..., None]).astype(value.dtype)
    if weight.dtype != score.dtype:  # made once, in half of the memory of the scores
        weight = jax.lax.optimization_barrier(weight)
    output = jax.lax.dot_general(
        weight,
        value,
        (((last,), (last - 1,)), (batch, batch)),
        preferred_element_type=jnp.float32,
    )
    return Partial(top, jnp.sum(weight, axis=-1, dtype=jnp.float32), output)


def attend_span(
    placement: Placement,
    sizes: PageSizes,
    layer: Int32[Array, ""],
    query: Float[Array, "P R H D"],
    key: Float[Array, "P R K D"],
    value: Float[Array, "P R K D"],
    pages: Pages,
    context: Segment,
    reach: Reach,
) -> Float[Array, "P R H D"]:
    """Attend from the next token of each row to its context, to its own tokens before, and to itself.

    Each device computes its own heads of its own rows: nothing is exchanged.

    Args:
      layer: index of the layer.
      query, key, value: of the rows' next tokens; the result has their dtype.
      pages: with what the rows have drawn.
      context: keys and values [L, N, K, S, D] that the rows of a trajectory share.
      reach: what is seen.
    """
    spec = placement.spec
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    by_row = spec("batch", None, "heads", None)
    kv_by_row = spec("batch", None, "kv_heads", None)
    by_part, everywhere = spec("batch"), spec()
    few = placement.table["kv_heads"] is None and placement.table["heads"] is not None
    axis = placement.table["heads"]

    def local(layer: Any, query: Any, key: Any, value: Any, pages: Any, shared: Any, reach: Reach) -> Array:
        own_heads = query.shape[2]
        pick: Pick = as_it_is
        if few and own_heads < heads:
            # Every device has all key-value heads, and takes those that its query heads belong to.
            head = jax.lax.axis_index(axis) * own_heads
            if groups % own_heads == 0:
                pick = functools.partial(
                    jax.lax.dynamic_slice_in_dim, start_index=head // groups, slice_size=1
                )
            else:
                pick = functools.partial(jnp.take, indices=(head + jnp.arange(own_heads)) // groups)
        return attend_local(sizes, layer, query[0], key[0], value[0], pages, shared, reach, pick)[None]

    replicated = Reach(
        everywhere, everywhere, everywhere, everywhere, by_part, by_part, by_part, by_part, by_part, by_part
    )
    page, shared = spec(*PAGE_AXES), spec(*cache_axes("batch"))
    return jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(everywhere, by_row, kv_by_row, kv_by_row, (page, page), (shared, shared), replicated),
        out_specs=by_row,
        check_vma=False,
    )(layer, query, key, value, (pages.key, pages.value), (context.key, context.value), reach)


def attend_local(
    sizes: PageSizes,
    layer: Any,
    query: Any,
    key: Any,
    value: Any,
    pages: tuple[Any, Any],
    shared: tuple[Any, Any],
    reach: Reach,
    pick: Pick,
) -> Float[Array, "R H D"]:
    """`attend_span` on one device: arrays have no axis of parts, but for `reach`, pages and context."""
    rows, heads, width = query.shape
    key, value = pick(key, axis=1), pick(value, axis=1)
    by_head = query.reshape(rows, key.shape[1], -1, width)
    itself = partial_of(by_head, key[:, :, None], value[:, :, None], True)
    own = attend_pages(sizes, layer, by_head, pages, reach, pick)
    before = attend_context(sizes, layer, by_head, shared, reach, pick)
    joined = combine(combine(itself, own), before)
    return (joined.output / joined.total[..., None]).reshape(rows, heads, width).astype(query.dtype)


def nothing(*shape: int) -> Partial:
    """Attention to nothing; the last size is D."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Partial(zeros[..., 0] + MASKED, zeros[..., 0], zeros)


def attend_pages(
    sizes: PageSizes, layer: Any, query: Any, pages: tuple[Any, Any], reach: Reach, pick: Pick
) -> Partial:
    """Attend from the rows to their own tokens, block by block and page by page."""
    rows, heads, groups, width = query.shape
    blocks, size, slots = reach.table.shape[0], sizes.rows, sizes.slots
    by_block = jnp.einsum("bikgd->bkigd", query.reshape(blocks, size, heads, groups, width))
    first = reach.first[0].reshape(blocks, size)
    keys, values = pages

    def page_of(cache: Any, page: Any) -> Float[Array, "K B T D"]:
        start = (layer, page, *(0,) * (cache.ndim - 2))
        return pick(jax.lax.dynamic_slice(cache, start, (1, 1, *cache.shape[2:]))[0, 0, 0], axis=0)

    def block(number: Any, found: Partial) -> Partial:
        def page(at: Any, before: Partial) -> Partial:
            with jax.named_scope("page"):
                slot = at * slots + jnp.arange(slots)[None]
                seen = (slot >= first[number][:, None]) & (slot < reach.filled[number])
                where = reach.table[number, at]
                part = partial_of(
                    by_block[number], page_of(keys, where), page_of(values, where), seen[None, :, None]
                )
                return combine(before, part)

        with jax.named_scope("pages"):
            one = jax.lax.fori_loop(0, reach.count[number], page, nothing(heads, size, groups, width))
        return jax.tree.map(lambda whole, x: whole.at[number].set(x), found, one)

    with jax.named_scope("blocks"):
        found = jax.lax.fori_loop(0, reach.running, block, nothing(blocks, heads, size, groups, width))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2).reshape(rows, *x.shape[1:2], *x.shape[3:]), found)


def attend_context(
    sizes: PageSizes, layer: Any, query: Any, shared: tuple[Any, Any], reach: Reach, pick: Pick
) -> Partial:
    """Attend from the rows to what those of a trajectory share, a strip of trajectories at a time."""
    heads, groups, width = query.shape[1:]
    lanes, strips = reach.row[0], reach.strip[0]
    n, wide = lanes.shape
    each = n // strips.shape[0]
    keys, values = shared
    slots = keys.shape[3]
    tile = ceil_divide(slots, ceil_divide(slots, sizes.context))
    grouped = query[lanes.reshape(-1)].reshape(n, wide, heads, groups, width)
    grouped = jnp.einsum("nwkgd->nkwgd", grouped).reshape(n, heads, wide * groups, width)
    length = reach.length[0][lanes.reshape(-1)].reshape(n, wide)
    # A place that no row is in sees nothing: its row is in another.
    own = reach.lane[0][lanes.reshape(-1)].reshape(n, wide) == jnp.arange(n * wide).reshape(n, wide)
    length = jnp.where(own, length, 0)

    def strip(at: Any, found: Partial) -> Partial:
        first = strips[at] * each
        of_strip = jax.lax.dynamic_slice_in_dim(grouped, first, each)
        seen = jax.lax.dynamic_slice_in_dim(length, first, each)

        def tile_of(cache: Any, start: Any) -> Float[Array, "each K S D"]:
            at = (layer, first, 0, start, 0)
            sizes = (1, each, cache.shape[2], tile, width)
            return pick(jax.lax.dynamic_slice(cache, at, sizes)[0], axis=1)

        def part(number: Any, before: Partial) -> Partial:
            with jax.named_scope("tile"):
                # The last tile begins earlier where it would end behind the last slot.
                start = jnp.minimum(number * tile, slots - tile)
                slot = start + jnp.arange(tile)[None, None]
                mask = (slot >= number * tile) & (slot < seen[:, :, None])
                mask = jnp.repeat(mask, groups, axis=1)[:, None]
                return combine(
                    before, partial_of(of_strip, tile_of(keys, start), tile_of(values, start), mask)
                )

        empty = nothing(each, heads, wide * groups, width)
        if tile == slots:
            one = part(0, empty)
        else:
            with jax.named_scope("tiles"):
                one = jax.lax.fori_loop(0, (jnp.max(seen) + tile - 1) // tile, part, empty)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return jax.tree.map(lambda whole, x: put(whole, x), found, one)

    with jax.named_scope("strips"):
        found = jax.lax.fori_loop(0, reach.strips[0], strip, nothing(n, heads, wide * groups, width))

    def by_row(x: Any) -> Any:
        x = jnp.moveaxis(x.reshape(n, heads, wide, groups, *x.shape[3:]), 2, 1)
        return x.reshape(n * wide, *x.shape[2:])[reach.lane[0]]

    return jax.tree.map(by_row, found)
