"""Rollouts of the engine against decoding alone, and where they are laid out."""

import numpy as np
import pytest
from decoding import (
    ENDS,
    GRAPH,
    MAX_NEW,
    POLICY,
    M,
    R,
    check,
    explored,
    queries,
    starts_of_queries,
    starts_of_states,
)
from hypothesis import given
from hypothesis import strategies as st
from support import placement

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.parallel.mesh import SAMPLING_TABLE


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", [GREEDY, POLICY], ids=["greedy", "policy"])
def test_rollouts_equal_decoding_alone(sampling):
    base, states, partial = explored(sampling)
    check(base, starts_of_queries(queries(), R), sampling)
    starts = starts_of_states(queries(), base, states, M, R)
    assert len(starts) == 18
    check(partial, starts, sampling)


def test_greedy_branches_continue_as_their_base_trajectory_did():
    base, states, partial = explored(GREEDY)
    for n, j in np.argwhere(states.valid):
        size = states.prefix_length[n, j]
        whole = base.token[states.query[n], states.base[n]]
        np.testing.assert_array_equal(partial.token[n, j * M, : MAX_NEW - size], whole[size:])


def test_rollouts_of_a_state_differ_when_sampled():
    _, states, partial = explored(POLICY)
    pairs = [(partial.token[n, j * M], partial.token[n, j * M + 1]) for n, j in np.argwhere(states.valid)]
    assert sum((a != b).any() for a, b in pairs) > len(pairs) / 2


def test_rollouts_do_not_depend_on_padding_trajectories():
    _, _, padded = explored(POLICY, padding=(0, 3))
    _, _, plain = explored(POLICY)
    np.testing.assert_array_equal(padded.token[[1, 2, 4, 5]], plain.token[:4])
    assert not padded.length[[0, 3]].any()


def test_an_answer_is_never_longer_than_the_limit_prefix_included():
    _, states, partial = explored(POLICY)
    whole = partial.length + np.repeat(states.prefix_length, M, axis=1)
    assert whole.max() <= MAX_NEW
    assert (~partial.stopped & (whole == MAX_NEW)).any()  # the limit did cut some


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_kept_trajectories_are_laid_out_in_the_part_of_their_query(parts, per_part, count, seed):
    rng = np.random.default_rng(seed)
    kept = rng.random((parts * per_part, count)) < rng.random()
    e = Engine(GRAPH, placement(parts, 1, 1, SAMPLING_TABLE), MAX_NEW, ENDS)
    query, trajectory, real = e.arrange(kept)
    assert sorted(zip(query[real], trajectory[real], strict=True)) == sorted(map(tuple, np.argwhere(kept)))
    n, left = divmod(len(query), parts)
    assert left == 0 and n & (n - 1) == 0  # few sizes
    assert n // 2 < max(kept.reshape(parts, -1).sum(axis=1).max(), 1) <= n
    # Padding too: whatever is computed there reads a cache that is there.
    assert (query // per_part == np.repeat(np.arange(parts), n)).all()
    assert ((trajectory >= 0) & (trajectory < count)).all()
