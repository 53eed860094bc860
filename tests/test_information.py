"""Mutual information of a token and the reward, and how many positions and rollouts a query gets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.algorithm.amounts import adapted_amount
from fr3e_jax.algorithm.choose import choose_positions, uniform_positions
from fr3e_jax.algorithm.information import binary_entropy, mutual_information, ranked, spread_scores

# --- mutual information


def information(rate, p):
    """Of two rates, where the first token has probability p among the two."""
    tokens = np.log(np.float32([[p, 1 - p]])) - 1.0  # beside others
    return float(mutual_information(np.float32([rate]), tokens)[0])


def test_a_token_that_decides_the_answer_tells_all_of_it():
    assert information([1.0, 0.0], 0.5) == pytest.approx(math.log(2), abs=1e-6)
    assert information([0.0, 1.0], 0.5) == pytest.approx(math.log(2), abs=1e-6)


def test_information_of_rates_worked_out_by_hand():
    """p = 3/4 and 1/4, rates 1 and 1/2: r is 7/8, and half of a quarter is left open."""
    left = -7 / 8 * math.log(7 / 8) - 1 / 8 * math.log(1 / 8) - 0.25 * math.log(2)
    assert information([1.0, 0.5], 0.75) == pytest.approx(left, abs=1e-6)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.floats(0.5, 0.999))
def test_information_is_what_the_table_of_token_and_reward_says(first, second, pilots, p):
    """Against sum p(v, r) log p(v, r) / p(v) p(r) in float64; at most either entropy; 0 for equal rates."""
    rate = [min(first, pilots) / pilots, min(second, pilots) / pilots]
    share = np.float64(np.float32([p, 1 - p]))
    share /= share.sum()
    table = np.array([[share[v] * rate[v], share[v] * (1 - rate[v])] for v in (0, 1)])
    outer = table.sum(axis=1, keepdims=True) * table.sum(axis=0)
    told = sum(table[i] * math.log(table[i] / outer[i]) for i in np.ndindex(2, 2) if table[i] > 0)
    ours = information(rate, p)
    assert ours == pytest.approx(told, abs=1e-6)
    if rate[0] == rate[1]:
        assert ours == 0.0
    entropies = [-sum(x * math.log(x) for x in table.sum(axis=axis) if x > 0) for axis in (0, 1)]
    assert -1e-6 <= ours <= min(entropies) + 1e-6


def test_few_pilots_find_information_where_there_is_none_and_not_more_than_documented():
    """The expectation over all outcomes of 8 pilots of two tokens with the same rate of 1/2."""
    chance = [math.comb(8, k) / 2**8 for k in range(9)]
    mean = sum(
        chance[a] * chance[b] * information([a / 8, b / 8], 0.5)
        for a, b in itertools.product(range(9), repeat=2)
    )
    assert mean == pytest.approx(1 / (4 * 8), rel=0.15)


def test_the_entropy_of_a_sure_outcome_is_zero():
    np.testing.assert_array_equal(binary_entropy(np.float32([0.0, 1.0])), 0.0)


def test_equal_information_is_ranked_by_uncertainty_and_candidates_alone_are_ranked():
    """Candidates 5, 2 and 9 with information 0, 0.3, 0; the token at 9 is more uncertain than at 5."""
    score = np.float32([[0.0, 0.3, 0.0, 7.0]])
    at, there = np.array([[5, 2, 9, 0]]), np.array([[True, True, True, False]])
    spread = spread_scores(score, at, there, 12)
    assert np.flatnonzero(np.isfinite(spread[0])).tolist() == [2, 5, 9] and spread[0, 2] == np.float32(0.3)
    entropy = np.full((1, 12), 9.0, np.float32)
    entropy[0, [5, 9]] = 0.5, 0.6
    score = ranked(spread, entropy)
    for count, chosen in ((1, [2]), (2, [2, 9]), (3, [2, 5, 9])):
        position, valid = choose_positions(score, np.array([12]), count)
        assert position[valid].tolist() == chosen
    assert choose_positions(score, np.array([12]), 4)[1].tolist() == [[True, True, True, False]]


# --- how many


@pytest.mark.parametrize(
    ("most", "value", "least", "amount"),
    [
        (4, 0.0, 1, 4),
        (4, 0.25, 1, 3),
        (4, 0.26, 1, 3),
        (4, 0.75, 1, 1),
        (4, 1.0, 1, 1),
        (16, 0.5, 2, 8),
        (16, 0.9, 2, 2),  # ceil(1.6)
        (16, 0.95, 2, 2),  # ceil(0.8), and at least two
        (10, 0.9, 1, 1),  # in float32, 10 (1 - 0.9) is above 1
        (3, 2 / 3, 1, 1),
        (1, 0.2, 2, 1),  # no more than there is room for
    ],
)
def test_amounts_fall_with_the_success_rate(most, value, least, amount):
    assert adapted_amount(most, np.float32([value]), least).tolist() == [amount]


@given(st.integers(1, 64), st.integers(1, 16), st.data())
def test_an_amount_is_the_exact_ceiling_for_every_number_of_right_answers(most, answers, data):
    right = data.draw(st.integers(0, answers))
    value = np.zeros(answers, np.float32)
    value[:right] = 1.0
    exact = -(-most * (answers - right) // answers)
    assert adapted_amount(most, value.mean(keepdims=True), 1).tolist() == [max(exact, 1)]


def test_fewer_positions_are_those_of_the_highest_scores():
    score = np.float32([[9, 1, 5, 2, 4, 3]] * 3)
    position, valid = choose_positions(score, np.array([6, 6, 3]), 3, wanted=np.array([3, 2, 3]))
    assert [row[there].tolist() for row, there in zip(position, valid, strict=True)] == [
        [2, 4, 5],
        [2, 4],
        [1, 2],
    ]


def test_fewer_uniform_positions_are_the_middles_of_fewer_parts():
    position, valid = uniform_positions(np.array([41, 41, 2]), 4, wanted=np.array([4, 2, 4]))
    assert [row[there].tolist() for row, there in zip(position, valid, strict=True)] == [
        [6, 16, 26, 36],
        [11, 31],
        [1],
    ]
