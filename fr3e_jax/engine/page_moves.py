"""What happens to pages between two legs: rows move, and blocks are set aside and come back."""

import dataclasses
import functools

import jax
import numpy as np
from jax import Array
from jaxtyping import Int32

from fr3e_jax.engine.pages import Pages, copy_rows
from fr3e_jax.engine.schedule import Turn
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.types import AnyArray

COPIES_TOGETHER = 512  # rows of pages that are copied by a call

Aside = dict[int, list[Pages]]
"""Number of a block that is set aside -> its pages, in the memory of the host."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class PageMoves:
    """Copies rows between pages, and pages between devices and the memory of their hosts, on one mesh."""

    placement: Placement

    def before(self, turn: Turn, pages: Pages, aside: Aside) -> Pages:
        """Do with the pages what a turn asks for before its leg.

        Args:
          pages: are used up.
          aside: of the decoding; blocks that are set aside are put in, and those that come back taken out.
        """
        place, place_rows = self.placement.place, self.placement.place_rows
        for first in range(0, turn.copies.shape[1], COPIES_TOGETHER):
            some = turn.copies[:, first : first + COPIES_TOGETHER]
            count = some.shape[1]
            some = np.pad(some, ((0, 0), (0, COPIES_TOGETHER - count), (0, 0)))
            pages = self.copy(pages, place_rows(some), place(np.int32(count)))
        for number, held in turn.aside:
            aside[number] = [self.to_host(pages, page) for page in held]
        for number, held in turn.back:
            for page, kept in zip(held, aside.pop(number), strict=True):
                pages = self.put_page(pages, jax.tree.map(page_to_device, kept), place(np.int32(page)))
                jax.block_until_ready(pages)  # one page at a time is on its way
        return pages

    def to_host(self, pages: Pages, page: int) -> Pages:
        """Copy a page to the memory of the host, and wait, so that one page at a time is on its way."""
        taken = self.take_page(pages, self.placement.place(np.int32(page)))
        kept: Pages = jax.block_until_ready(jax.tree.map(page_to_host, taken))
        return kept

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("pages",))
    def copy(self, pages: Pages, copies: Int32[AnyArray, "P X 4"], count: Int32[AnyArray, ""]) -> Pages:
        """Copy rows of pages to others (`copy_rows`)."""
        return copy_rows(self.placement, pages, copies, count)

    @functools.partial(jax.jit, static_argnames=("self",))
    def take_page(self, pages: Pages, page: Int32[AnyArray, ""]) -> Pages:
        """Take a page out, as pages of which there is one."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, page, 1, axis=1), pages)

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("pages",))
    def put_page(self, pages: Pages, kept: Pages, page: Int32[AnyArray, ""]) -> Pages:
        """Put a page back in the place of another."""
        return jax.tree.map(
            lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, page, axis=1), pages, kept
        )


def page_to_host(x: Array) -> Array:
    """Move an array to the memory of the hosts that its devices are attached to."""
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def page_to_device(x: Array) -> Array:
    """Move an array back to the memory of its devices."""
    return jax.device_put(x, x.sharding.with_memory_kind("device"))
