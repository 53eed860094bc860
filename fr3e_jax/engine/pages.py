"""KV caches of branches in pages, within a fixed amount of memory.

A block is a few batch rows that decode together. Their keys and values lie in pages: a page has the tokens of
all rows of a block over a few slots, in all layers. A block that decodes takes a page more whenever its last
one is full, and gives its pages back when its rows have stopped. So the memory of a round is what was
allocated before, whatever the lengths of answers are.

The tokens of a row end where its block is filled, and begin at a slot of the row's own (`first`). Rows of
different lengths can so share a block.

Axis letters beside those of the decoder: P parts of the mesh, n trajectories of a part, R rows of a part, B
rows of a block, T slots of a page.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float, Int32

from fr3e_jax.models.decoder import Decoder
from fr3e_jax.parallel.mesh import Placement, row_parts
from fr3e_jax.parallel.sizes import ceil_divide, next_multiple
from fr3e_jax.types import AnyArray, pytree

PAGE_AXES = ("layer", None, "batch", "kv_heads", None, None, "head_dim")
SUBLANES, LANES = 8, 128  # of a TPU, which lays arrays out in tiles of so many numbers


@dataclasses.dataclass(frozen=True)
class PageSizes:
    """How rows are divided into blocks, and their tokens into pages.

    rows: of a block. slots: of a page. spans: how many blocks may run through the layers at a time; each is a
    program. context: slots of what branches share that are attended to at a time. fixed: the rows that take
    as long to compute as reading all weights, by which the best span is chosen.
    """

    rows: int
    slots: int
    spans: tuple[int, ...]
    context: int
    fixed: int

    def fitted(self, branches: int) -> "PageSizes":
        """Make blocks no larger than so many branches need: rows that none sits in are read too."""
        return dataclasses.replace(self, rows=min(self.rows, next_multiple(branches, SUBLANES)))

    def blocks(self, branches: int) -> int:
        """Count the blocks that hold so many branches."""
        return ceil_divide(branches, self.rows)

    def pages(self, tokens: int) -> int:
        """Count the most pages of a block whose rows draw up to so many tokens, wherever they begin."""
        return ceil_divide(tokens + self.slots - 1, self.slots)

    def spans_of(self, blocks: int) -> tuple[int, ...]:
        """List the numbers of blocks that may run at a time where there are at most so many, ascending."""
        return tuple(sorted({min(span, blocks) for span in self.spans}))

    def best_span(self, running: int, blocks: int) -> int:
        """Choose how many blocks run at a time: what computes least, reading of weights included.

        Args:
          running: blocks that run. blocks: most that there are in this decoding.
        """
        spans = self.spans_of(blocks)
        return min(
            spans, key=lambda span: (ceil_divide(running, span) * (span * self.rows + self.fixed), -span)
        )


ON_TPU = PageSizes(rows=32, slots=128, spans=(2, 6, 20), context=1024, fixed=160)
ON_CPU = PageSizes(rows=16, slots=64, spans=(1, 2, 8), context=1024, fixed=8)


def sizes_for(platform: str) -> PageSizes:
    """Return the sizes for devices of a platform, as jax names it."""
    return ON_CPU if platform == "cpu" else ON_TPU


@pytree
class Pages:
    """Pages of all layers of the branches of all parts, in the dtype of the model."""

    key: Float[AnyArray, "L pages P K B T D"]
    value: Float[AnyArray, "L pages P K B T D"]


def empty_pages(model: Decoder, placement: Placement, sizes: PageSizes, count: int) -> Pages:
    """Make `count` pages of zeros in each part of the mesh."""
    config = model.config
    part = (row_parts(placement.mesh), config.num_key_value_heads, sizes.rows, sizes.slots, config.head_dim)
    zeros = jnp.zeros((config.num_hidden_layers, count, *part), model.dtype)
    return Pages(placement.shard(zeros, *PAGE_AXES), placement.shard(zeros, *PAGE_AXES))


def as_given(placement: Placement, x: Array) -> Array:
    """Have XLA lay an array out in memory as it lays pages out that are given to a program.

    Otherwise it lays pages out anew for storing, and back for reading, for each token. On a TPU the slots are
    innermost where a head does not fill the lanes.
    """
    order = list(range(x.ndim))
    if placement.mesh.devices.flat[0].platform == "tpu" and x.shape[-1] % LANES:
        order[-2:] = order[:-3:-1]
    return with_layout_constraint(x, Layout(tuple(order)))


def store_tokens(
    placement: Placement,
    pages: Pages,
    key: Float[Array, "L P R K D"],
    value: Float[Array, "L P R K D"],
    page: Int32[Array, " blocks"],
    running: Int32[Array, ""],
    slot: Int32[Array, ""],
) -> Pages:
    """Store the new keys and values of a span's rows, in all layers, each block in its last page.

    Args:
      page: of each block. running: how many blocks run; the first ones do. slot: of the page.
    """
    blocks = page.shape[0]

    def local(key: Any, value: Any, pages: tuple[Any, Any], page: Any, running: Any, slot: Any) -> Any:
        def stored(cache: Any, new: Any) -> Any:
            layers, _, rows, heads, width = new.shape
            by_block = new.reshape(layers, blocks, rows // blocks, heads, width)

            def one(number: Any, cache: Any) -> Any:
                block = jnp.swapaxes(by_block[:, number], 1, 2)[:, None, None, :, :, None]
                start = (0, page[number], 0, 0, 0, slot, 0)
                block = as_given(placement, block)
                return as_given(placement, jax.lax.dynamic_update_slice(cache, block, start))

            with jax.named_scope("stores"):
                return jax.lax.fori_loop(0, running, one, cache)

        return stored(pages[0], key), stored(pages[1], value)

    spec = placement.spec
    new, whole = spec("layer", "batch", None, "kv_heads", "head_dim"), spec(*PAGE_AXES)
    stored = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(new, new, (whole, whole), spec(), spec(), spec()),
        out_specs=(whole, whole),
        check_vma=False,
    )(key, value, (pages.key, pages.value), page, running, slot)
    return Pages(*stored)


def copy_rows(
    placement: Placement, pages: Pages, copies: Int32[Array, "P X 4"], count: Int32[Array, ""]
) -> Pages:
    """Copy rows of pages to others, in the order of the list.

    Args:
      copies: (page, row) of the source and of the target. count: how many of them are copied.
    """

    def local(pages: tuple[Any, Any], copies: Any, count: Any) -> Any:
        def copied(cache: Any) -> Any:
            layers, _, _, heads, _, slots, width = cache.shape

            def one(number: Any, cache: Any) -> Any:
                page, row, to_page, to_row = copies[0, number]
                size = (layers, 1, 1, heads, 1, slots, width)
                held = jax.lax.dynamic_slice(cache, (0, page, 0, 0, row, 0, 0), size)
                return jax.lax.dynamic_update_slice(cache, held, (0, to_page, 0, 0, to_row, 0, 0))

            with jax.named_scope("copies"):
                return jax.lax.fori_loop(0, count, one, cache)

        return tuple(map(copied, pages))

    spec = placement.spec
    whole = spec(*PAGE_AXES)
    copied = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=((whole, whole), spec("batch"), spec()),
        out_specs=(whole, whole),
        check_vma=False,
    )((pages.key, pages.value), copies, count)
    return Pages(*copied)
