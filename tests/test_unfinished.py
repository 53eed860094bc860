"""Queries whose rollouts are not all there: what goes on, where, and that nothing is lost meanwhile."""

import dataclasses

import jax
import numpy as np
import pytest
from decoding import MAX_NEW, PARAMS, POLICY, SEED_KEY, STEP, B, R, check, engine, queries, starts_of_queries
from hypothesis import given
from hypothesis import strategies as st
from support import examples

from fr3e_jax.engine.laid_out import lay_out
from fr3e_jax.engine.sampler import branch_keys, row_key
from fr3e_jax.engine.unfinished import (
    QueryRoom,
    absorbed,
    as_arrays,
    begin,
    complete,
    from_arrays,
    joined,
    states_of_queries,
    with_states,
)
from fr3e_jax.learner.groups import empty_groups, staleness
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.types import Queries, Rollouts, States

ROOM = QueryRoom(base=3, kept=2, states=3, rollouts=2, response=7)
AFTER = 10  # numbers of partial rollouts lie behind


def written(query, number, t):
    """The token that a branch of a query draws as the t-th of its own."""
    return 100_000 * query + 100 * number + t


def some_queries(first, count):
    token = np.arange(first, first + count, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    return Queries(token, np.full(count, 2, np.int32), np.arange(first, first + count, dtype=np.int32))


def own_limit(prefix):
    return ROOM.response - prefix


@st.composite
def stories(draw):
    """Of what `live` makes: seed, mesh parts, rows of a part, columns, and what share ends each time."""
    return (
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([2, 6, 8])),
        draw(st.floats(0.3, 1.0)),
    )


def live(seed, parts, rows, columns, share):
    """Go through decodings until all branches of some queries have ended, drawing what `written` says.

    Yields:
      (what is unfinished, what was laid out, tokens of each branch of it that were drawn before).
    """
    rng = np.random.default_rng(seed)
    total = {}  # (query, number) -> tokens that it will have drawn
    unfinished, step = None, 0
    while True:
        step += 1
        if step <= 3:
            begun = begin(some_queries(2 * step, 2), step, ROOM)
            unfinished = begun if unfinished is None else joined(unfinished, begun)
        placed = lay_out(unfinished, AFTER, columns, [rows], parts)
        yield unfinished, placed
        s, n = placed.starts, parts * rows
        drawn = np.zeros((n, columns, ROOM.response), np.int32)
        length, running = np.zeros((n, columns), np.int32), np.zeros((n, columns), bool)
        for row, column in np.argwhere(s.drawn):
            query, number = int(placed.queries.index[row]), int(s.number[row, column])
            prefix, response = int(s.prefix_length[row, column]), s.response[row]
            own = int(prefix - start_of(unfinished, query, number))
            # A branch follows its own tokens, whatever was drawn in which decoding.
            assert response[prefix - own : prefix].tolist() == [written(query, number, t) for t in range(own)]
            whole = total.setdefault((query, number), int(rng.integers(1, own_limit(prefix - own) + 1)))
            new = whole - own if rng.random() < share else int(rng.integers(0, whole - own))
            drawn[row, column, :new] = [written(query, number, own + t) for t in range(new)]
            length[row, column], running[row, column] = new, new < whole - own
        real = (drawn / 7).astype(np.float32)
        rollouts = Rollouts(drawn, real, real, real, length, ~running & s.drawn)
        unfinished = absorbed(unfinished, placed.place, rollouts, running, step)
        whole = np.flatnonzero(unfinished.base.ended.all(axis=1) & ~unfinished.judged)
        if len(whole):
            unfinished = with_states(unfinished, whole, *opened(unfinished, whole, rng), ROOM.rollouts)
        if complete(unfinished, True).all() and step >= 3:
            yield unfinished, None
            return


