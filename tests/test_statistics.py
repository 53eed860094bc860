"""What verdicts say: numbers by hand, slow obvious versions, and intervals that hold what they should."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.evaluation.statistics import (
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    paired_test,
    pass_at_k,
)


def verdicts(text):
    """`110 000` -> two problems of three answers."""
    return np.array([[mark == "1" for mark in problem] for problem in text.split()])


def verdict_arrays(most_problems=5, most_answers=6):
    return st.tuples(st.integers(1, most_problems), st.integers(1, most_answers)).flatmap(
        lambda shape: st.lists(
            st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ).map(np.array)
    )


def signs_by_enumeration(differences):
    """Share of all choices of signs whose sum is as far from 0, in whole numbers."""
    seen = abs(sum(differences))
    choices = list(itertools.product([1, -1], repeat=len(differences)))
    far = sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen for signs in choices)
    return Fraction(far, len(choices))


def test_the_mean_and_its_error_are_those_of_a_hand_calculation():
    # Means 1, 1/2, 0, 1/2: mean 1/2, squares 1/4 + 0 + 1/4 + 0, variance 1/6, error sqrt(1/6/4).
    assert avg_at_k(verdicts("11 10 00 01")) == pytest.approx((0.5, math.sqrt(1 / 24)))


def test_more_answers_to_the_same_problems_are_no_more_problems():
    """Copies of every answer must not make the error smaller, as they would if answers were independent."""
    right = verdicts("10 11 00 01 11")
    assert avg_at_k(np.repeat(right, 16, axis=1)) == pytest.approx(avg_at_k(right))


def test_one_problem_has_a_mean_and_no_error():
    right = verdicts("1101")
    mean, error = avg_at_k(right)
    assert mean == 0.75 and math.isnan(error)
    assert all(math.isnan(end) for end in bootstrap_interval(right))
    told = paired_test(right, verdicts("0001"))
    assert (told.difference, told.p) == (0.5, 1) and math.isnan(told.low) and math.isnan(told.high)


def test_the_interval_of_two_problems_is_that_of_all_four_draws():
    """0 0, 0 1, 1 0, 1 1: a quarter of the means is 0, half are 1/2 and a quarter is 1."""
    right = verdicts("0 1")
    assert bootstrap_interval(right, level=0.6) == (0, 1)
    assert bootstrap_interval(right, level=0.4) == (0.5, 0.5)


def test_the_interval_has_the_percentiles_of_the_draws_and_leaves_no_share_below_0():
    """Of three draws from 0 0 1, none is 1 in 8 of 27, and all are in 1 of 27, which is more than 2.5%."""
    assert bootstrap_interval(verdicts("0 0 1")) == (0, 1)
    assert bootstrap_interval(verdicts("0 0 1"), level=0.8) == pytest.approx((0, 2 / 3))


def test_the_interval_depends_on_nothing_but_its_seed():
    right = np.random.default_rng(0).random((40, 8)) < 0.4
    assert bootstrap_interval(right, seed=3) == bootstrap_interval(right, seed=3)
    assert bootstrap_interval(right, seed=3) != bootstrap_interval(right, seed=4)


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    """Of 600 evaluations of 60 problems whose difficulty is drawn; 0.025 is near three standard errors."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(600):
        chance = rng.beta(2, 3, size=(60, 1))
        low, high = bootstrap_interval(rng.random((60, 4)) < chance, draws=400, seed=seed)
        held += low <= 0.4 <= high
    assert held / 600 == pytest.approx(0.95, abs=0.025)


def test_the_interval_agrees_with_the_normal_one_where_problems_are_many():
    """And five thousand problems fit in memory."""
    right = np.random.default_rng(2).random((5000, 1)) < 0.3
    mean, error = avg_at_k(right)
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert bootstrap_interval(right, draws=2000) == pytest.approx(expected, abs=0.1 * error)


