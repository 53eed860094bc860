"""Statistics of a study, against scipy and cases made by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from fr3e_jax.study.curves import (
    accuracy_at,
    area_under_curve,
    cost_to_threshold,
    fit_sigmoid,
    fit_with_errors,
    sigmoid_at,
)
from fr3e_jax.study.statistics import (
    holm,
    interquartile_mean,
    mean_of_all,
    median_time,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    profile_band,
    stratified_bootstrap,
)


def arrays(*tasks):
    return [np.array(task, float) for task in tasks]


def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end_of_all_tasks_together():
    assert interquartile_mean(arrays([0, 1, 2, 3], [4, 5, 6, 70])) == (2 + 3 + 4 + 5) / 4
    rng = np.random.default_rng(0)
    scores = [rng.random(5), rng.random(9)]
    kept = np.sort(np.concatenate(scores))[14 // 4 : 14 - 14 // 4]
    assert interquartile_mean(scores) == pytest.approx(kept.mean())


def test_a_bootstrap_draws_within_each_task():
    """Tasks without spread have no interval, however far apart they lie; one run has none at all."""
    same = stratified_bootstrap([arrays([0.1] * 5, [0.9] * 5)], mean_of_all)
    assert same.value == same.low == same.high == pytest.approx(0.5)
    assert math.isnan(stratified_bootstrap([arrays([0.3], [0.9])], mean_of_all).low)


def test_an_interval_may_end_at_never():
    """As of a median that half of the draws never reach."""
    numbers, values = np.arange(4), np.array([1.0, 2, np.inf, np.inf])
    found = stratified_bootstrap([[numbers]], lambda arm: np.sort(values[arm[0]], axis=-1)[..., 1])
    assert (found.value, found.low, found.high) == (2, 1, math.inf)


def test_an_interval_of_one_task_is_that_of_scipy():
    scores = np.random.default_rng(1).random(12)
    ours = stratified_bootstrap([[scores]], mean_of_all, resamples=4000)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=4000, rng=0)
    error = scores.std() / math.sqrt(12)
    assert (ours.low, ours.high) == pytest.approx(theirs.confidence_interval, abs=0.1 * error)
    assert ours == stratified_bootstrap([[scores]], mean_of_all, resamples=4000)
    assert ours != stratified_bootstrap([[scores]], mean_of_all, seed=1, resamples=4000)


def test_the_probability_of_improvement_counts_pairs_of_the_same_task_and_ties_half():
    a, b = arrays([1, 2, 3], [5]), arrays([2, 2], [5])
    by_hand = [np.mean([(x > y) + 0.5 * (x == y) for x in s for y in t]) for s, t in zip(a, b, strict=True)]
    assert by_hand == [0.5, 0.5]
    assert probability_of_improvement(a, b) == 0.5
    rng = np.random.default_rng(2)
    x, y = rng.random(7).round(1), rng.random(4).round(1)
    pairs = [(p > q) + 0.5 * (p == q) for p, q in itertools.product(x, y)]
    assert probability_of_improvement([x], [y]) == pytest.approx(np.mean(pairs))
    assert probability_of_improvement([y], [x]) == pytest.approx(1 - np.mean(pairs))
    assert probability_of_improvement([x], [y]) == pytest.approx(stats.mannwhitneyu(x, y).statistic / 28)


def test_a_performance_profile_is_the_share_of_runs_above_each_threshold():
    scores, thresholds = arrays([0.2, 0.6], [0.6, 0.6, 0.9, 0.1]), np.array([0.0, 0.2, 0.6])
    assert performance_profile(scores, thresholds).tolist() == [1, (0.5 + 0.75) / 2, (0 + 0.25) / 2]
    low, high = profile_band(scores, thresholds, resamples=200)
    assert (low <= performance_profile(scores, thresholds)).all() and (high[0], low[0]) == (1, 1)


def test_pairs_are_runs_of_the_same_task_and_seed():
    """Seeds differ by far more than arms do, which pairs take out; all 2^6 signs, of which 2 are as far."""
    b = arrays([0.1, 0.5, 0.9], [0.2, 0.4, 0.8])
    a = [task + 0.01 for task in b]
    result = paired_difference(a, b)
    assert result.estimate.value == pytest.approx(0.01) and result.pairs == 6
    assert result.estimate.low == pytest.approx(result.estimate.high)
    assert result.p == 2 / 2**6
    assert paired_difference(b, b).p == 1.0
    with pytest.raises(ValueError):
        paired_difference(arrays([1, 2]), arrays([1, 2], [3]))


def test_p_values_are_corrected_by_the_steps_of_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_a_median_counts_runs_that_never_got_there():
    """Kaplan-Meier by hand: at 3, four of five are left at risk."""
    time, reached = np.array([2.0, 3, 5, 8, 9]), np.array([False, True, True, True, False])
    survival = {3: 3 / 4, 5: 3 / 4 * 2 / 3, 8: 3 / 4 * 2 / 3 / 2}
    assert survival[5] == 0.5 and median_time(time, reached) == 5
    assert median_time(np.array([1.0, 9, 9]), np.array([True, False, False])) == math.inf
    assert median_time(np.array([9.0]), np.array([False])) == math.inf
    assert median_time(np.array([4.0, 1, 2]), np.ones(3, bool)) == 2
    rng = np.random.default_rng(4)
    for _ in range(20):
        time, reached = rng.integers(1, 6, 9).astype(float), rng.random(9) < 0.6
        survival = stats.ecdf(stats.CensoredData.right_censored(time, ~reached)).sf
        below = survival.quantiles[survival.probabilities <= 0.5 + 1e-9]
        assert median_time(time, reached) == min(below, default=math.inf)
    draws = np.array([[0, 1, 2], [0, 0, 0]])
    assert median_time(np.array([1.0, 9, 9])[draws], np.array([True, False, False])[draws]).tolist() == [
        math.inf,
        1,
    ]


def test_a_curve_is_straight_between_evaluations_and_stays_at_its_end():
    cost, accuracy = np.array([0.0, 10, 20]), np.array([0.0, 1.0, 0.5])
    assert accuracy_at(cost, accuracy, 5) == 0.5 and accuracy_at(cost, accuracy, 99) == 0.5
    assert area_under_curve(cost, accuracy, 10) == 0.5
    assert area_under_curve(cost, accuracy, 15) == pytest.approx((5 + 5 * 0.875) / 15)
    assert area_under_curve(cost, accuracy, 40) == pytest.approx((5 + 7.5 + 10) / 40)
    assert area_under_curve(cost, accuracy, 0) == 0.0
    assert cost_to_threshold(cost, accuracy, 0.9) == (10, True)
    assert cost_to_threshold(cost, accuracy, 1.1) == (20, False)


def test_a_sigmoid_is_found_again_in_points_that_lie_on_it():
    cost = np.array([0, 1e9, 2e9, 4e9, 8e9, 16e9, 64e9])
    accuracy = np.append(0.2, sigmoid_at(cost[1:], 0.2, 0.9, 5e9, 2.0))
    assert accuracy[3] < 0.55 < accuracy[4]  # half of the gain lies between them
    found = fit_sigmoid(cost, accuracy, 0.2)
    assert (found.asymptote, found.midpoint, found.efficiency) == pytest.approx((0.9, 5e9, 2.0), rel=1e-4)
    assert found.residual < 1e-6
    assert fit_sigmoid(cost[:4], accuracy[:4], 0.2) is None  # too few
    assert fit_sigmoid(cost, np.full(7, 0.2), 0.2) is None


def test_intervals_of_a_sigmoid_hold_what_the_points_were_drawn_from():
    """And its least squares are those of scipy, begun at the truth."""
    rng, cost = np.random.default_rng(3), np.linspace(0, 10, 11)
    truth = (0.9, 3.0, 2.5)
    runs = []
    for _ in range(6):
        accuracy = np.append(0.3, sigmoid_at(cost[1:], 0.3, *truth) + 0.02 * rng.standard_normal(10))
        runs.append((cost, accuracy))
    found, intervals = fit_with_errors(runs, resamples=60)
    for name, value in zip(("asymptote", "midpoint", "efficiency"), truth, strict=True):
        low, high = intervals[name]
        assert low - 0.1 * (high - low) < value < high + 0.1 * (high - low), name
    x, y = np.tile(cost[1:], 6), np.concatenate([accuracy[1:] for _, accuracy in runs])
    theirs, _ = optimize.curve_fit(lambda c, *p: sigmoid_at(c, 0.3, *p), x, y, p0=truth)
    assert (found.asymptote, found.midpoint, found.efficiency) == pytest.approx(theirs, rel=1e-3)
