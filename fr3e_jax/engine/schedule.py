"""The schedule of a decoding: when branches begin, when rows move together, and who waits for memory.

Branches begin in their order, a block of rows at a time, as long as pages are free. As branches stop, the
others move together into fewer blocks (compaction). Where a block needs a page and none is free, the youngest
block is set aside: its pages go to the memory of the host, and come back when others have stopped. So every
branch ends, whatever the number of pages is, as long as one block fits alone.

All of it is decided on the host, from which branches run. Engine and planner follow the same schedule.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.seats import Leg, RowBlock, seats_of

LEAVE_SHARE = 8  # a leg ends when this part of its blocks, or one, can be given back


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is done before a leg, and the leg.

    copies: int32 [P, X, 4], (page, row) of the source and of the target of rows that move, which are copied
    first. aside: (number of the block, its pages), which go to the host's memory next. back: (number of the
    block, its pages), which come back from the host's memory last. first: whether a branch draws its first
    token in the leg.
    """

    leg: Leg
    copies: Int32[np.ndarray, "P X 4"]
    aside: tuple[tuple[int, tuple[int, ...]], ...]
    back: tuple[tuple[int, tuple[int, ...]], ...]
    first: bool


@dataclasses.dataclass(frozen=True)
class Room:
    """What a decoding has room for on each part of the mesh.

    n: trajectories. c: branches of each. max_new: most tokens of a branch. pages: that are allocated. drawn:
    most branches that decode at the same time, where others wait until blocks are free; None: all n x c.
    """

    sizes: PageSizes
    n: int
    c: int
    max_new: int
    pages: int
    drawn: int | None = None

    def __post_init__(self) -> None:
        """Let blocks be no larger than the branches need."""
        object.__setattr__(self, "sizes", self.sizes.fitted(self.n * self.c))

    @property
    def most(self) -> int:
        """Pages that a block may come to hold, when a row of it reaches the limit."""
        return self.sizes.pages(self.max_new)

    @property
    def blocks(self) -> int:
        """Most blocks that run at a time."""
        return min(self.sizes.blocks(self.most_drawn), self.pages)

    @property
    def useful(self) -> int:
        """Most pages that the branches of a part can come to need."""
        return self.sizes.blocks(self.most_drawn) * self.most

    @property
    def most_drawn(self) -> int:
        """Most branches of a part that are drawn at a time."""
        return self.n * self.c if self.drawn is None else min(self.drawn, self.n * self.c)


