"""The schedule of a decoding: which batch row each branch sits in, and when rows move together.

A row belongs to no trajectory: a branch takes the next row of its part of the mesh, so that no trajectory
waits for another. Attention to what the branches of a trajectory share needs them side by side again. That is
a permutation of activations, not of KV caches. As branches stop, those that run move together into fewer rows
(compaction). The memory that becomes free goes to longer answers: rows x slots stays the same.

All of it is decided on the host from which branches run. The engine and the planner follow the same schedule.
"""

import dataclasses
from collections.abc import Generator

import numpy as np
from jaxtyping import Bool, Int32

from fr3e_jax.parallel.sizes import ceil_divide, next_multiple, next_power_of_two, two_per_doubling
from fr3e_jax.types import AnyArray, pytree

FEWEST_ROWS = 8  # of a part: fewer rows save little, and each step down is a program
STEP_DOWN = 0.7  # a rung of the ladder is at most this share of the one above, so that there are few
TILE = 16  # many slots are a multiple of it: a TPU lays bfloat16 rows out in tiles of 16


@pytree
class Seats:
    """The R rows of each of the mesh's P parts; a part has n trajectories of C branches, numbered n x C."""

    branch: Int32[AnyArray, "P R"]
    """The branch that sits in a row; a row that is left over repeats another."""
    row: Int32[AnyArray, "P branches"]
    """The row where a branch sits, 0 if nowhere."""
    group: Int32[AnyArray, "P n W"]
    """The rows of a trajectory's branches, and any others up to the W that the widest one has."""
    lane: Int32[AnyArray, "P R"]
    """The place of a row in n x W."""

    @property
    def rows(self) -> int:
        """R, rows of a part."""
        return int(self.branch.shape[1])


def take_seats(running: Bool[np.ndarray, "P n C"], rows: int) -> Seats:
    """Seat the running branches.

    Args:
      running: which branches run.
      rows: of a part, at least as many as branches run in any.
    """
    parts, n, c = running.shape
    most = int(running.sum(axis=2).max(initial=1))
    # Twice the mean is seldom exceeded, and so the width follows from the rows: few programs.
    width = min(c, max(two_per_doubling(most), two_per_doubling(ceil_divide(2 * rows, n))))
    branch, lane = np.zeros((parts, rows), np.int32), np.zeros((parts, rows), np.int32)
    row, group = np.zeros((parts, n * c), np.int32), np.zeros((parts, n, width), np.int32)
    rank = np.cumsum(running, axis=2) - 1
    for part in range(parts):
        trajectory, column = np.nonzero(running[part])
        here = np.arange(len(trajectory))
        at = rank[part, trajectory, column]
        branch[part, here] = trajectory * c + column
        branch[part, len(here) :] = branch[part, 0]
        row[part, branch[part, here]] = here
        group[part, trajectory, at] = here
        lane[part, here] = trajectory * width + at
        lane[part, len(here) :] = lane[part, 0]
    return Seats(branch, row, group, lane)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The numbers of rows that a part may go on with, each with a program of its own.

    rows, slots: to begin with. max_new: most slots that can come to be needed.

    The rungs divide the cache, so that it can be divided anew in place.
    """

    rows: int
    slots: int
    max_new: int

    @property
    def divisors(self) -> tuple[int, ...]:
        """Numbers of rows that the cache can be divided into, from the top down."""
        units = self.rows * self.slots // (1 if self.slots % TILE else TILE)
        return tuple(n for n in range(self.rows, 0, -1) if units % n == 0)

    @property
    def rungs(self) -> tuple[int, ...]:
        """The numbers of rows, from the top down."""
        rungs = [self.rows]
        for rung in self.divisors:
            if FEWEST_ROWS <= rung <= STEP_DOWN * rungs[-1]:
                rungs.append(rung)
        return tuple(rungs)

    def below(self, rows: int) -> int:
        """The next rung below `rows`, 0 from the lowest."""
        return max((rung for rung in self.rungs if rung < rows), default=0)

    def next(self, running: int, rows: int, slots: int, full: bool) -> tuple[int, int]:
        """The rows of a part and the slots of each to go on with.

        Args:
          running: branches of the fullest part. rows, slots: as they are. full: no slot is free.
        """
        fewest = min(rung for rung in self.rungs if rung >= running)
        if full and fewest >= rows:  # rather a step between the rungs than a larger cache
            fewest = min(n for n in self.divisors if n >= max(running, min(FEWEST_ROWS, rows)))
        if fewest < rows:
            return fewest, rows * slots // fewest
        # Whole multiples of the first cache, whatever the limit, or not every rung would divide it.
        unit = self.rows * self.slots // rows
        return rows, min(2 * slots, next_multiple(self.max_new, unit)) if full else slots


def first_slots(max_new: int) -> int:
    """Slots of each row of the branch cache to begin with.

    Where an answer may be long, most are much shorter. A twelfth is what a branch needs on average when all
    together need most, if the limit is ten times the median. More is won from rows that stop, and allocated
    where that is not enough. Short answers have room for half, since empty slots are read too, or whole: each
    growth is a program.
    """
    if max_new <= 128:
        return max_new
    share = 2 if max_new <= 256 else 12
    return ceil_divide(max_new, share * TILE) * TILE


@pytree
class Leg:
    """A run of the decoding program, between two looks at which branches still run."""

    seats: Seats
    """Where the running branches sit."""
    origin: Int32[AnyArray, "P R"] | None
    """The row that holds each row's KV cache before the leg, or None where the cache stays as it is."""
    until: Int32[AnyArray, ""] | int
    """The leg ends when so many slots are filled."""
    leave: Int32[AnyArray, ""] | int
    """The leg ends as soon as no part has more running branches."""
    before: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """Rows of a part, and slots of each, before the leg."""
    slots: int = dataclasses.field(metadata={"static": True})
    """Slots of each row in the leg."""

    @property
    def rows(self) -> int:
        """R, rows of a part."""
        return self.seats.rows

    @property
    def moves(self) -> bool:
        """Whether rows move together, or the cache grows, before the leg."""
        return self.origin is not None

    @property
    def size(self) -> int:
        """Slots of all rows of a part in the leg."""
        return self.rows * self.slots

    @property
    def size_before(self) -> int:
        """Slots of all rows of a part before the leg."""
        rows, slots = self.before
        return rows * slots

    @property
    def cache(self) -> int:
        """Slots of all rows of a part that are allocated at a time.

        A cache that grows and what it grew from are there together.
        """
        return self.size if self.size == self.size_before else self.size + self.size_before