def start_of(unfinished, query, number):
    """How much of a base trajectory a branch follows before its own tokens."""
    if number < AFTER:
        return 0
    q = unfinished.queries.index.tolist().index(query)
    base, column = divmod(number - AFTER, ROOM.branches)
    slot = unfinished.kept[q].tolist().index(base)
    return unfinished.prefix_length[q, slot, column // ROOM.rollouts]


def opened(unfinished, row, rng):
    """Reward, base, states and statistic of queries whose base trajectories are there; some keep none."""
    base = unfinished.take(row).base.rollouts
    query = np.repeat(np.arange(len(row), dtype=np.int32), 2)
    trajectory = np.tile(np.array([2, 0], np.int32), len(row))
    length = base.length[query, trajectory]
    prefix = np.stack([0 * length, length // 2, length - 1], axis=1).astype(np.int32)
    valid = (rng.random(len(query)) < 0.7)[:, None] & np.array([[True, True, False], [True] * 3])[query % 2]
    reward = rng.random(base.length.shape).astype(np.float32)
    states = States(query, trajectory, base.token[query, trajectory], prefix, valid)
    return reward, base, states, np.asarray(prefix[:, 1:], np.float32)


def test_every_branch_draws_its_own_tokens_however_often_it_is_left():
    """In whatever rows and parts; and each branch that has not ended has one row, if there are enough."""
    kinds = set()

    @examples(120)
    @given(stories())
    def holds(story):
        parts, rows, columns = story[1:4]
        for unfinished, placed in live(*story):
            if placed is None:
                continue
            s = placed.starts
            places = placed.place[s.drawn]
            assert (placed.place[~s.drawn] == -1).all() and len(set(places.tolist())) == len(places)
            ended = np.concatenate([unfinished.base.ended.reshape(-1), unfinished.partial.ended.reshape(-1)])
            assert not ended[places].any()
            kinds.add("some wait" if len(places) < (~ended).sum() else "all have a row")
            begun = np.concatenate(
                [x.rollouts.length.reshape(-1) for x in (unfinished.base, unfinished.partial)]
            )
            for row in np.flatnonzero(s.drawn.any(axis=1)):
                its = placed.place[row][s.drawn[row]]
                if (begun[its] > 0).any():
                    assert len(its) == 1 and not s.at_position[row].any()
                    kinds.add("in the middle")
            # A token at a position is one that follows a base trajectory, and is not yet drawn.
            fresh_partial = s.drawn & (placed.place >= unfinished.base.ended.size) & (s.prefix_length > 0)
            np.testing.assert_array_equal(
                s.at_position, fresh_partial & (begun[np.maximum(placed.place, 0)] == 0)
            )
            per_part = s.drawn.reshape(parts, -1).sum(axis=1)
            if s.drawn.any(axis=1).reshape(parts, -1).sum(axis=1).max() < rows:
                assert per_part.max() - per_part.min() <= columns
        check_whole(unfinished)

    holds()
    assert kinds == {"some wait", "all have a row", "in the middle"}


def check_whole(done):
    """Each branch has drawn its tokens in their order, and what belongs to them."""
    for growing, numbers in ((done.base, base_numbers), (done.partial, partial_numbers)):
        for q, c in np.argwhere(growing.rollouts.length > 0):
            size = growing.rollouts.length[q, c]
            expected = [written(int(done.queries.index[q]), numbers(done, q, c), t) for t in range(size)]
            assert growing.rollouts.token[q, c, :size].tolist() == expected
            np.testing.assert_array_equal(
                growing.rollouts.entropy[q, c, :size], (np.array(expected) / 7).astype(np.float32)
            )
            assert done.step[q] <= growing.drawn_step[q, c]
        assert not growing.rollouts.token[growing.rollouts.length == 0].any()
    states, partial, statistic = states_of_queries(done, 40, adaptive=False)
    real = states.valid.any(axis=1)
    assert real.sum() == (done.kept >= 0).sum() and partial.rollouts.length[~real].sum() == 0
    np.testing.assert_array_equal(statistic[real], states.prefix_length[real, 1:])
    assert (partial.rollouts.length[states.drawn(ROOM.rollouts).reshape(40, -1)] > 0).all()
    again = from_arrays(as_arrays(done), ROOM.response)
    jax.tree.map(np.testing.assert_array_equal, done, again)


def base_numbers(done, q, c):
    return int(c)


def partial_numbers(done, q, c):
    slot, column = divmod(int(c), ROOM.branches)
    return AFTER + int(done.kept[q, slot]) * ROOM.branches + column


def test_no_query_is_a_checkpoint_too():
    """Of no branch, and of one that has not begun."""
    for count in (0, 1):
        unfinished = begin(some_queries(3, count), 2, ROOM)
        jax.tree.map(
            np.testing.assert_array_equal, unfinished, from_arrays(as_arrays(unfinished), ROOM.response)
        )


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_a_branch_that_is_left_goes_on_as_if_it_never_had_been(sizes):
    """Decoded alone, without a stop, it has the same tokens, log-probabilities and entropies."""
    e, q = engine(*sizes), queries()
    parts = row_parts(e.placement.mesh)
    unfinished, decodings, left = begin(q, STEP, QueryRoom(R, 1, 1, 1, MAX_NEW)), 0, 0
    while not unfinished.base.ended.all():
        placed = lay_out(unfinished, R, 2, [12 // parts], parts)
        before = int((~unfinished.base.ended).sum())
        drawn, running, _ = e.go_on(
            PARAMS,
            *e.placement.place_rows((placed.queries, placed.starts)),
            seed_key=SEED_KEY,
            sampling=POLICY,
            may_run=int(0.7 * before),
        )
        drawn, running = gather((drawn, running))
        assert running.sum() <= 0.7 * before
        unfinished = absorbed(unfinished, placed.place, drawn, running, STEP)
        decodings, left = decodings + 1, left + unfinished.in_the_middle
    assert decodings > 1 and left > 0
    check(unfinished.base.rollouts, starts_of_queries(q, R))
    assert len(q.length) == B


def test_staleness_is_the_mean_over_trained_tokens_by_hand():
    """3 tokens of step 4, 1 token of step 6, 5 tokens that are not known, in step 7: (3 x 3 + 1 x 1) / 4."""
    groups = empty_groups(3, 1, 9)
    one = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), groups)
    length, drawn = np.array([[3, 1, 5]], np.int32), np.array([[4, 6, np.nan]], np.float32)
    assert staleness(dataclasses.replace(one, length=length, drawn_step=drawn), 7) == pytest.approx(2.5)
    assert staleness(one, 7) is None and staleness(groups, 7) is None


def test_the_step_of_a_branch_is_the_mean_over_its_tokens():
    """4 tokens drawn in step 2, then 2 in step 5: (4 x 2 + 2 x 5) / 6 = 3."""
    unfinished = begin(some_queries(0, 1), 1, ROOM)
    place, stopped = np.array([[0]]), np.zeros((1, 1), bool)
    for step, new, running in ((2, 4, True), (5, 2, False)):
        real = np.zeros((1, 1, ROOM.response), np.float32)
        token = real.astype(np.int32)
        drawn = Rollouts(token, real, real, real, np.array([[new]], np.int32), stopped)
        unfinished = absorbed(unfinished, place, drawn, np.array([[running]]), step)
    assert unfinished.base.drawn_step[0].tolist() == [3, 0, 0] and unfinished.base.ended[0, 0]
    assert unfinished.base.rollouts.length[0].tolist() == [6, 0, 0]


def test_what_is_drawn_follows_from_the_step_in_which_a_query_was_begun():
    """Of each trajectory its own step, with query and number: not of the step that decodes it."""
    q, step = queries(), np.array([3, 9, 9, 4], np.int32)
    number = np.arange(2 * B, dtype=np.int32).reshape(B, 2)
    keys = branch_keys(SEED_KEY, step, q.index, number)
    for n, c in np.ndindex(B, 2):
        expected = jax.random.key_data(row_key(SEED_KEY, step[n], q.index[n], number[n, c]))
        np.testing.assert_array_equal(jax.random.key_data(keys[n, c]), expected)
    begun = joined(begin(some_queries(0, 1), 3, ROOM), begin(some_queries(1, 2), 9, ROOM))
    placed = lay_out(begun, AFTER, 3, [4], 1)
    steps = dict(zip(placed.queries.index.tolist(), placed.starts.step.tolist(), strict=True))
    assert [steps[query] for query in (0, 1, 2)] == [3, 9, 9]
