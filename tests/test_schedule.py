"""The schedule of a decoding, followed on pages that say of every slot which token lies in it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import examples

from fr3e_jax.engine.pages import ON_TPU, PageSizes
from fr3e_jax.engine.schedule import Room, Schedule

NOBODY = (-1, -1)


@st.composite
def decodings(draw):
    """Numbers of which `made` makes a decoding."""
    sizes = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([(1,), (2,), (1, 2), (1, 3)])),
    )
    room = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 14))
    pages = draw(st.one_of(st.just(0.0), st.floats(0, 1)))  # often as few as there may be
    parts, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    unequal, empty = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])), draw(st.sampled_from([0.0, 0.3]))
    options = {"every": draw(st.sampled_from([None, 1, 3])), "first_alone": draw(st.booleans())}
    return sizes, room, pages, (parts, seed, unequal, empty), options


def made(case):
    """(Room, tokens that each branch will draw [P, n x C], options of the schedule)."""
    (rows, slots, spans), (n, c, max_new), pages, (parts, seed, unequal, empty), options = case
    room = Room(PageSizes(rows, slots, spans, 16, 1 + seed % 12), n, c, max_new, 0)
    room = with_pages(room, room.most + round(pages * (room.useful - room.most)))
    rng = np.random.default_rng(seed)
    length = np.ceil(max_new * rng.random((parts, n * c)) ** unequal).astype(np.int32)
    length[rng.random(length.shape) < empty] = 0
    return room, length, options


def with_pages(room, pages):
    return dataclasses.replace(room, pages=pages)


class Devices:
    """Pages that hold (branch, number of its token) in every slot, and what the engine does with them."""

    def __init__(self, room, length):
        self.room, self.length, self.drawn = room, length, np.zeros_like(length)
        self.pages = np.full((len(length), room.pages, room.sizes.rows, room.sizes.slots, 2), -1)
        self.aside = {}

    def arrange(self, turn):
        """In the order of the engine: rows move, blocks are set aside, others come back."""
        for part, copies in enumerate(turn.copies):
            for page, row, to_page, to_row in copies:
                self.pages[part, to_page, to_row] = self.pages[part, page, row]
        for number, held in turn.aside:
            self.aside[number] = [self.pages[:, page].copy() for page in held]
            self.pages[:, list(held)] = -2  # whoever takes the page writes over it
        for number, held in turn.back:
            for page, kept in zip(held, self.aside.pop(number), strict=True):
                self.pages[:, page] = kept

    @property
    def running(self):
        return self.drawn < self.length

    def check(self, turn):
        """Each running branch that has a row finds its tokens, in their order, where the row begins."""
        leg, seats, sizes = turn.leg, turn.leg.seats, self.room.sizes
        tables = [seats.table[b, : seats.count[b]].tolist() for b in range(leg.blocks)]
        used = list(itertools.chain(*tables))
        assert len(set(used)) == len(used) <= self.room.pages and set(used) <= set(range(self.room.pages))
        assert max(map(len, tables)) <= self.room.most and min(map(len, tables)) > 0
        assert not seats.count[leg.blocks :].any() and not seats.taken[:, leg.blocks * sizes.rows :].any()
        for part, row in np.argwhere(seats.taken):
            branch, block = seats.branch[part, row], row // sizes.rows
            assert self.running[part, branch] and seats.seated[part, branch]
            assert seats.row[part, branch] == row
            lies = np.concatenate([self.pages[part, page, row % sizes.rows] for page in tables[block]])
            end = (seats.count[block] - 1) * sizes.slots + leg.filled
            tokens = [[branch, number] for number in range(self.drawn[part, branch])]
            assert lies[seats.first[part, row] : end].tolist() == tokens

    def decode(self, turn):
        """Draw tokens until the leg ends; rows without a running branch store what is nobody's."""
        leg, seats, sizes = turn.leg, turn.leg.seats, self.room.sizes
        sits = np.where(seats.taken, seats.branch, -1)
        begins = self.drawn == 0
        assert turn.first == (begins & seats.seated & self.running).any()
        for step in itertools.count():
            runs = (sits >= 0) & np.take_along_axis(self.running, seats.branch, axis=1)
            if runs.sum(axis=1).max() <= leg.leave or step == leg.until:
                return step
            assert leg.filled + step < sizes.slots
            for part, row in np.ndindex(sits.shape):
                block, branch = row // sizes.rows, sits[part, row]
                if block >= leg.blocks:
                    continue
                page = seats.table[block, seats.count[block] - 1]
                token = (branch, self.drawn[part, branch]) if runs[part, row] else NOBODY
                self.pages[part, page, row % sizes.rows, leg.filled + step] = token
                self.drawn[part, branch] += runs[part, row]


