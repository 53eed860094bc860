"""Seats: who sits where, and the policy that moves running branches into fewer rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.engine import seats
from fr3e_jax.engine.seats import TILE, Ladder, first_slots, schedule, take_seats


@st.composite
def who_runs(draw):
    """bool [P, n, C] and rows enough for any part; some parts and trajectories have stopped altogether."""
    shape = [draw(st.integers(1, most)) for most in (4, 5, 9)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = rng.random((shape[0], 1, 1)) * rng.random((shape[0], shape[1], 1)) ** draw(
        st.sampled_from([0, 3])
    )
    running = rng.random(shape) < share * draw(st.sampled_from([0.0, 0.5, 1.0, 9.0]))
    fullest = int(running.sum(axis=(1, 2)).max())
    return running, draw(st.integers(max(fullest, 1), shape[1] * shape[2]))


@given(who_runs())
def test_every_running_branch_has_a_row_of_its_own_and_idle_rows_repeat_one(case):
    running, rows = case
    found = take_seats(running, rows)
    assert found.rows == rows
    for part, runs in enumerate(running.reshape(len(running), -1)):
        branches = np.flatnonzero(runs)
        sits = found.row[part, branches]
        assert len(set(sits)) == len(branches)
        assert (found.branch[part, sits] == branches).all()
        assert not found.row[part, ~runs].any()
        idle = np.setdiff1d(np.arange(rows), sits)
        # A part that has wholly stopped still computes: whatever it repeats has to exist.
        assert set(found.branch[part, idle]) <= (set(branches) or set(range(runs.size)))


@given(who_runs())
def test_groups_bring_the_rows_of_a_trajectory_together_and_lanes_bring_them_back(case):
    running, rows = case
    found = take_seats(running, rows)
    _, n, c = running.shape
    width = found.group.shape[2]
    assert running.sum(axis=2).max(initial=0) <= width <= c
    assert ((found.group >= 0) & (found.group < rows)).all()
    assert ((found.lane >= 0) & (found.lane < n * width)).all()
    for part, trajectory, column in np.argwhere(running):
        row = found.row[part, trajectory * c + column]
        lane = found.lane[part, row]
        assert lane // width == trajectory
        assert found.group[part, trajectory, lane % width] == row


def test_the_width_of_groups_follows_from_the_rows_as_long_as_trajectories_are_not_too_unequal():
    """So that there are few programs."""
    rng = np.random.default_rng(0)
    widths = set()
    for _ in range(50):
        running = np.zeros((2, 8, 20), bool)
        for part in running:  # 40 of 160, at most 10 of a trajectory
            for trajectory, count in zip(part, rng.permutation([10, 10, 5, 5, 4, 3, 2, 1]), strict=True):
                trajectory[rng.permutation(20)[:count]] = True
        widths.add(take_seats(running, 40).group.shape[2])
    assert widths == {12}


@given(st.integers(1, 40_000))
def test_the_first_slots_are_a_twelfth_of_a_long_limit_half_of_a_short_one_and_all_of_a_shorter(max_new):
    slots = first_slots(max_new)
    share = max_new / (1 if max_new <= 128 else 2 if max_new <= 256 else 12)
    assert share <= slots < share + TILE and slots <= max_new
    assert max_new <= 128 or slots % TILE == 0


# --- the ladder


@st.composite
def ladders(draw):
    """Any rows and limit, with the slots that the engine begins with or any others."""
    max_new = draw(st.integers(1, 4000))
    slots = draw(st.one_of(st.just(first_slots(max_new)), st.integers(1, max_new)))
    return Ladder(draw(st.integers(1, 700)), slots, max_new)


@given(ladders())
def test_rungs_descend_divide_the_cache_and_are_a_step_apart(ladder):
    rungs = ladder.rungs
    assert rungs[0] == ladder.rows
    for above, rung in itertools.pairwise(rungs):
        assert seats.FEWEST_ROWS <= rung <= seats.STEP_DOWN * above
        assert ladder.below(above) == rung
    assert ladder.below(rungs[-1]) == 0
    for rung in rungs:
        slots, left = divmod(ladder.rows * ladder.slots, rung)
        assert left == 0
        assert slots % TILE == 0 or ladder.slots % TILE


@given(ladders(), st.integers(0, 2**32 - 1), st.booleans())
def test_a_walk_down_the_ladder_loses_nothing_and_ends(ladder, seed, moves):
    """The engine's loop, with branches that stop at random: it steps, moves or grows every time."""
    rng = np.random.default_rng(seed)
    rows, slots, slot, running = ladder.rows, ladder.slots, 0, ladder.rows
    for _ in range(200):
        window = min(slots, ladder.max_new)
        leave = ladder.below(rows) if moves else 0
        # Either so many stop that the others are to move, or the window is full first.
        stop = rng.random() < 0.6
        running = int(rng.integers(0, leave + 1)) if stop else int(rng.integers(leave + 1, running + 1))
        slot = int(rng.integers(slot, window + 1)) if stop else window
        if slot == ladder.max_new or not running:
            return
        before, cache = (rows, slots), rows * slots
        rows, slots = ladder.next(running if moves else rows, rows, slots, slot == slots)
        assert rows >= running
        assert slots >= before[1]  # whatever is filled has a place
        assert slot < slots
        if rows < before[0]:
            assert rows * slots == cache  # in place
        elif slots > before[1]:
            assert slot == before[1]  # grows only when full, and not beyond what can be needed
            assert slots <= 2 * slot and slots < ladder.max_new + ladder.rows * ladder.slots // rows
        else:
            assert rows == before[0] and running > leave
        if ladder.slots % TILE == 0:
            assert slots % TILE == 0
        if running <= leave:
            assert rows < before[0]  # or the loop on the device would return at once again
    raise AssertionError("never ends")


