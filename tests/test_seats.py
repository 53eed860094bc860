"""Seats: what the devices are told of who sits where, against the blocks that it is told of."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support import examples

from fr3e_jax.engine import seats
from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.seats import Leg, RowBlock, seats_of, strip_size


@st.composite
def seated(draw):
    """Numbers of which `made` makes blocks."""
    sizes = draw(st.integers(1, 9)), draw(st.integers(1, 4))  # rows of a block, blocks of a span
    n, c, parts = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    return sizes, (n, c, parts), draw(st.floats(0, 1)), draw(st.integers(0, 2**32 - 1))


def made(case):
    """(Blocks whose rows any branches sit in, with idle rows; the other arguments of `seats_of`)."""
    (rows, span), (n, c, parts), share, seed = case
    rng = np.random.default_rng(seed)
    count = -(-n * c // rows)
    branch = np.full((parts, count * rows), -1, np.int32)
    for sits in branch:
        some = rng.permutation(n * c)[: rng.integers(0, round(share * n * c) + 1)]
        sits[rng.permutation(count * rows)[: len(some)]] = some
    numbers = rng.permutation(5 * count)
    blocks = [
        RowBlock(
            branch[:, b * rows : (b + 1) * rows],
            rng.integers(0, 9, (parts, rows)).astype(np.int32),
            numbers[5 * b : 5 * b + rng.integers(1, 6)].tolist(),
            0,
        )
        for b in range(count)
    ]
    return blocks, {
        "span": span,
        "room": count + int(rng.integers(0, 3)),
        "most": 5,
        "n": n,
        "c": c,
        "sizes": PageSizes(rows, 4, (span,), 16, 1),
    }


@examples(100)
@given(seated())
def test_branches_and_rows_lead_to_each_other(case):
    blocks, told = made(case)
    found, rows = seats_of(blocks, **told), told["sizes"].rows
    where = {}
    for b, block in enumerate(blocks):
        assert found.table[b, : found.count[b]].tolist() == block.pages
        for part, row in np.argwhere(block.branch >= 0):
            where[part, block.branch[part, row]] = b * rows + row
            assert found.first[part, b * rows + row] == block.first[part, row]
    assert not found.count[len(blocks) :].any()
    for part, branch in np.ndindex(*found.row.shape):
        row = where.get((part, branch))
        assert found.seated[part, branch] == (row is not None)
        assert found.row[part, branch] == (row or 0)
    taken = {(part, row): branch for (part, branch), row in where.items()}
    for part, row in np.ndindex(*found.taken.shape):
        assert found.taken[part, row] == ((part, row) in taken)
        # A branch that is there, also where none sits: whatever is computed there reads it.
        assert found.branch[part, row] == taken.get((part, row), 0)


@examples(100)
@given(seated())
def test_places_bring_the_rows_of_a_trajectory_together_and_lanes_bring_them_back(case):
    blocks, told = made(case)
    found, of_span = seats_of(blocks, **told), told["span"] * told["sizes"].rows
    width = found.place.shape[3]
    assert width == min(told["c"], of_span)
    lanes = set()
    for part, row in np.argwhere(found.taken):
        span, trajectory = row // of_span, found.branch[part, row] // told["c"]
        lane = found.lane[part, row]
        assert lane // width == trajectory
        assert found.place[part, span, trajectory, lane % width] == row % of_span
        lanes.add((part, span, lane))
    assert len(lanes) == found.taken.sum()  # no two rows have the same
    for x, end in ((found.lane, told["n"] * width), (found.place, of_span)):
        assert ((x >= 0) & (x < end)).all()


@examples(100)
@given(seated(), st.integers(1, 16))
def test_strips_are_those_with_rows_and_no_others(case, strip_rows):
    """So that of what branches share, nothing is read for nobody."""
    blocks, told = made(case)
    before, seats.STRIP_ROWS = seats.STRIP_ROWS, strip_rows
    try:
        found = seats_of(blocks, **told)
    finally:
        seats.STRIP_ROWS = before
    of_span, n = told["span"] * told["sizes"].rows, told["n"]
    each, left = divmod(n, found.strip.shape[2])
    assert left == 0
    for part, span in np.ndindex(*found.strips.shape):
        rows = slice(span * of_span, (span + 1) * of_span)
        branch = found.branch[part, rows][found.taken[part, rows]]
        wanted = sorted(set((branch // told["c"] // each).tolist()))
        assert found.strip[part, span, : found.strips[part, span]].tolist() == wanted


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_strip_is_the_largest_divisor_with_few_enough_rows(n, width):
    size = strip_size(n, width)
    allowed = [d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d * width <= seats.STRIP_ROWS)]
    assert size == max(allowed)


def test_a_leg_says_the_rows_that_its_spans_compute():
    """5 blocks of 9 in spans of 2: three spans."""
    blocks = [
        RowBlock(np.arange(9 * b, 9 * b + 9, dtype=np.int32)[None], np.zeros((1, 9), np.int32), [b], 1)
        for b in range(5)
    ]
    found = seats_of(blocks, 2, 7, 5, 5, 9, PageSizes(9, 4, (2,), 16, 1))
    assert Leg(found, blocks=5, filled=0, until=1, leave=0, span=2).rows == 3 * 2 * 9


@given(st.integers(1, 100), st.integers(1, 40))
def test_blocks_of_few_branches_have_few_rows(branches, rows):
    """Eight or a multiple, and never more than they would have."""
    fitted = PageSizes(rows, 4, (2,), 16, 1).fitted(branches).rows
    assert fitted == rows or (fitted % 8 == 0 and branches <= fitted < min(branches + 8, rows))
