"""Statistics of runs: aggregates over tasks and seeds with their intervals, and comparisons of two arms.

Scores come as one array of seeds for each task, since tasks may have different numbers of runs. Runs are the
random sample, and tasks are fixed: a bootstrap draws the runs of every task anew from those of the same task
(stratified; Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
arXiv 2108.13264). Whatever draws random numbers is a function of its seed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from fr3e_jax.evaluation.statistics import sign_flip_p

Scores = Sequence[np.ndarray]
"""Float [..., seeds] of each task; axes before the last one are draws of a bootstrap."""
Statistic = Callable[..., np.ndarray]
"""Of the scores of one or several arms, float [...]: a number for each draw."""
RESAMPLES = 2000
LEVEL_OF_INTERVALS = 0.95
ROUNDED = 12  # decimals of differences of scores, so that those that are equal but for rounding are equal


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its interval. low, high: nan where no interval can be given."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The mean difference a - b over pairs of runs, with its interval and the two-sided p-value of a test.

    pairs: number of pairs of the same task and seed.
    """

    estimate: Estimate
    p: float
    pairs: int


def interquartile_mean(scores: Scores) -> np.ndarray:
    """Compute the mean of the middle half of all scores together.

    A quarter of them, rounded down, is left out at either end.
    """
    return stats.trim_mean(np.concatenate(scores, axis=-1), proportiontocut=0.25, axis=-1)


def mean_of_all(scores: Scores) -> np.ndarray:
    """Compute the mean over all runs of all tasks."""
    return np.concatenate(scores, axis=-1).mean(axis=-1)


def stratified_bootstrap(
    scores: Sequence[Scores], statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Compute a statistic with a percentile interval over runs that are drawn anew within each task.

    Args:
      scores: of one arm or of several, each [tasks][seeds]; arms are drawn independently of each other.
      statistic: takes the arms' scores as arguments, those of all draws at a time.
      seed: of the draws.
      resamples: number of draws.

    Returns:
      The statistic of the scores themselves. Its interval is nan where no task has two runs: one run says
      nothing of how much others would differ.
    """
    value = float(statistic(*scores))
    if all(len(task) < 2 for arm in scores for task in arm):
        return Estimate(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    drawn = [[task[rng.integers(len(task), size=(resamples, len(task)))] for task in arm] for arm in scores]
    low, high = middle(statistic(*drawn))
    return Estimate(value, float(low), float(high))


def middle(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the ends of the middle 95% of draws, float [draws, ...]; each is one of them, perhaps infinite."""
    ordered, tail = np.sort(drawn, axis=0), (1 - LEVEL_OF_INTERVALS) / 2
    least = int(tail * len(ordered))
    return ordered[least], ordered[len(ordered) - 1 - least]


def probability_of_improvement(a: Scores, b: Scores) -> np.ndarray:
    """Compute the chance that a run of a scores higher than a run of b on the same task, the mean over tasks.

    For a task it is the Mann-Whitney U statistic by the number of pairs of runs, in which a tie counts half.
    """
    chances = []
    for x, y in zip(a, b, strict=True):
        ours, theirs = x[..., :, None], y[..., None, :]
        chances.append((ours > theirs).mean(axis=(-1, -2)) + 0.5 * (ours == theirs).mean(axis=(-1, -2)))
    return np.mean(chances, axis=0)


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Compute the share of runs that score above each threshold, the mean over tasks.

    Args:
      scores: [tasks][..., seeds].
      thresholds: float [n].

    Returns:
      Float [..., n].
    """
    return np.mean([(task[..., None] > thresholds).mean(axis=-2) for task in scores], axis=0)


def profile_band(
    scores: Scores, thresholds: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the stratified bootstrap interval of a performance profile at each threshold.

    Returns:
      (low, high), float [n] each.
    """
    rng = np.random.default_rng(seed)
    drawn = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in scores]
    return middle(performance_profile(drawn, thresholds))


def paired_difference(a: Scores, b: Scores, seed: int = 0, resamples: int = RESAMPLES) -> PairedDifference:
    """Compare two arms by the pairs of their runs with the same task and the same seed.

    The p-value is that of a sign-flip permutation test over pairs. The interval is a stratified bootstrap of
    the pairs.

    Args:
      a, b: [tasks][seeds], seeds in the same order.

    Raises:
      ValueError: the numbers of runs differ.
    """
    differences = [np.round(x - y, ROUNDED) for x, y in zip(a, b, strict=True)]
    estimate = stratified_bootstrap([differences], mean_of_all, seed, resamples)
    every = np.concatenate(differences)
    return PairedDifference(estimate, sign_flip_p(every[every != 0], 10_000, seed), len(every))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), so that the chance of any false finding is kept.

    The smallest of n is multiplied by n, the next by n - 1 and so on; none becomes smaller than one before
    it, or larger than 1.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()


def median_time(time: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Compute the median cost to an event by the Kaplan-Meier estimator.

    Args:
      time: float [..., n], cost at which the event came, or up to which it had not come.
      reached: bool [..., n], whether it came. The others are censored: they count as not reached up to their
        cost, and at the same cost as leaving after those that reached it.

    Returns:
      Float [...], the smallest cost by which half of the runs have reached it; infinity where half never did.
    """
    order = np.lexsort((~reached, time), axis=-1)
    time, reached = (np.take_along_axis(x, order, axis=-1) for x in (time, reached))
    at_risk = np.arange(time.shape[-1], 0, -1)
    surviving = np.cumprod(1 - reached / at_risk, axis=-1)
    return np.where(surviving <= 0.5 + 1e-9, time, np.inf).min(axis=-1)