def test_the_first_token_is_a_leg_of_its_own_also_where_rows_move_before_it():
    """48 branches of which 8 run at all: rows are given up before anything is drawn."""
    runs = np.arange(48).reshape(1, 4, 12) < 8
    legs = schedule(runs.shape, 40, 40, first_alone=True)
    first = next(legs)
    assert first.rows == 48 and first.until == 1
    moved = legs.send((runs, 0))  # no token is drawn where so few run
    assert moved.rows == 8 and moved.until == 1
    assert legs.send((runs, 1)).until == min(moved.slots, 40)
    usual = schedule(runs.shape, 40, 40)
    assert next(usual).until == 40


def test_a_full_cache_all_of_whose_rows_run_grows_and_otherwise_is_divided_anew():
    ladder = Ladder(96, 48, 1000)
    assert ladder.next(96, 96, 48, full=True) == (96, 96)
    assert ladder.next(96, 96, 48, full=False) == (96, 48)
    assert 72 not in ladder.rungs  # but better than a larger cache
    assert ladder.next(70, 96, 48, full=True) == (72, 64)
    assert ladder.next(70, 96, 48, full=False) == (96, 48)
    assert ladder.next(70, 72, 64, full=True) == (72, 128)


# --- the policy, on lengths as answers have them


def decode(length, max_new):
    """Follow the schedule of one part token by token: rows x steps, programs and the most cache at a time.

    Args:
      length: int [n, C], tokens that each branch will draw.
    """
    legs = schedule((1, *length.shape), first_slots(max_new), max_new)
    leg, filled, work, peak, programs = next(legs), 0, 0, 0, {("open",)}
    while True:
        programs.add((leg.moves, leg.before, leg.rows, leg.slots, leg.seats.group.shape[2]))
        peak = max(peak, leg.cache)
        while (length > filled).sum() > leg.leave and filled < leg.until:
            filled += 1
            work += leg.rows
        try:
            leg = legs.send((length[None] > filled, filled))
        except StopIteration:
            return work, programs, peak


@pytest.mark.parametrize("seed", range(8))
def test_few_rows_idle_in_few_programs_and_little_memory(seed):
    """Median 200, one in twenty above 1000, cut at 2048; 8 trajectories with 80 branches each."""
    rng = np.random.default_rng(seed)
    spread = math.log(1000 / 200) / 1.645
    length = np.minimum(np.ceil(200 * np.exp(spread * rng.standard_normal((8, 80)))), 2048).astype(int)
    work, programs, peak = decode(length, 2048)
    assert length.sum() / work >= 0.75
    assert len(programs) <= 12
    steps = np.arange(2048)
    needed = ((length.reshape(-1)[:, None] > steps).sum(axis=0) * (steps + 1)).max()
    assert peak <= 2 * needed
    # Without moving, whoever is cut at the limit holds all rows until then.
    assert length.sum() / (length.size * length.max()) < 0.25