LegEnd = tuple[Bool[np.ndarray, "P n C"], int]
"""Which branches run when a leg ends, and how many slots are filled."""


def schedule(
    shape: tuple[int, int, int],
    slots: int,
    max_new: int,
    compact: bool = True,
    every: int | None = None,
    first_alone: bool = False,
) -> Generator[Leg, LegEnd, None]:
    """Decide the legs of a decoding, each from how the one before has ended.

    Args:
      shape: P parts, n trajectories of a part, C branches of each; all of them run.
      slots: of each row to begin with.
      max_new: most tokens of a branch.
      compact: whether rows move together as branches stop.
      every: tokens between two looks at what was generated, 1 before the first; None looks at the end, and
        before each move.
      first_alone: whether the first token is a leg of its own, since another program draws it.

    Yields:
      Legs, on the host. Send how each has ended; the schedule ends when no branch runs.
    """
    rows, filled = shape[1] * shape[2], 0
    ladder = Ladder(rows, slots, max_new)
    seats, origin, before = take_seats(np.ones(shape, bool), rows), None, (rows, slots)
    while True:
        window = min(slots, max_new)
        until = window if every is None else min(window, filled + every)
        if not filled and (first_alone or every is not None):
            until = 1
        leave = ladder.below(rows) if compact else 0
        running, filled = yield Leg(seats, origin, until=until, leave=leave, before=before, slots=slots)
        if not running.any():
            return
        origin, before = None, (rows, slots)
        fullest = int(running.sum(axis=(1, 2)).max()) if compact else rows
        rows, slots = ladder.next(fullest, rows, slots, filled == slots)
        if (rows, slots) != before:
            seats_before = seats
            seats = take_seats(running, rows) if compact else seats
            origin = np.take_along_axis(seats_before.row, seats.branch, axis=1)


def arrange_kept(
    kept: Bool[np.ndarray, "B R"], parts: int
) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Lay kept trajectories out so that each is in the mesh's part of its query, whose caches it needs.

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
