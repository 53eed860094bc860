"""How well M rollouts tell the value of a state, and what decides an answer."""

import dataclasses
import itertools

import numpy as np
import pytest

from fr3e_jax.study.values import block_statistics


def test_blocks_of_rollouts_give_what_is_worked_out_by_hand():
    """Two states with four rollouts of 3 and 5 tokens, in blocks of two."""
    reward = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    tokens = np.array([[3, 3, 3, 3], [5, 5, 5, 5]])
    measured = block_statistics(reward, tokens, 2)
    assert dataclasses.asdict(measured) == pytest.approx(
        {
            "M": 2,
            "states": 2,
            "variance": 0.125 / 2,  # of 0.5 and 1, which is 1/8, and of 0 and 0
            "binomial": 0.25 / 2 / 2,  # the variance of 1, 0, 1, 1 is 1/4; by M; mean of two states
            "bias": -0.25,  # 0.5 less 1, and 0
            "accepted": 0.25,  # one block of four has both rewards
            "missed": 0.5,  # of the two blocks of the first state
            "accepted_error": 0.5,
            "tokens": 8.0,
        }
    )


def test_values_of_independent_rollouts_have_the_variance_of_a_binomial_and_no_bias():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=400)
    reward = (rng.uniform(size=(400, 512)) < p[:, None]).astype(float)
    for m in (4, 16):
        measured = block_statistics(reward, np.ones((400, 512), int), m)
        assert measured.variance == pytest.approx((p * (1 - p)).mean() / m, rel=0.05)
        assert measured.binomial == pytest.approx(measured.variance, rel=0.05)
        assert abs(measured.bias) < 4 * np.sqrt(measured.variance / 400)
        all_equal = (p**m + (1 - p) ** m).mean()
        assert measured.accepted == pytest.approx(1 - all_equal, abs=0.01)


def test_rollouts_that_are_not_independent_are_seen_in_the_variance():
    """Every reward is drawn once for two rollouts that follow each other."""
    rng = np.random.default_rng(1)
    reward = np.repeat((rng.uniform(size=(300, 256)) < 0.5).astype(float), 2, axis=1)
    measured = block_statistics(reward, np.ones((300, 512), int), 8)
    assert measured.variance > 1.7 * measured.binomial


def test_blocks_that_do_not_divide_the_rollouts_leave_the_last_ones_out():
    reward = np.array(list(itertools.product([0.0, 1.0], repeat=5)))
    measured = block_statistics(reward, np.ones(reward.shape, int), 2)
    assert measured.accepted == 0.5 and measured.tokens == 2
