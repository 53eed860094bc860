"""Values, advantages, modulation and rejection: by hand, by slow loops, and by the released functions."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fr3e_jax.algorithm.advantage import divided_by_std, group_advantage
from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.modulation import modulation_factor
from fr3e_jax.algorithm.reject import accept_states
from fr3e_jax.algorithm.values import state_values, value_change

GOLDEN = json.loads((Path(__file__).parent / "golden_fr3e.json").read_text())["advantages"]
N, J, M = 4, 3, 2  # of the drawn examples

accept = jax.jit(accept_states, static_argnums=3)
change = jax.jit(value_change, static_argnums=(2, 3))
factor = jax.jit(modulation_factor, static_argnums=(2, 3, 4))


def everything(value):
    """Values as an array, and all states valid."""
    value = jnp.asarray(value, jnp.float32)
    return value, jnp.ones(value.shape, bool)


# --- values and advantages


def test_the_value_of_a_state_is_the_mean_of_its_own_rewards():
    reward = jnp.array([[[0, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 0]]], jnp.float32)
    np.testing.assert_array_equal(state_values(reward), [[0.5, 1.0], [0.0, 0.75]])


def test_the_advantage_is_what_a_rollout_is_better_than_its_state():
    reward = jnp.array([[[1, 0, 0, 0], [1, 1, 1, 0]]], jnp.float32)
    expected = [[[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]]]
    np.testing.assert_array_equal(group_advantage(reward, everything(reward[..., 0])[1]), expected)


def test_the_advantage_is_divided_by_the_unbiased_standard_deviation_if_asked():
    reward = jnp.array([[[1, 0, 0, 0], [1, 0, 1, 0]]], jnp.float32)
    # Sums of squares 3 x 1/16 + 9/16 = 3/4 and 4 x 1/4 = 1, over M - 1 = 3.
    quarter, half = math.sqrt(0.25) + 1e-6, math.sqrt(1 / 3) + 1e-6
    expected = [[np.array([0.75, -0.25, -0.25, -0.25]) / quarter, np.array([0.5, -0.5, 0.5, -0.5]) / half]]
    advantage = divided_by_std(group_advantage(reward, everything(reward[..., 0])[1]), reward)
    np.testing.assert_allclose(advantage, expected, rtol=1e-6)


@pytest.mark.parametrize("rollouts", [2, 3, 7, 16, 41, 47, 64])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_rollouts_that_are_all_alike_have_no_advantage(rollouts, normalize_std):
    """Rejection does not take these away under `reject: none` (grpo); rounding must not fill them in."""
    reward = jnp.stack([jnp.zeros((1, rollouts)), jnp.ones((1, rollouts))])
    advantage, *_ = modulated_advantage(reward, everything(reward[..., 0])[1], normalize_std, "none")
    np.testing.assert_allclose(advantage, 0.0, atol=1e-6)


# --- modulation


def test_the_change_of_value_is_from_the_previous_state_of_the_same_trajectory():
    value, valid = everything([[0.5, 0.75, 0.25], [1.0, 0.0, 0.5]])
    np.testing.assert_array_equal(value_change(value, valid), [[0, 0.25, -0.5], [0, -1.0, 0.5]])
    released = value_change(value, valid, "released")
    np.testing.assert_array_equal(released, [[0.5, 0.25, -0.5], [0, -1.0, 0.5]])


def test_invalid_states_have_no_change():
    value = jnp.array([[0.5, 0.75, 0.0], [0.25, 0.0, 0.0]])
    valid = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(value_change(value, valid), [[0, 0.25, 0], [0, 0, 0]])
    # Nor do they weigh in the sum that sharpened changes are divided by.
    sharpened = value_change(value, valid, "released", sharpen=True)
    share = 0.5**1.5 / (0.5**1.5 + 0.25**1.5)
    np.testing.assert_allclose(sharpened, [[share, 1 - share, 0], [1, 0, 0]], rtol=1e-6)


def test_sharpened_changes_keep_their_sign_and_add_up_to_one():
    # |1|^1.5 = 1 and |-1/4|^1.5 = 1/8, of 9/8 together.
    value, valid = everything([[0.0, 1.0, 0.75]])
    np.testing.assert_allclose(value_change(value, valid, sharpen=True), [[0, 8 / 9, -1 / 9]], rtol=1e-6)


def test_sharpening_equal_values_is_no_division_by_zero():
    value, valid = everything([[0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(value_change(value, valid, sharpen=True), np.zeros((1, 3)))
    value, valid = everything([[1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(value_change(value, valid, "released", sharpen=True), np.zeros((1, 3)))


def test_the_factor_is_below_one_where_the_value_rose_and_above_where_it_fell():
    value, valid = everything([[0.5, 0.75, 0.25]])
    expected = [[1.0, 1 / math.exp(0.25), math.exp(0.5)]]
    np.testing.assert_allclose(modulation_factor(value, valid), expected, rtol=1e-6)
    released = [[1 / math.exp(0.5), 1 / math.exp(0.25), math.exp(0.5)]]
    np.testing.assert_allclose(modulation_factor(value, valid, "paper", "released"), released, rtol=1e-6)


def test_without_modulation_the_factor_is_one():
    value, valid = everything([[0.5, 0.75, 0.25]])
    np.testing.assert_array_equal(modulation_factor(value, valid, "none", "released", True), np.ones((1, 3)))


def change_slowly(value, states, first_state, sharpen):
    """The changes of one trajectory with `states` valid states."""
    delta = [0.0 if first_state == "neutral" else 1.0 - value[0]] if states else []
    delta += [value[j] - value[j - 1] for j in range(1, states)]
    if sharpen:
        total = sum(abs(d) ** 1.5 for d in delta)
        delta = [math.copysign(abs(d) ** 1.5 / total, d) if total else 0.0 for d in delta]
    return delta + [0.0] * (len(value) - states)


@pytest.mark.parametrize("sharpen", [False, True])
@pytest.mark.parametrize("first_state", ["neutral", "released"])
@given(
    arrays(np.float32, (N, J), elements=st.sampled_from([k / 8 for k in range(9)])),
    arrays(np.int32, (N,), elements=st.integers(0, J)),
)
def test_changes_and_factors_equal_the_slow_loop(first_state, sharpen, value, states):
    valid = np.arange(J) < states[:, None]
    expected = [
        change_slowly(v.tolist(), int(size), first_state, sharpen)
        for v, size in zip(value, states, strict=True)
    ]
    np.testing.assert_allclose(change(value, valid, first_state, sharpen), expected, atol=1e-6)
    alpha = factor(value, valid, "paper", first_state, sharpen)
    np.testing.assert_allclose(alpha, np.exp(-np.array(expected)), atol=1e-6)


def test_the_modulated_advantage_is_the_factor_times_the_advantage():
    reward = jnp.array([[[1, 1, 0, 0], [1, 1, 1, 0]]], jnp.float32)
    advantage, value, alpha = modulated_advantage(reward, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(value, [[0.5, 0.75]])
    fall = math.exp(-0.25)
    np.testing.assert_allclose(alpha, [[1, fall]], rtol=1e-6)
    expected = [[[0.5, 0.5, -0.5, -0.5], [0.25 * fall, 0.25 * fall, 0.25 * fall, -0.75 * fall]]]
    np.testing.assert_allclose(advantage, expected, rtol=1e-6)


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_the_released_settings_give_the_released_advantages(case):
    given_case = GOLDEN[case]
    reward = jnp.asarray(given_case["rewards"], jnp.float32)
    assert reward.shape[1:] == (given_case["states"], given_case["rollouts"])
    advantage, _, _ = modulated_advantage(
        reward,
        jnp.ones(reward.shape[:2], bool),
        normalize_std=given_case["normalize_std"],
        first_state="released",
        sharpen=given_case["sharpen"],
    )
    np.testing.assert_allclose(advantage, given_case["advantages"], atol=1e-5, rtol=1e-5)


# --- rejection

REWARD = jnp.array(
    [
        [[1, 1], [1, 0], [0, 0]],  # query 7
        [[1, 1], [1, 1], [1, 1]],  # query 7, right throughout
        [[0, 0], [0, 0], [0, 0]],  # query 8, wrong throughout
        [[1, 1], [1, 1], [0, 1]],  # query 9, whose one mixed state is invalid
    ],
    jnp.float32,
)
VALID = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]], bool)
QUERY = jnp.array([7, 7, 8, 9], jnp.int32)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("state", [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("query", [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        ("none", [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]),
    ],
)
def test_accepted_states_by_hand(rule, expected):
    np.testing.assert_array_equal(accept_states(REWARD, VALID, QUERY, rule), np.array(expected, bool))


def test_a_query_is_mixed_when_its_trajectories_differ_though_no_state_is():
    reward = jnp.array([[[1, 1]], [[0, 0]], [[1, 1]]], jnp.float32)
    accepted = accept_states(reward, jnp.ones((3, 1), bool), jnp.array([0, 0, 1]), "query")
    np.testing.assert_array_equal(accepted, [[True], [True], [False]])


@pytest.mark.parametrize("rule", ["state", "query", "none"])
@given(
    arrays(np.float32, (N, J, M), elements=st.sampled_from([0.0, 1.0])),
    arrays(np.int32, (N,), elements=st.integers(0, J)),
    arrays(np.int32, (N,), elements=st.integers(0, 2)),
)
def test_accepted_states_equal_the_slow_loop(rule, reward, states, query):
    valid = np.arange(J) < states[:, None]
    expected = np.zeros((N, J), bool)
    for n, j in np.argwhere(valid):
        others = [(a, b) for a, b in np.argwhere(valid) if query[a] == query[n]]
        seen = {
            "state": set(reward[n, j]),
            "query": {r for a, b in others for r in reward[a, b]},
            "none": {0, 1},
        }
        expected[n, j] = len(seen[rule]) > 1
    np.testing.assert_array_equal(accept(reward, valid, query, rule), expected)