def follow(room, length, options, limit=None):
    """Follow a schedule to its end; its turns and the tokens of each."""
    devices, found = Devices(room, length), []
    schedule = Schedule(room, length if limit is None else limit, **options)
    while not schedule.done:
        turn = schedule.next()
        devices.arrange(turn)
        devices.check(turn)
        tokens = devices.decode(turn)
        assert tokens > 0
        held = [page for block in schedule.blocks for page in block.pages]
        assert sorted([*held, *schedule.free]) == list(range(room.pages))
        found.append((turn, tokens))
        assert len(found) <= length.sum()  # a branch draws in each
        schedule.end(devices.running, tokens)
    if not options.get("may_run"):
        assert (devices.drawn == length).all() and not devices.aside
    assert devices.running.sum() <= options.get("may_run", 0)
    return found


def test_every_branch_finds_its_tokens_whatever_moved_and_ends_with_its_length():
    """In any number of pages that holds a block; rows, blocks and pages move meanwhile."""
    kinds = set()

    @examples(300)
    @given(decodings())
    def holds(case):
        room, length, options = made(case)
        turns = follow(room, length, options)
        for turn, _ in turns:
            kinds.update(name for name in ("aside", "back") if getattr(turn, name))
            if (turn.copies[:, :, 0] != turn.copies[:, :, 2]).any():
                kinds.add("moved")
            kinds.update(["several pages"] if turn.leg.seats.count.max() > 2 else [])
            kinds.update(["begins amid a page"] if turn.first and turn.leg.filled else [])
        if room.pages == room.useful:
            assert not any(turn.aside for turn, _ in turns)
        if options["every"]:
            assert turns == [] or turns[0][1] == 1
            assert all(tokens <= options["every"] for _, tokens in turns[1:])
        if options["first_alone"]:
            assert all(tokens == 1 for turn, tokens in turns if turn.first)

    holds()
    assert kinds == {"aside", "back", "moved", "several pages", "begins amid a page"}


@examples(100)
@given(decodings(), st.floats(0, 1))
def test_a_decoding_that_does_not_wait_ends_when_few_enough_run(case, share):
    """At once where all branches of a part begin together: when the others have drawn their last token."""
    room, length, options = made(case)
    may_run = int(share * (length > 0).sum())
    turns = follow(room, length, {**options, "may_run": may_run})
    if len(length) == 1 and room.pages == room.useful:
        wait = -np.sort(-length[0])[may_run] if may_run < length.size else 0
        assert sum(tokens for _, tokens in turns) == wait


@examples(60)
@given(decodings())
def test_the_schedule_follows_from_which_branches_run_and_not_from_their_limits(case):
    """So every process, and the planner, which know no more, decide the same."""
    room, length, options = made(case)
    ours = follow(room, length, options)
    theirs = follow(room, length, options, limit=np.where(length > 0, 1 + length[::-1, ::-1], 0))
    assert len(ours) == len(theirs)
    for (a, tokens), (b, same) in zip(ours, theirs, strict=True):
        assert (tokens, a.aside, a.back, a.first) == (same, b.aside, b.back, b.first)
        np.testing.assert_array_equal(a.copies, b.copies)
        numbers = [(x.leg.blocks, x.leg.filled, x.leg.until, x.leg.leave, x.leg.span) for x in (a, b)]
        assert numbers[0] == numbers[1]
        for name, x in vars(a.leg.seats).items():
            np.testing.assert_array_equal(x, getattr(b.leg.seats, name), err_msg=name)


