"""Rollouts that do not count: no value, advantage, rejection, update or metric takes anything from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import whole_rows

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.reject import accept_states
from fr3e_jax.algorithm.values import filled_rewards, state_values
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.step.metrics import Measured, measure
from fr3e_jax.types import Queries, Rollouts, States

N, J, M = 3, 4, 4  # of the drawn examples
REWARDS = arrays(np.float32, (N, J, M), elements=st.sampled_from([0.0, 0.1, 0.7, 1.0]))
MASKS = arrays(bool, (N, J, M))
LENGTHS = arrays(np.int32, (N,), elements=st.integers(1, J))

credit = jax.jit(
    modulated_advantage, static_argnames=("normalize_std", "modulation", "first_state", "sharpen")
)
accept = jax.jit(accept_states, static_argnums=3)


def reference(reward, valid, counted, normalize_std, first_state):
    """(A', V, alpha) in float64, state by state; a state with no rollout that counts is passed over."""
    advantage, value, alpha = np.zeros(reward.shape), np.zeros(valid.shape), np.ones(valid.shape)
    for n in range(len(reward)):
        before = None
        for j in np.flatnonzero(valid[n] & counted[n].any(axis=1)):
            own = reward[n, j, counted[n, j]].astype(float)
            value[n, j] = own.mean()
            change = 0.0 if before is None else value[n, j] - before
            if j == 0 and first_state == "released":
                change = 1 - value[n, 0]
            alpha[n, j], before = np.exp(-change), value[n, j]
            found = own - own.mean() if len(set(own)) > 1 else np.zeros(len(own))
            if normalize_std:
                found = found / ((own.std(ddof=1) if len(own) > 1 else 0.0) + 1e-6)
            advantage[n, j, counted[n, j]] = alpha[n, j] * found
    return advantage, value, alpha


@pytest.mark.parametrize("normalize_std, first_state", [(False, "neutral"), (True, "released")])
@given(REWARDS, MASKS, LENGTHS)
def test_credit_equals_the_loop_over_what_counts(normalize_std, first_state, reward, counted, states):
    valid = np.arange(J) < states[:, None]
    found = credit(reward, valid, normalize_std, first_state=first_state, counted=counted)
    expected = reference(reward, valid, counted, normalize_std, first_state)
    there = valid & counted.any(axis=2)
    np.testing.assert_allclose(np.where(there[..., None], found[0], 0), expected[0], atol=2e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(np.where(there, ours, 0), np.where(there, theirs, 0), atol=1e-5)


def test_the_value_and_the_advantage_are_of_what_counts():
    reward = jnp.array([[[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]]], jnp.float32)
    counted = jnp.array([[[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]], bool)
    np.testing.assert_allclose(state_values(reward, counted), [[1 / 3, 0, 1 / 2]], rtol=1e-6)
    advantage, _, alpha = modulated_advantage(reward, jnp.ones((1, 3), bool), counted=counted)
    # The state in the middle has no value: the last one's change is from the first, 1/2 - 1/3.
    fall = np.exp(-1 / 6)
    np.testing.assert_allclose(alpha[0, [0, 2]], [1, fall], rtol=1e-6)
    expected = [[[2 / 3, -1 / 3, -1 / 3, 0], [0, 0, 0, 0], [-fall / 2, fall / 2, 0, 0]]]
    np.testing.assert_allclose(advantage, expected, rtol=1e-6, atol=1e-7)


@given(REWARDS, LENGTHS, st.sampled_from(["state", "query", "none"]), st.sampled_from(["paper", "none"]))
def test_two_of_four_rollouts_that_count_are_a_group_of_two(reward, states, reject, modulation):
    """The mask that lets every other rollout count, against those rollouts alone."""
    valid, query = np.arange(J) < states[:, None], np.array([0, 0, 1], np.int32)
    counted = np.broadcast_to(np.arange(M) % 2 == 1, reward.shape)
    masked = credit(reward, valid, True, modulation, counted=counted)
    alone = credit(reward[..., 1::2], valid, True, modulation)
    np.testing.assert_allclose(masked[0][..., 1::2], alone[0], atol=2e-5)
    assert not np.asarray(masked[0][..., ::2]).any()
    for ours, theirs in zip(masked[1:], alone[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    found, expected = (
        accept(reward, valid, query, reject, counted),
        accept(reward[..., 1::2], valid, query, reject),
    )
    np.testing.assert_array_equal(found, expected)


def test_equal_rewards_stay_equal_where_others_do_not_count():
    """The mean of three times 0.1 is not 0.1 in float32, and a state of equal rewards is to be rejected."""
    reward = jnp.full((1, 1, 7), 0.1).at[0, 0, 6].set(1.0)
    counted = jnp.arange(7)[None, None] < 6
    np.testing.assert_array_equal(filled_rewards(reward, counted), jnp.full((1, 1, 7), 0.1))
    valid, query = jnp.ones((1, 1), bool), jnp.zeros(1, jnp.int32)
    assert not accept_states(reward, valid, query, "state", counted).any()
    assert not modulated_advantage(reward, valid, counted=counted)[0].any()


def test_a_state_that_nothing_counts_of_is_rejected_by_every_rule():
    reward, valid, query = (
        jnp.array([[[1.0, 0.0], [1.0, 0.0]]]),
        jnp.ones((1, 2), bool),
        jnp.zeros(1, jnp.int32),
    )
    counted = jnp.array([[[False, False], [True, True]]])
    for rule in ("state", "query", "none"):
        assert accept_states(reward, valid, query, rule, counted).tolist() == [[False, True]]


def test_a_rule_of_ones_own_needs_no_mask():
    """It sees the value in the place of rewards that do not count, so that its means are right."""
    reward, valid = jnp.array([[[1.0, 0.0, 0.0]]]), jnp.ones((1, 1), bool)
    counted = jnp.array([[[True, True, False]]])
    found = modulated_advantage(
        reward, valid, advantage=lambda r, v: r - r.mean(axis=2, keepdims=True), counted=counted
    )[0]
    np.testing.assert_array_equal(found, [[[0.5, -0.5, 0.0]]])
    query = jnp.zeros(1, jnp.int32)
    every = jnp.array([[[True, False, False]]])
    assert not accept_states(reward, valid, query, lambda r, v, q: r.std(axis=2) > 0, every).any()


def a_round():
    """A trajectory of two states with three rollouts each, whose tokens say which they are."""
    token = np.repeat(10 * np.arange(1, 7, dtype=np.int32)[None, :, None], 4, axis=2)
    zeros, length = np.zeros(token.shape, np.float32), np.array([[4, 2, 3, 1, 4, 4]], np.int32)
    rollouts = Rollouts(token, zeros, zeros, zeros, length, np.ones((1, 6), bool))
    one = np.zeros(1, np.int32)
    states = States(
        one, one, np.array([[7, 8, 9, 7]], np.int32), np.array([[0, 2]], np.int32), np.ones((1, 2), bool)
    )
    return Queries(np.array([[5, 6]], np.int32), np.array([2], np.int32), one), states, rollouts


def test_rollouts_that_do_not_count_are_not_trained_on():
    queries, states, rollouts = a_round()
    counted = np.array([[[True, False, True], [False, True, True]]])
    advantage = np.array([[[1, 2, 3], [4, 5, 6]]], np.float32)
    found = groups.collect(np.ones((1, 2), bool), queries, states, rollouts, advantage, counted)
    for shared in (True, False):
        rows = [
            (row[0][row[2]], row[1] - row[2], row[4]) for row in whole_rows(bundles_of(found, 1, 64, shared))
        ]
        assert sorted(rows) == [(10, 4, 1.0), (30, 3, 3.0), (50, 4, 5.0), (60, 4, 6.0)]


def test_metrics_are_of_the_rollouts_that_count():
    """All right and all wrong by what counts alone, and the same but for one that does not count."""
    _, states, rollouts = a_round()
    rollouts.token[0, 3:5] = 1
    reward = np.array([[[1, 1, 0], [0, 0, 1]]], np.float32)
    counted = np.array([[[True, True, False], [True, True, False]]])
    advantage, accepted = np.where(counted, reward, 9).astype(np.float32), np.array([[True, False]])
    of_states = (reward, np.array([[1, 0]], np.float32), np.ones((1, 2), np.float32), advantage, accepted)
    base = Rollouts(
        *(x[:, :1] for x in (rollouts.token, *[rollouts.entropy] * 3, rollouts.length, rollouts.stopped))
    )
    seen = measure(
        Measured(base, reward[:, 0, :1], states, rollouts, *of_states, restarts=True, counted=counted)
    )
    assert (seen["states/all_right"], seen["states/all_wrong"], seen["states/identical"]) == (1, 1, 1)
    assert seen["advantage/accepted_mean"] == 1.0 and seen["advantage/accepted_std"] == 0.0