@given(verdict_arrays())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right):
    for k in range(1, right.shape[1] + 1):
        by_problem = [
            Fraction(sum(map(any, itertools.combinations(row, k))), math.comb(len(row), k))
            for row in right.tolist()
        ]
        assert pass_at_k(right, k) == pytest.approx(float(sum(by_problem) / len(by_problem)), abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_beyond_a_double():
    n, k = 4096, 1024
    for c in (1, 2, 7, 3071, 3072, 3073, n):
        right = np.arange(n)[None] < c
        expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(right, k) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_of_more_answers_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and the 3 answers"):
        pass_at_k(verdicts("110"), k)


@pytest.mark.parametrize(
    ("extracted", "right", "expected"),
    [
        (["7", "7", "8"], "110", 1),
        (["7", "8", "8"], "100", 0),
        (["7", "8", "9", "8", "7"], "10001", 1 / 2),  # 7 and 8 are tied
        (["7", "8", "9"], "010", 1 / 3),
        ([" 1/2 ", "1/2", "3"], "110", 1),
        (["x + 1", "x  +\n1", "3", "3", "x + 1"], "11001", 1),
        (["", "", "7"], "001", 1),  # no answer has no vote
        (["", " ", ""], "000", 0),
        (["7", "7", "8"], "100", 1 / 2),  # the second 7 was cut off
    ],
)
def test_a_vote_is_won_by_the_most_common_answer(extracted, right, expected):
    assert maj_at_k([extracted], verdicts(right)) == pytest.approx(expected)


def test_votes_of_problems_are_apart():
    assert maj_at_k([["7", "7"], ["7", "9"]], verdicts("11 00")) == 0.5


def test_the_test_of_a_few_problems_tries_every_sign():
    """Three problems, all better with a: only +++ and --- are as far from 0, 2 of 8."""
    told = paired_test(verdicts("11 11 10"), verdicts("00 10 00"))
    assert told.difference == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert told.p == 2 / 8


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_test_is_the_enumeration_of_all_signs(problems, k_a, k_b, random):
    """Also for shares that are no exact doubles, where sums that are equal must count as equal."""
    a, b = (
        np.array([[random.random() < 0.5 for _ in range(k)] for _ in range(problems)]) for k in (k_a, k_b)
    )
    differences = [int(x.sum()) * k_b - int(y.sum()) * k_a for x, y in zip(a, b, strict=True)]
    told = paired_test(a, b, draws=600)
    assert told.p == pytest.approx(float(signs_by_enumeration(differences)))
    assert told.difference == pytest.approx(sum(differences) / (problems * k_a * k_b))


def test_problems_of_several_benchmarks_have_their_own_k():
    """Differences 1/3, 1/3 and -2/3 sum to 0 exactly, so every choice of signs is as far from it."""
    a = [*verdicts("100 110"), *verdicts("0")]
    b = [*verdicts("000 100"), *verdicts("110")]
    told = paired_test(a, b)
    assert (told.difference, told.p) == (0, 1)


def test_a_test_that_draws_signs_is_near_the_enumeration_and_never_below_one_of_its_draws():
    rng = np.random.default_rng(6)
    a, b = rng.random((16, 9)) < 0.6, rng.random((16, 9)) < 0.45
    differences = [int(x.sum()) - int(y.sum()) for x, y in zip(a, b, strict=True)]
    exact = float(signs_by_enumeration(differences))
    assert 0.01 < exact < 0.5 and np.count_nonzero(differences) > 11  # more choices than 2000 draws
    drawn = [paired_test(a, b, draws=2000, seed=seed).p for seed in range(3)]
    assert drawn == pytest.approx([exact] * 3, abs=4 * math.sqrt(exact * (1 - exact) / 2000) + 0.01)
    assert len(set(drawn)) > 1 and drawn[1] == paired_test(a, b, draws=2000, seed=1).p
    # 2 of 2^40 choices are as far, so none is drawn: what was seen is one of 201, on either side.
    always = np.ones((40, 1), bool)
    assert paired_test(always, ~always, draws=200).p == pytest.approx(2 / 201)


def test_problems_without_a_difference_change_no_p_value():
    a, b = verdicts("1 1 1 0 1"), verdicts("0 0 1 0 0")
    same = np.ones((500, 1), bool)
    told = paired_test(np.concatenate([a, same]), np.concatenate([b, same]))
    assert told.p == paired_test(a, b).p == 2 / 8
    assert told.difference == pytest.approx(3 / 505)


def test_equal_evaluations_do_not_differ():
    right = verdicts("10 01 11")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = paired_test(right, right[:, ::-1])
    assert (told.difference, told.low, told.high, told.p) == (0, 0, 0, 1)


def test_sides_exchanged_exchange_the_sign():
    rng = np.random.default_rng(7)
    a, b = rng.random((12, 3)) < 0.7, rng.random((12, 5)) < 0.4
    there, back = paired_test(a, b), paired_test(b, a)
    assert there.difference == -back.difference and there.p == back.p
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.02)


def test_pairs_tell_apart_what_intervals_of_each_do_not():
    """A model that is right on all that another is, and on a few problems more, is better beyond doubt."""
    rng = np.random.default_rng(8)
    b = rng.random((200, 1)) < 0.4
    a = b.copy()
    a[np.flatnonzero(~b[:, 0])[:8]] = True
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]
    told = paired_test(a, b)
    assert told.p == 2 / 2**8 and told.low > 0


def test_the_test_rejects_what_is_equal_as_often_as_it_says():
    """Of 400 pairs of evaluations of one model, about 5% have p at most 0.05."""
    rng = np.random.default_rng(9)
    chance = rng.beta(1, 1, size=(400, 30, 1))
    a, b = rng.random((400, 30, 4)) < chance, rng.random((400, 30, 4)) < chance
    wrong = sum(paired_test(x, y, draws=300).p <= 0.05 for x, y in zip(a, b, strict=True))
    assert 0.015 < wrong / 400 < 0.09


def test_evaluations_of_other_numbers_of_problems_are_refused():
    with pytest.raises(ValueError, match="2 and 3 problems"):
        paired_test(verdicts("1 0"), verdicts("1 0 1"))
