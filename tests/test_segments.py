"""Segments of base trajectories, weights of states, baselines: by hand, by loops in float64, by tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import whole_rows

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.reject import trained_rows
from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.algorithm.segments import segment_advantage, state_weights, tree_weights
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.types import Queries, Rollouts, States

N, J, M = 3, 4, 3  # of the drawn examples
CHOICES = list(
    itertools.product(["paper", "value", "edge"], ["mean", "leave_one_out"], ["rollout", "trajectory"])
)

credit = jax.jit(modulated_advantage, static_argnames=("estimator", "baseline", "state_weight"))
segments = jax.jit(segment_advantage)


def test_a_segment_is_worth_what_it_changes_and_the_last_what_the_answer_is_more_than_its_state():
    value = jnp.array([[0.25, 0.75, 0.5], [0.5, 1.0, 0.0]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    found = segment_advantage(value, valid, jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(found, [[0.5, -0.25, 0.5], [0.5, -1.0, 0.0]])


def test_a_state_without_value_is_passed_over():
    value, valid = jnp.array([[0.25, 0.0, 0.5]]), jnp.array([[True, False, True]])
    np.testing.assert_array_equal(segment_advantage(value, valid, jnp.array([1.0])), [[0.25, 0, 0.5]])
    # Nor does the last segment get anything where it is not known what the answer is worth.
    found = segment_advantage(value, valid, jnp.array([1.0]), jnp.array([False]))
    np.testing.assert_array_equal(found, [[0.25, 0, 0]])


@given(
    arrays(np.float32, (N, J), elements=st.sampled_from([k / 8 for k in range(9)])),
    arrays(bool, (N, J)),
    arrays(np.float32, (N,), elements=st.sampled_from([0.0, 0.5, 1.0])),
)
def test_the_segments_of_a_trajectory_add_up_to_what_it_is_better_than_its_root(value, valid, reward):
    valid[:, 0] = True
    total = np.asarray(segments(value, valid, reward)).sum(axis=1)
    np.testing.assert_allclose(total, reward - value[:, 0], atol=1e-6)


def test_equal_values_that_differ_by_rounding_leave_a_segment_without_advantage():
    value = jnp.array([[0.1, 0.1 + 2e-8]])
    assert not segment_advantage(value, jnp.ones((1, 2), bool), jnp.array([0.1])).any()


def test_weights_of_states_by_hand():
    """Three states of two rollouts; two; a root alone; and one rollout at each of three."""
    count = jnp.array([[2, 2, 2], [2, 2, 0], [2, 0, 0], [1, 1, 1]], jnp.float32)
    expected = [[1.5, 0.75, 0.75], [1.5, 1.5, 0], [3, 0, 0], [3, 1.5, 1.5]]
    np.testing.assert_array_equal(state_weights(count, 2), expected)
    rollouts, of_segments = tree_weights(count, 2)
    # 7 leaves, of which 5, 3 and 1 lie behind the segments; then 5, 3 and 4 leaves, in sevenths of so many.
    np.testing.assert_allclose(rollouts[:, 0], [1, 7 / 5, 7 / 3, 7 / 4], rtol=1e-6)
    expected = [[5, 3, 1], [3 * 7 / 5, 7 / 5, 7 / 5], [7 / 3] * 3, [3 * 7 / 4, 2 * 7 / 4, 7 / 4]]
    np.testing.assert_allclose(of_segments, expected, rtol=1e-6)


@given(arrays(np.int32, (N, J), elements=st.integers(0, M)))
def test_every_trajectory_counts_the_same(count):
    """Rollouts alone count J M in all; beside segments every depth counts 1 + J M times."""
    count[:, 0] = np.maximum(count[:, 0], 1)
    weight = np.asarray(state_weights(jnp.float32(count), M), float)
    np.testing.assert_allclose((weight * count).sum(axis=1), J * M, rtol=1e-5)
    rollouts, of_segments = (np.asarray(x, float) for x in tree_weights(jnp.float32(count), M))
    at_depth = of_segments + np.cumsum(rollouts * count, axis=1)
    np.testing.assert_allclose(at_depth, 1 + J * M, rtol=1e-5)


def reference(choice, reward, valid, counted, base_reward):
    """The advantages [N, J, rows] by loops in float64; states that nothing counts of are passed over."""
    estimator, baseline, state_weight = choice
    rows = M + (estimator == "edge")
    advantage = np.zeros((N, J, rows))
    for n in range(N):
        own = {j: [m for m in range(M) if counted[n, j, m]] for j in range(J) if valid[n, j]}
        own = {j: members for j, members in own.items() if members}
        values = {j: sum(float(reward[n, j, m]) for m in own[j]) / len(own[j]) for j in own}
        order, leaves = sorted(own), 1 + sum(map(len, own.values()))
        for place, j in enumerate(order):
            alpha, weight = 1.0, 1.0
            if estimator == "paper" and place:
                alpha = np.exp(values[order[place - 1]] - values[j])
            if state_weight == "trajectory" and estimator == "edge":
                weight = (1 + J * M) / leaves
            elif state_weight == "trajectory":
                deep = len([k for k in order if k > 0])
                share = 1 if not deep else 1 / 2 if j == 0 else 1 / (2 * deep)
                weight = J * share * M / len(own[j])
            for m in own[j]:
                others = own[j] if baseline == "mean" else [k for k in own[j] if k != m]
                if others:
                    compared = sum(float(reward[n, j, k]) for k in others) / len(others)
                    advantage[n, j, m] = weight * alpha * (reward[n, j, m] - compared)
            if estimator == "edge":
                after = values[order[place + 1]] if place + 1 < len(order) else base_reward[n]
                behind = 1 + sum(len(own[k]) for k in order[place + 1 :])
                times = weight * behind if state_weight == "trajectory" else 1.0
                advantage[n, j, M] = times * (after - values[j])
    return advantage


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@given(
    arrays(np.float32, (N, J, M), elements=st.sampled_from([0.0, 0.25, 1.0])),
    arrays(np.int32, (N,), elements=st.integers(1, J)),
    arrays(bool, (N, J, M)),
    arrays(np.float32, (N,), elements=st.sampled_from([0.0, 0.25, 1.0])),
)
def test_every_choice_equals_its_loop(choice, reward, states, counted, base_reward):
    valid = np.arange(J) < states[:, None]
    options = dict(zip(("estimator", "baseline", "state_weight"), choice, strict=True))
    found, _, alpha = credit(reward, valid, counted=counted, base_reward=base_reward, **options)
    there = (valid & counted.any(axis=2))[..., None]
    expected = reference(choice, reward, valid, counted, base_reward)
    np.testing.assert_allclose(np.where(there, found, 0), expected, atol=1e-4, rtol=1e-4)
    assert (choice[0] == "paper") or (np.asarray(alpha) == 1).all()


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    reward, valid = jnp.array([[[1.0, 0.0, 0.0, 1.0]]]), jnp.ones((1, 1), bool)
    found = modulated_advantage(reward, valid, baseline="leave_one_out")[0]
    np.testing.assert_allclose(found, [[[2 / 3, -2 / 3, -2 / 3, 2 / 3]]], rtol=1e-6)


def test_the_estimator_edge_asks_for_the_rewards_of_base_trajectories():
    with pytest.raises(RuleError, match="edge needs base_reward"):
        modulated_advantage(jnp.zeros((1, 1, 2)), jnp.ones((1, 1), bool), estimator="edge")


def test_a_state_may_be_trained_on_for_its_segment_alone():
    """Mixed; alike with a segment that changes the value; alike with one that does not; and no state."""
    accepted = jnp.array([[True, False, False, False]])
    advantage = jnp.array([[[0.5, -0.5, 0.0], [0, 0, 0.5], [0, 0, 0], [0, 0, 0.5]]], jnp.float32)
    valid = jnp.array([[True, True, True, False]])
    found = trained_rows(accepted, advantage, valid, jnp.ones((1, 4, 2), bool))
    assert found.astype(int).tolist() == [[[1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]]


def a_tree():
    """Two base trajectories, of which the second is kept, with three states; tokens say where they belong."""
    token = np.stack([np.arange(100, 108), np.arange(200, 208)])[None].astype(np.int32)
    logprob = -token.astype(np.float32)
    length, stopped = np.array([[8, 7]], np.int32), np.ones((1, 2), bool)
    base = Rollouts(token, logprob, logprob, logprob, length, stopped)
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    prefix_length = np.array([[0, 2, 5, 0]], np.int32)
    states = States(zero, one, base.token[zero, one], prefix_length, np.array([[True, True, True, False]]))
    drawn = np.repeat(1000 + np.arange(8, dtype=np.int32)[None, :, None], 8, axis=2)
    zeros = np.zeros(drawn.shape, np.float32)
    rollouts = Rollouts(drawn, zeros, zeros, zeros, np.full((1, 8), 2, np.int32), np.ones((1, 8), bool))
    return Queries(np.array([[5, 6]], np.int32), np.array([2], np.int32), zero), states, rollouts, base


@pytest.mark.parametrize("shared", [True, False])
def test_segments_are_rows_that_together_are_the_base_trajectory(shared):
    """Each follows the query and the base trajectory up to its state, with the log-probabilities recorded."""
    queries, states, rollouts, base = a_tree()
    advantage = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    accepted, trained = states.valid, np.ones((1, 4, 3), bool)
    found = groups.collect(accepted, queries, states, rollouts, advantage, trained, base)
    rows = {row[-1]: row[:-1] for row in whole_rows(bundles_of(found, 1, 64, shared))}
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # advantages; every row once
    response = base.token[0, 1].tolist()
    for advantage, start, end in ((2, 0, 2), (5, 2, 5), (8, 5, 7)):
        token, length, first, logprob = rows[advantage]
        assert token[:length].tolist() == [5, 6, *response[:end]]
        assert (first, length) == (2 + start, 2 + end)
        np.testing.assert_array_equal(logprob[first:length], [-float(t) for t in response[start:end]])


def test_a_segment_goes_on_to_the_next_state_that_there_is():
    _, states, _, base = a_tree()
    states.valid[0, 1] = False
    assert groups.segment_ends(states, base)[0, [0, 2]].tolist() == [5, 7]


def test_only_what_is_trained_on_has_tokens():
    queries, states, rollouts, base = a_tree()
    trained = np.zeros((1, 4, 3), bool)
    trained[0, 1, 2] = trained[0, 2] = True
    accepted = trained.any(axis=2)
    found = groups.collect(accepted, queries, states, rollouts, np.ones((1, 4, 3), np.float32), trained, base)
    assert found.length.tolist() == [[0, 0, 3], [2, 2, 2]]
