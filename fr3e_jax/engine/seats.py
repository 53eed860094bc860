"""Which row of the decoding batch each branch sits in, decided on the host from who still runs.

Rows are flat: whichever trajectory a branch belongs to, it takes the next row of its part of the mesh, so
that no trajectory waits for another. Attention to what the branches of a trajectory share needs them side
by side again; that is a permutation of activations, not of caches. As branches stop, those that run move
together into fewer rows, and the place that is won goes to longer answers: rows x slots stays the same.
"""

import dataclasses

import jax
import numpy as np

from fr3e_jax.types import Leaf

FEWEST_ROWS = 8  # of a part: fewer save little, and each step down is a program
STEP_DOWN = 0.7  # a rung of the ladder is at most this share of the one above, so that there are few
TILE = 16  # slots are a multiple of it where there are many: what a TPU lays bfloat16 rows out in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seats:
    """Rows of each of the mesh's P row parts; a part has n trajectories of C branches, numbered n x C.

    branch: int32 [P, R], the branch that sits in a row; a row that is left over repeats another. row: int32
    [P, n x C], where a branch sits, 0 if nowhere. group: int32 [P, n, W], the rows of a trajectory's
    branches, and any others up to the most that one has. lane: int32 [P, R], place of a row in n x W.
    """

    branch: Leaf
    row: Leaf
    group: Leaf
    lane: Leaf

    @property
    def rows(self) -> int:
        """R, rows of a part."""
        return int(self.branch.shape[1])


def bucket(count: int) -> int:
    """`count` rounded up to two sizes per doubling: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return power // 4 * 3 if power >= 4 and count <= power // 4 * 3 else power


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
        """From the top down."""
        found = [self.rows]
        for rung in self.divisors:
            if FEWEST_ROWS <= rung <= STEP_DOWN * found[-1]:
                found.append(rung)
        return tuple(found)

    def below(self, rows: int) -> int:
        """The next rung, 0 from the lowest."""
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
        return rows, min(2 * slots, -(-self.max_new // unit) * unit) if full else slots


def take_seats(running: np.ndarray, rows: int) -> Seats:
    """Seat the running branches.

    Args:
      running: bool [P, n, C]. rows: of a part, at least as many as run in any.
    """
    parts, n, c = running.shape
    most = int(running.sum(axis=2).max(initial=1))
    # Twice the mean is seldom exceeded, and so the width follows from the rows: few programs.
    width = min(c, max(bucket(most), bucket(-(-2 * rows // n))))
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


def first_slots(max_new: int) -> int:
    """Slots of the branch cache to begin with.

    Where an answer may be long, most are much shorter. A twelfth is what a branch needs on average when all
    together need most, if the limit is ten times the median. More is won from rows that stop, and allocated
    where that is not enough. Short answers have room for half, since empty slots are read too, or whole: each
    growth is a program.
    """
    if max_new <= 128:
        return max_new
    share = 2 if max_new <= 256 else 12
    return -(-max_new // (share * TILE)) * TILE
