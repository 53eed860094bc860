"""Rows that move between legs, and blocks that wait for memory, against decoding alone."""

import functools

import jax
import numpy as np
import pytest
from decoding import (
    FILTERED,
    MAX_NEW,
    MAX_PROMPT,
    PARAMS,
    POLICY,
    SEED_KEY,
    SIZE,
    STEP,
    B,
    check,
    queries,
    starts_of_queries,
    starts_of_states,
)
from hypothesis import given
from moving_rows import MANY_ENDS, J, N, engine_of, noted, return_first, rounds, states_of, total, with_pages
from support import TINY, examples

from fr3e_jax.engine import page_moves


def test_moved_rows_generate_what_branches_generate_alone():
    """Whatever the states are and however often rows have moved and blocks waited meanwhile."""
    e, done = engine_of(MANY_ENDS), []
    small = with_pages(e, (N, J), SIZE, 3)

    @examples(8)
    @given(rounds())
    def holds(drawn):
        q, chosen = drawn
        base = return_first(e, q)
        check(base, starts_of_queries(q, 2), FILTERED, MANY_ENDS)
        states = states_of(chosen, base)
        placed, at = e.placement.place_rows((q, states))
        with noted() as legs:
            how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": 1, "sampling": FILTERED, "after": 2}
            partial, row_steps = small.explore(PARAMS, placed, at, **how)
        partial = jax.device_get(partial)
        check(partial, starts_of_states(q, base, states, 1, 2), FILTERED, MANY_ENDS)
        assert partial.length.sum() <= row_steps
        done.extend(legs)

    holds()
    assert min(total(done)) > 5


@functools.cache
def answers(ends, more):
    """Four answers to each query in so many pages more than one block may need, None: in all that are useful;
    rows that were computed, and what was done."""
    e = engine_of(ends)
    if more is not None:
        e = with_pages(e, (B, 4), MAX_PROMPT, more)
    with noted() as done:
        found, row_steps = e.sample(PARAMS, e.placement.place_rows(queries()), SEED_KEY, STEP, 4, POLICY)
    return jax.device_get(found), int(row_steps), done


ENDINGS = {"never": (), "soon": tuple(range(0, TINY.vocab_size, 3))}


@pytest.mark.parametrize("more", [None, 0, 5], ids=["all pages", "one block's", "a few more"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_moved_answers_to_queries_equal_decoding_alone(ending, more):
    """That all stop at the limit, or nearly all of them soon and some at once."""
    found, row_steps, done = answers(ENDINGS[ending], more)
    check(found, starts_of_queries(queries(), 4), POLICY, ENDINGS[ending])
    said = total(done)
    if ending == "soon":
        assert (found.length == 1).any() and said.copied > 0
        assert row_steps < found.length.size * found.length.max() / 2
    else:
        assert (found.length == MAX_NEW).all() and said.copied == 0
        # With few blocks at a time, there is none for the second place of a span now and then.
        assert found.length.sum() <= row_steps <= found.length.sum() * (1.0 if more is None else 1.1)
    if more is None:
        assert said.aside == said.back == 0
    elif ending == "never":
        assert said.aside == said.back > 0


def test_every_amount_of_memory_has_the_same_tokens():
    """Bit for bit in one program's arithmetic: only the order of additions differs by budget."""
    for ending in ENDINGS.values():
        whole, *_ = answers(ending, None)
        for more in (0, 5):
            found, *_ = answers(ending, more)
            for name in ("token", "length", "stopped"):
                np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
            np.testing.assert_allclose(found.logprob, whole.logprob, atol=1e-5)


def test_a_page_that_comes_back_wrong_is_seen(monkeypatch):
    """What the tests above rely on: tokens depend on what a block that waited had drawn before."""
    monkeypatch.setattr(page_moves, "page_to_host", lambda x: 0 * x)
    monkeypatch.setattr(page_moves, "page_to_device", lambda x: x)
    e = with_pages(engine_of(()), (B, 4), MAX_PROMPT, 0)
    found, _ = e.sample(PARAMS, e.placement.place_rows(queries()), SEED_KEY, STEP, 4, POLICY)
    with pytest.raises(AssertionError):
        check(jax.device_get(found), starts_of_queries(queries(), 4), POLICY, ())
