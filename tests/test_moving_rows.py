"""Rows that move between decoding steps, and caches that grow, against decoding alone."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from decoding import (
    FILTERED,
    MAX_NEW,
    PARAMS,
    POLICY,
    SEED_KEY,
    STEP,
    check,
    queries,
    starts_of_queries,
    starts_of_states,
)
from hypothesis import given
from hypothesis import strategies as st
from moving_rows import MANY_ENDS, J, N, engine_of, return_first, rounds, small_ladder, states_of
from support import TINY, examples

from fr3e_jax.engine.seats import Leg, Seats
from fr3e_jax.parallel.sizes import two_per_doubling


def test_moved_rows_generate_what_branches_generate_alone():
    """Whatever the states are and however often rows have moved and caches grown meanwhile."""
    e, kinds = engine_of(MANY_ENDS), set()

    @examples(14)
    @given(rounds())
    def holds(drawn):
        q, chosen = drawn
        base, caches = return_first(e, q)
        check(base, starts_of_queries(q, 2), FILTERED, MANY_ENDS)
        states = states_of(chosen, base)
        placed, at = e.placement.place_rows((q, states))
        with small_ladder() as moved:
            how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": 1, "sampling": FILTERED}
            partial, row_steps = e.explore(PARAMS, placed, caches, at, **how)
        partial = jax.device_get(partial)
        check(partial, starts_of_states(q, base, states, 1, 2), FILTERED, MANY_ENDS)
        assert partial.length.sum() <= row_steps <= N * J * partial.length.max()
        kinds.update(move.kind for move in moved)

    holds()
    assert kinds >= {"grows", "divided anew", "divided anew because full"}


@pytest.mark.parametrize("ends", [(), tuple(range(0, TINY.vocab_size, 3))], ids=["never", "soon"])
def test_moved_answers_to_queries_equal_decoding_alone(ends):
    """That all stop at the limit, or nearly all of them soon and some at once."""
    e, q = engine_of(ends), queries()
    with small_ladder(slots=12) as moved:
        answers, row_steps = e.sample(PARAMS, e.placement.place_rows(q), SEED_KEY, STEP, 4, POLICY)
    answers = jax.device_get(answers)
    check(answers, starts_of_queries(q, 4), POLICY, ends)
    kinds = [move.kind for move in moved]
    if ends:
        assert (answers.length == 1).any()
        assert kinds.count("divided anew") > 1
        assert row_steps < answers.length.size * answers.length.max() / 2
    else:
        assert (answers.length == MAX_NEW).all()
        assert kinds == ["grows"]
        assert row_steps == answers.length.sum()


# From (rows, slots) to those to go on with: in another order, divided anew, with a larger cache.
MOVES = {
    (18, 9): [(18, 9), (18, 18), (9, 18)],
    (18, 18): [(9, 36)],
    (9, 18): [(9, 18), (3, 54)],
    (9, 36): [],
    (3, 54): [],
}


def any_seats(rng, running, rows):
    """Seats of running branches [1, N, J] in any rows, with anything that is allowed elsewhere."""
    width = min(J, two_per_doubling(rows))
    branches = rng.permutation(np.flatnonzero(running))
    sits = rng.permutation(rows)[: len(branches)]
    branch = rng.choice(branches, (1, rows)).astype(np.int32)
    row = rng.integers(0, rows, (1, N * J)).astype(np.int32)
    group = rng.integers(0, rows, (1, N, width)).astype(np.int32)
    lane = rng.integers(0, N * width, (1, rows)).astype(np.int32)
    places = [iter(rng.permutation(width)) for _ in range(N)]
    for at, b in zip(sits, branches, strict=True):
        place = next(places[b // J])
        branch[0, at], row[0, b] = b, at
        group[0, b // J, place] = at
        lane[0, at] = b // J * width + place
    return Seats(branch, row, group, lane)


@pytest.mark.slow
def test_rows_may_move_in_any_order_at_any_time():
    """Random permutations at random moments, and branches that stop at given times of their own."""
    e, shapes = engine_of(MANY_ENDS), set()

    @examples(9)
    @given(rounds(), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 4]))
    def holds(drawn, seed, unequal):
        q, chosen = drawn
        rng = np.random.default_rng(seed)
        base, caches = return_first(e, q)
        states = states_of(chosen, base)
        placed, at = e.placement.place_rows((q, states))
        with small_ladder():
            branches, decoding = e.open_states(
                PARAMS, placed, caches, at, seed_key=SEED_KEY, step=STEP, rollouts=1
            )
        limit = np.ceil(np.asarray(branches.limit) * rng.random((N, J)) ** unequal).astype(np.int32)
        branches = dataclasses.replace(branches, limit=jax.device_put(limit, branches.limit.sharding))
        running, slot, origin = limit > 0, 0, None
        shape = before = (N * J, 9)
        decoding = dataclasses.replace(decoding, running=jax.device_put(running, decoding.running.sharding))
        sits = any_seats(rng, np.ones((1, N, J), bool), N * J)
        while running.any() and slot < min(shape[1], MAX_NEW):
            until = int(rng.integers(slot, min(shape[1], MAX_NEW))) + 1
            leg = e.place(Leg(sits, origin, until, 0, before, shape[1]))
            decoding, ended = e.advance(PARAMS, branches, decoding, leg, sampling=FILTERED)
            running, slot = jax.device_get(ended)
            possible = [after for after in MOVES[shape] if after[0] >= running.sum() and after[1] > slot]
            origin, before = None, shape
            if possible and running.any():
                old, shape = sits, possible[rng.integers(len(possible))]
                sits = any_seats(rng, running, shape[0])
                origin = np.take_along_axis(old.row, sits.branch, axis=1)
                shapes.add((before, shape))
        starts = starts_of_states(q, base, states, 1, 2)
        starts = {place: start._replace(limit=int(limit[place])) for place, start in starts.items()}
        if running.any():  # the cache was full, and no move possible: up to there it has to be right
            starts = {place: start._replace(limit=min(start.limit, slot)) for place, start in starts.items()}
        check(jax.device_get(decoding.rollouts), starts, FILTERED, MANY_ENDS)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # as the engine does
        holds()
    assert len(shapes) >= 5  # of the six that there are
