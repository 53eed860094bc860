"""Where branches sit: the batch row of each, and the pages that hold what it has drawn.

All of it is decided on the host (schedule.py), from which branches run. The engine and the planner follow the
same decisions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.parallel.sizes import ceil_divide, next_multiple, next_power_of_two
from fr3e_jax.types import AnyArray, pytree

STRIP_ROWS = 64  # rows whose context is attended to at a time, if trajectories have fewer


@dataclasses.dataclass(eq=False)
class RowBlock:
    """Rows that decode together, of every part of the mesh.

    branch: int [P, B], the branch of its part that sits in each row, -1 where none does. first: int [P, B],
    the slot where the row's tokens begin. pages: their numbers in order; none while the block is set aside.
    held: how many pages it has, on the devices or set aside.
    """

    branch: np.ndarray
    first: np.ndarray
    pages: list[int]
    held: int
    number: int = 0
    """In the order in which blocks were begun."""


@pytree
class Seats:
    """Where branches sit while a leg decodes. A part has n trajectories of C branches, numbered n x C."""

    branch: Int32[AnyArray, "P R"]
    """The branch that sits in a row; 0 where none does."""
    taken: Bool[AnyArray, "P R"]
    """Whether a branch sits in a row."""
    row: Int32[AnyArray, "P branches"]
    """The row where a branch sits; 0 where it has none."""
    seated: Bool[AnyArray, "P branches"]
    """Whether a branch has a row."""
    first: Int32[AnyArray, "P R"]
    """The slot of its block where the tokens of a row begin."""
    table: Int32[AnyArray, "blocks most"]
    """The pages of each block in their order."""
    count: Int32[AnyArray, " blocks"]
    """Pages of each block, 0 where no block is."""
    lane: Int32[AnyArray, "P R"]
    """The place of a row in n x W among the rows of its span, by trajectory."""
    place: Int32[AnyArray, "P spans n W"]
    """The row of the span in each place; row 0 where none is."""
    strip: Int32[AnyArray, "P spans strips"]
    """The strips of trajectories that have rows in a span."""
    strips: Int32[AnyArray, "P spans"]
    """How many strips have rows in each span."""


def strip_size(n: int, width: int) -> int:
    """Count the trajectories of a strip: a divisor of n, so that a strip has about `STRIP_ROWS` rows."""
    most = max(STRIP_ROWS // width, 1)
    return max(size for size in range(1, min(n, most) + 1) if n % size == 0)


def seats_of(
    blocks: list[RowBlock], span: int, room: int, most: int, n: int, c: int, sizes: PageSizes
) -> Seats:
    """Write down where the branches of blocks sit, for the devices.

    Args:
      blocks: that run, in their order.
      span: blocks that run at a time. room: blocks that there may be. most: pages that a block may have.
      n: trajectories of a part. c: branches of each.
    """
    parts, size = blocks[0].branch.shape[0], sizes.rows
    room = next_multiple(room, span)
    rows, spans, of_span = room * size, room // span, span * size
    sits = np.full((parts, room, size), -1, np.int32)
    first = np.zeros((parts, room, size), np.int32)
    table, count = np.zeros((room, most), np.int32), np.zeros(room, np.int32)
    for number, block in enumerate(blocks):
        sits[:, number], first[:, number] = block.branch, block.first
        table[number, : len(block.pages)], count[number] = block.pages, len(block.pages)
    sitting = sits.reshape(parts, rows)
    width = min(c, of_span)
    each = strip_size(n, width)
    row, seated = np.zeros((parts, n * c), np.int32), np.zeros((parts, n * c), bool)
    lane = np.zeros((parts, rows), np.int32)
    place = np.zeros((parts, spans, n, width), np.int32)
    strip, strips = np.zeros((parts, spans, n // each), np.int32), np.zeros((parts, spans), np.int32)
    for part in range(parts):
        (taken,) = np.nonzero(sitting[part] >= 0)
        branch = sitting[part, taken]
        row[part, branch], seated[part, branch] = taken, True
        trajectory, where = branch // c, taken // of_span
        # The rank of a row among those of its trajectory in its span.
        order = np.lexsort((taken, trajectory, where))
        group = where[order] * n + trajectory[order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, int)
        rank = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
        taken, trajectory, where = taken[order], trajectory[order], where[order]
        lane[part, taken] = trajectory * width + rank
        place[part, where, trajectory, rank] = taken % of_span
        for number in range(spans):
            here = np.unique(trajectory[where == number] // each)
            strip[part, number, : len(here)], strips[part, number] = here, len(here)
    return Seats(
        branch=np.maximum(sitting, 0),
        taken=sitting >= 0,
        row=row,
        seated=seated,
        first=first.reshape(parts, rows),
        table=table,
        count=count,
        lane=lane,
        place=place,
        strip=strip,
        strips=strips,
    )


@pytree
class Leg:
    """A run of the decoding program, between two looks at which branches still run."""

    seats: Seats
    blocks: Int32[AnyArray, ""] | int
    """Blocks that run."""
    filled: Int32[AnyArray, ""] | int
    """Slots of the last page of every block that are filled when the leg begins."""
    until: Int32[AnyArray, ""] | int
    """Most tokens of the leg."""
    leave: Int32[AnyArray, ""] | int
    """The leg ends as soon as no part has more running branches."""
    span: int = dataclasses.field(metadata={"static": True})
    """Blocks that run through the layers at a time."""

    @property
    def rows(self) -> int:
        """Rows of a part that are computed for each token."""
        size = self.seats.branch.shape[1] // self.seats.table.shape[0]
        return ceil_divide(int(self.blocks), self.span) * self.span * int(size)


def map_leg(leg: Leg, by_part: Callable[[Any], Any], everywhere: Callable[[Any], Any]) -> Leg:
    """Replace the arrays and numbers of a leg of the host.

    Args:
      by_part: what becomes of an array whose first axis is parts. everywhere: of what all parts share.
    """
    seats: dict[str, Any] = {
        field.name: (everywhere if field.name in ("table", "count") else by_part)(x)
        for field in dataclasses.fields(leg.seats)
        for x in [getattr(leg.seats, field.name)]
    }
    names = ("blocks", "filled", "until", "leave")
    numbers: dict[str, Any] = {name: everywhere(np.int32(getattr(leg, name))) for name in names}
    return dataclasses.replace(leg, seats=dataclasses.replace(leg.seats, **seats), **numbers)


def place_leg(placement: Placement, leg: Leg) -> Leg:
    """Put a leg of the host on the mesh."""
    return map_leg(leg, placement.place_rows, placement.place)


def arrange_kept(
    kept: Bool[np.ndarray, "B R"], parts: int
) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Lay kept trajectories out so that each is in the mesh's part of its query.

    Args:
      kept: which base trajectories of each query are kept.
      parts: row parts of the mesh; they divide B.

    Returns:
      (query, trajectory, real: False where only padding).
    """
    per_part = kept.shape[0] // parts
    pieces = kept.reshape(parts, per_part, -1)
    n = next_power_of_two(int(pieces.sum(axis=(1, 2)).max()))
    query = np.repeat(np.arange(parts, dtype=np.int32) * per_part, n).reshape(parts, n)
    trajectory, real = np.zeros((parts, n), np.int32), np.zeros((parts, n), bool)
    for part, piece in enumerate(pieces):
        rows, columns = np.nonzero(piece)
        query[part, : len(rows)] += rows.astype(np.int32)
        trajectory[part, : len(rows)] = columns
        real[part, : len(rows)] = True
    return query.reshape(-1), trajectory.reshape(-1), real.reshape(-1)