@given(decodings())
def test_with_as_many_pages_as_are_useful_no_block_ever_waits(case):
    room, length, options = made(case)
    room = with_pages(room, room.useful)
    turns = follow(room, length, options)
    assert not any(turn.aside or turn.back for turn, _ in turns)
    if room.most > 1:  # all begin at once, as each has a page in reserve
        assert [turn.first for turn, _ in turns] == [number == 0 for number in range(len(turns))]


@given(decodings())
def test_pages_that_do_not_hold_one_block_are_refused(case):
    room, length, _ = made(case)
    with pytest.raises(ValueError, match="do not hold a block"):
        Schedule(with_pages(room, room.most - 1), length)


def test_a_wrong_copy_is_seen():
    """What the other tests rely on: a row that lands one slot row beside its place."""
    sizes = PageSizes(2, 4, (1,), 16, 1)
    room = Room(sizes, 1, 4, 8, 0)
    room = with_pages(room, room.useful)
    length = np.array([[8, 2, 8, 2]], np.int32)
    assert any(turn.copies.size for turn, _ in follow(room, length, {}))
    arrange = Devices.arrange

    def wrong(self, turn):
        turn.copies[..., 3] ^= 1
        arrange(self, turn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Devices, "arrange", wrong)
        with pytest.raises(AssertionError):
            follow(room, length, {})


def test_the_youngest_wait_for_memory_and_come_back_in_their_order():
    """Three blocks of which two fit to the end: by hand."""
    sizes = PageSizes(1, 2, (1,), 16, 1)
    room = Room(sizes, 1, 3, 6, 6)
    turns = follow(room, np.full((1, 3), 6, np.int32), {})
    assert room.most == 4
    said = [
        (turn.leg.blocks, [number for number, _ in turn.aside], [number for number, _ in turn.back])
        for turn, _ in turns
    ]
    # A page each, two each, and a third for the older two; the third goes on when these are done.
    assert said == [(3, [], []), (3, [], []), (2, [2], []), (1, [], [2])]
    assert [tokens for _, tokens in turns] == [2, 2, 2, 2]


# --- the policy, on lengths as answers have them


@pytest.mark.parametrize("pages", [10**6, 60], ids=["all pages", "few pages"])
@pytest.mark.parametrize("seed", range(3))
def test_few_rows_idle_in_few_programs_and_little_is_moved(seed, pages):
    """Median 200, one in twenty above 1000, cut at 2048; 16 trajectories with 80 branches each."""
    rng = np.random.default_rng(seed)
    spread = math.log(1000 / 200) / 1.645
    length = np.ceil(200 * np.exp(spread * rng.standard_normal((1, 1280))))
    length = np.minimum(length, 2048).astype(np.int32)
    room = Room(ON_TPU, 16, 80, 2048, 0)
    schedule, drawn = Schedule(with_pages(room, min(pages, room.useful)), length), np.zeros_like(length)
    work, moved, programs = 0, 0, set()
    while not schedule.done:
        turn = schedule.next()
        leg, seats = turn.leg, turn.leg.seats
        moved += turn.copies.shape[1] + ON_TPU.rows * sum(len(held) for _, held in (*turn.aside, *turn.back))
        programs.add((leg.span, seats.table.shape))
        runs = seats.seated & (length > drawn)
        # Until so few run that the leg ends.
        tokens = int(min(leg.until, np.sort((length - drawn)[runs])[::-1][leg.leave]))
        drawn += np.where(runs, np.minimum(tokens, length - drawn), 0)
        passes = leg.rows // (leg.span * ON_TPU.rows)
        work += tokens * (leg.rows + passes * ON_TPU.fixed)
        schedule.end(length > drawn, tokens)
    assert (drawn == length).all()
    # Weights are read for every token, which takes as long as to compute so many rows.
    least = length.sum() + length.max() * ON_TPU.fixed
    assert least / work >= 0.65
    assert len(programs) <= len(ON_TPU.spans)
    assert moved * ON_TPU.slots < length.sum()  # less is copied than drawn
    # Without moving, whoever is cut at the limit holds all rows until then.
    assert length.sum() / (length.size * length.max()) < 0.25
