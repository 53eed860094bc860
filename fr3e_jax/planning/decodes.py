"""What the decodings of a step compute: the engine's own schedule, run without a device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fr3e_jax.engine.schedule import Room, Schedule, Turn
from fr3e_jax.engine.seats import Leg
from fr3e_jax.parallel.sizes import ceil_divide

LOOPS = ("tokens", "spans", "blocks", "pages", "strips", "tiles", "stores")
"""The loops of the decoding program whose number of runs a leg decides, by name, outer ones first."""


@dataclasses.dataclass(frozen=True)
class LegWork:
    """What a leg computes, of a part where nothing else is said.

    steps: tokens. span: blocks that run through the layers at a time. spans: that run for each token. rows:
    of them all. blocks: that run. pages: of all blocks. strips: of trajectories whose context is attended to,
    over all spans. tiles: of the context, over all strips. copies: rows of pages that are copied before.
    moved: pages that go to the host's memory before, or come back from it.
    """

    steps: int
    span: int
    spans: int
    rows: int
    blocks: int
    pages: int
    strips: int
    tiles: int
    copies: int = 0
    moved: int = 0

    def times(self, name: str) -> float:
        """How often a loop's body runs in the leg; within the layers, in each of them."""
        each = {
            "tokens": 1,
            "spans": self.spans,
            "blocks": self.blocks,
            "pages": self.pages,
            "strips": self.strips,
            "tiles": self.tiles,
            "stores": self.blocks,
        }
        return float(self.steps * each[name])


def runs_of(work: LegWork) -> dict[str, float]:
    """How often each loop runs every time that it is come to, on average."""
    inside = {
        "tokens": 1,
        "spans": work.steps,
        "blocks": work.steps * work.spans,
        "pages": work.steps * work.blocks,
        "strips": work.steps * work.spans,
        "tiles": work.steps * work.strips,
        "stores": work.steps * work.spans,
    }
    return {name: work.times(name) / max(inside[name], 1) for name in LOOPS}


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decoding: its branches, and the legs that it takes.

    lengths: int [P, n, C], tokens of each branch; 0 where there is none. left: those of them that are not
    drawn when the decoding ends. room: blocks and pages. slots: of what the branches of a trajectory share.
    legs: what each computes. examples: the first leg of each number of blocks in a span, which is compiled
    as one program.
    """

    lengths: np.ndarray
    left: np.ndarray
    room: Room
    slots: int
    legs: tuple[LegWork, ...]
    examples: Mapping[int, Leg]

    @property
    def tokens(self) -> int:
        """Number of tokens that are generated, on all parts."""
        return int(self.lengths.sum() - self.left.sum())

    @property
    def trajectories(self) -> int:
        """Number of trajectories that have branches, of the part that has most of them."""
        return int((self.lengths > 0).any(axis=2).sum(axis=1).max())

    @property
    def row_steps(self) -> int:
        """Number of rows that are decoded, summed over tokens, idle rows included, on all parts."""
        return sum(leg.rows * leg.steps for leg in self.legs) * len(self.lengths)

    @functools.cached_property
    def typical(self) -> LegWork:
        """The leg whose program stands for all: of the span that most rows run in, the one with most rows."""
        rows = dict.fromkeys(self.examples, 0)
        for leg in self.legs:
            rows[leg.span] += leg.rows * leg.steps
        span = max(rows, key=lambda span: rows[span])
        return max((leg for leg in self.legs if leg.span == span), key=lambda leg: leg.rows)


def decode_of(
    lengths: np.ndarray,
    room: Room,
    context: Any = 1,
    slots: int = 1,
    first_alone: bool = False,
    may_run: int = 0,
) -> Decode:
    """The legs that `Engine.decode` would run for branches of these lengths, without a device.

    Args:
      lengths: int [P, n, C], number of tokens that each branch has to generate; 0 where there is none.
      room: blocks and pages.
      context: int, of the shape of lengths or one that is broadcast to it: how much of what a trajectory's
        branches share each branch sees.
      slots: of what they share.
      first_alone: as for `Schedule`.
      may_run: most branches that may still run at the end, as for `Schedule`.
    """
    flat = lengths.reshape(len(lengths), -1).astype(np.int32)
    seen = np.broadcast_to(context, lengths.shape).reshape(flat.shape)
    schedule, drawn = Schedule(room, flat, first_alone=first_alone, may_run=may_run), np.zeros_like(flat)
    legs, examples = list[LegWork](), dict[int, Leg]()
    while not schedule.done:
        turn = schedule.next()
        leg, left = turn.leg, flat - drawn
        sits = np.asarray(leg.seats.seated) & (left > 0)
        ordered = -np.sort(-np.where(sits, left, 0), axis=1)
        # The part that is the last to have few running branches decides.
        most = int(ordered[:, int(leg.leave)].max()) if leg.leave < ordered.shape[1] else 0
        steps = min(most, int(leg.until))
        legs.append(run_leg(turn, room, seen, steps))
        examples.setdefault(leg.span, leg)
        drawn = drawn + np.where(sits, np.minimum(left, steps), 0)
        schedule.end(drawn < flat, steps)
    return Decode(lengths, (flat - drawn).reshape(lengths.shape), room, slots, tuple(legs), examples)


def run_leg(turn: Turn, room: Room, seen: np.ndarray, steps: int) -> LegWork:
    """What a leg of so many tokens computes.

    Args:
      seen: int [P, branches], slots of the context that each branch sees.
    """
    leg, seats = turn.leg, turn.leg.seats
    parts = len(seen)
    each = room.n // seats.strip.shape[2]  # trajectories of a strip
    branch = np.asarray(seats.branch).reshape(parts, -1, leg.span * room.sizes.rows)
    taken = np.asarray(seats.taken).reshape(branch.shape)
    longest = np.zeros((parts, branch.shape[1], room.n // each), np.int64)
    part, span, row = np.nonzero(taken)
    sits = branch[part, span, row]
    np.maximum.at(longest, (part, span, sits // room.c // each), seen[part, sits])
    tiles = -(-longest // room.sizes.context)
    moved = sum(len(pages) for _, pages in (*turn.aside, *turn.back))
    return LegWork(
        steps=steps,
        span=leg.span,
        spans=ceil_divide(int(leg.blocks), leg.span),
        rows=leg.rows,
        blocks=int(leg.blocks),
        pages=int(np.sum(seats.count)),
        strips=int(np.sum(seats.strips, axis=1).max()),
        tiles=int(tiles.sum(axis=(1, 2)).max()),
        copies=turn.copies.shape[1],
        moved=moved,
    )