class Schedule:
    """Decides the legs of a decoding, each from how the one before has ended."""

    def __init__(
        self,
        room: Room,
        limit: Int32[np.ndarray, "P branches"],
        every: int | None = None,
        first_alone: bool = False,
        may_run: int = 0,
    ) -> None:
        """Begin a decoding.

        Args:
          limit: most tokens of each branch, or any positive number; 0: it is never begun.
          every: tokens between two looks at what was generated, 1 before the first; None looks where needed.
          first_alone: whether the first token of a branch is a leg of its own.
          may_run: most branches, of all parts together, that may still run at the end.
        """
        if room.pages < room.most:
            raise ValueError(f"{room.pages} pages do not hold a block of up to {room.most}")
        self.room, self.every, self.first_alone, self.may_run = room, every, first_alone, may_run
        self.free = list(range(room.pages))[::-1]
        self.blocks, self.aside = list[RowBlock](), list[RowBlock]()
        self.filled, self.begun, self.looked = 0, 0, False
        parts = limit.shape[0]
        waiting = [np.flatnonzero(limit[part] > 0) for part in range(parts)]
        most = max((len(x) for x in waiting), default=0)
        self.waiting = np.full((parts, most), -1, np.int32)
        for part, branches in enumerate(waiting):
            self.waiting[part, : len(branches)] = branches

    @property
    def done(self) -> bool:
        """Whether enough branches have stopped, those that waited and those set aside included."""
        begun = sum(int((block.branch >= 0).sum()) for block in self.blocks + self.aside)
        return begun + int((self.waiting >= 0).sum()) <= self.may_run

    def end(self, running: Bool[np.ndarray, "P branches"], tokens: int) -> None:
        """Take note of how a leg has ended.

        Args:
          running: branches that have not stopped, those that wait included. tokens: of the leg.
        """
        self.filled += tokens
        self.looked |= tokens > 0
        for block in self.blocks:
            sits = np.maximum(block.branch, 0)
            still = np.take_along_axis(running, sits, axis=1) & (block.branch >= 0)
            block.branch = np.where(still, block.branch, -1)
        for block in [block for block in self.blocks if (block.branch < 0).all()]:
            self.give_back(block)

    def give_back(self, block: RowBlock) -> None:
        """Take the pages of a block whose rows have left."""
        self.free += block.pages[::-1]
        self.blocks.remove(block)

    def next(self) -> Turn:
        """Decide the next leg, with what is done before it."""
        sizes = self.room.sizes
        for block in self.blocks:
            self.trim(block)
        copies = self.compact()
        aside = list[tuple[int, tuple[int, ...]]]()
        back = list[tuple[int, tuple[int, ...]]]()
        if not self.blocks:
            self.filled = 0
        if self.filled == sizes.slots:
            self.filled = 0
            aside = self.turn_pages()
        if self.filled == 0:
            back = self.take_up()
        first = self.begin_blocks()
        self.blocks.sort(key=lambda block: (-len(block.pages), block.number))
        count = len(self.blocks)
        span = sizes.best_span(count, self.room.blocks)
        until = sizes.slots - self.filled
        if self.every is not None:
            until = min(until, self.every if self.looked else 1)
        if first and self.first_alone:
            until = 1
        leave = sizes.rows * (count - max(1, count // LEAVE_SHARE))
        if not (self.aside or self.waiting.shape[1]):
            leave = max(leave, self.may_run // len(self.waiting))
        leave = min(leave, self.running - 1)
        seats = seats_of(self.blocks, span, self.room.blocks, self.room.most, self.room.n, self.room.c, sizes)
        leg = Leg(seats, blocks=count, filled=self.filled, until=until, leave=leave, span=span)
        return Turn(leg, copies, tuple(aside), tuple(back), first)

    @property
    def running(self) -> int:
        """Branches of the fullest part that run."""
        return int(np.max(sum((block.branch >= 0).sum(axis=1) for block in self.blocks)))

    def trim(self, block: RowBlock) -> None:
        """Give back the first pages of a block, where none of its rows has tokens any more."""
        slots = self.room.sizes.slots
        empty = int(block.first[block.branch >= 0].min()) // slots
        self.free += block.pages[:empty][::-1]
        block.pages, block.held = block.pages[empty:], block.held - empty
        block.first = np.maximum(block.first - empty * slots, 0)

    def compact(self) -> Int32[np.ndarray, "P X 4"]:
        """Move rows of the youngest blocks into rows that are free in older ones, where blocks become empty.

        Returns:
          The copies, those of parts with fewer filled up with such that change nothing.
        """
        parts = len(self.waiting)
        if len(self.blocks) < 2:
            return np.zeros((parts, 0, 4), np.int32)
        self.blocks.sort(key=lambda block: (-len(block.pages), block.number))
        fewest = self.room.sizes.blocks(self.running)
        targets, sources = self.blocks[:fewest], self.blocks[fewest:]
        found = [list[tuple[int, int, int, int]]() for _ in range(parts)]
        for part in range(parts):
            holes = [(block, int(row)) for block in targets for row in np.flatnonzero(block.branch[part] < 0)]
            for source in sources:
                for row in np.flatnonzero(source.branch[part] >= 0):
                    target, hole = holes.pop(0)
                    self.move(part, source, int(row), target, hole, found[part])
        for source in sources:
            self.give_back(source)
        most = max(map(len, found))
        copies = np.zeros((parts, most, 4), np.int32)
        for part, rows in enumerate(found):
            copies[part, : len(rows)] = np.array(rows, np.int32).reshape(-1, 4)
        return copies

    def move(
        self,
        part: int,
        source: RowBlock,
        row: int,
        target: RowBlock,
        hole: int,
        copies: list[tuple[int, int, int, int]],
    ) -> None:
        """Move a row into a block that is as old or older: its tokens end where that is filled."""
        shift = len(target.pages) - len(source.pages)
        target.branch[part, hole] = source.branch[part, row]
        target.first[part, hole] = source.first[part, row] + shift * self.room.sizes.slots
        source.branch[part, row] = -1
        begin = int(target.first[part, hole]) // self.room.sizes.slots
        for number in range(begin, len(target.pages)):
            copies.append((source.pages[number - shift], row, target.pages[number], hole))

    def turn_pages(self) -> list[tuple[int, tuple[int, ...]]]:
        """Give every block a page more; the youngest are set aside where there are not enough."""
        aside = []
        while len(self.free) < len(self.blocks):
            block = self.blocks.pop()
            aside.append((block.number, tuple(block.pages)))
            self.free += block.pages[::-1]
            block.pages = []
            self.aside.append(block)
        for block in self.blocks:
            block.pages.append(self.free.pop())
            block.held = len(block.pages)
        return aside

    def take_up(self) -> list[tuple[int, tuple[int, ...]]]:
        """Bring blocks back that were set aside, the first of them first, where they fit with a page more.

        Each block that runs has a page in reserve, or one would soon be set aside again.
        """
        back = []
        for block in sorted(self.aside, key=lambda block: (-block.held, block.number)):
            if len(self.blocks) >= self.room.blocks:
                break
            if self.blocks and len(self.free) < block.held + 1 + len(self.blocks) + 1:
                break
            block.pages = [self.free.pop() for _ in range(block.held)]
            back.append((block.number, tuple(block.pages)))
            block.pages.append(self.free.pop())
            block.held += 1
            self.aside.remove(block)
            self.blocks.append(block)
        return back

    def begin_blocks(self) -> bool:
        """Begin blocks of branches that wait, where there are pages; tell whether any was begun."""
        size, before = self.room.sizes.rows, len(self.blocks)
        scarce = self.room.pages < self.room.useful  # then each block that runs has a page in reserve
        while self.waiting.shape[1] and len(self.blocks) < self.room.blocks and not self.aside:
            if self.blocks and scarce and len(self.free) < 2 + len(self.blocks):
                break
            branch, self.waiting = self.waiting[:, :size], self.waiting[:, size:]
            branch = np.pad(branch, ((0, 0), (0, size - branch.shape[1])), constant_values=-1)
            first = np.full_like(branch, self.filled)
            self.blocks.append(RowBlock(branch, first, [self.free.pop()], 1, self.begun))
            self.begun += 1
        return len(self.blocks) > before
