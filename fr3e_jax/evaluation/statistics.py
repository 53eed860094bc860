"""Statistics of verdicts: means, and how uncertain they are.

Problems are the random sample, and answers to the same problem depend on each other: standard errors,
intervals and tests are over problems (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640). Whatever
draws random numbers is a function of its seed.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
DRAWN_AT_A_TIME = 2**22  # numbers that are drawn at a time, which bounds memory


@dataclasses.dataclass(frozen=True)
class Paired:
    """The result of a paired test of a against b.

    difference: of the means, a - b. low, high: its interval. p: two-sided p-value.
    """

    difference: float
    low: float
    high: float
    p: float


def avg_at_k(right: np.ndarray) -> tuple[float, float]:
    """Compute the mean over problems of the share of right answers, and its standard error.

    The standard error clusters by problem. With the same k for all of them that is the standard deviation of
    the problems' means, with ddof 1, by the square root of their number.

    Args:
      right: bool [problems, k].

    Returns:
      (mean, standard error); the latter is nan for one problem.
    """
    means = _means(right)
    if len(means) == 1:
        return float(means[0]), float("nan")
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def bootstrap_interval(
    right: np.ndarray, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Compute a bootstrap interval of avg_at_k: percentiles of the mean over problems drawn with replacement.

    Args:
      right: bool [problems, k].
      level: share of such intervals that hold the true mean.
      draws: number of times that the problems are drawn.
      seed: of the draws.

    Returns:
      (low, high); nan for one problem, which says nothing of others.
    """
    return _interval(_means(right), level, draws, seed)


def pass_at_k(right: np.ndarray, k: int) -> float:
    """Compute the chance that one of k answers is right, drawn without replacement from all n.

    1 - C(n - c, k) / C(n, k) with c right ones, mean over problems (Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", arXiv 2107.03374, equation 1). C(n - c, k) / C(n, k) is the product over
    j < c of 1 - k / (n - j), so no large number occurs; the factor n - j = k is 0, and with it what follows.

    Args:
      right: bool [problems, n].
      k: at most n.

    Raises:
      ValueError: k is below 1 or above n.
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs between 1 and the {n} answers that there are to each problem")
    none_right = np.concatenate([[1.0], np.cumprod(1 - k / (n - np.arange(n)))])
    return float(np.mean(1 - none_right[right.sum(axis=1)]))


def maj_at_k(extracted: Sequence[Sequence[str]], right: np.ndarray) -> float:
    """Compute the share of problems that a majority vote gets right (Wang et al. 2022, arXiv 2203.11171).

    Answers are the same if their extracted texts are, but for white space; those of which nothing could be
    extracted have no vote. Of tied winners each is as likely: the value is expected. A winner counts by the
    share of its voters whose verdict is right, as one that was cut off is wrong whatever it says.

    Args:
      extracted: [problems][k], what was judged.
      right: bool [problems, k].
    """
    return float(np.mean([_vote(texts, row) for texts, row in zip(extracted, right, strict=True)]))


def paired_test(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """Test whether two evaluations of the same problems differ.

    If neither is better, each problem's difference is as likely to have the other sign. The p-value is the
    share of all choices of signs whose mean is as far from 0 (sign-flip permutation test, Fisher 1935). All
    are tried where there are at most `draws`; else `draws` are drawn, and what was seen counts as one more
    (Phipson and Smyth 2010). Problems without a difference are left out of it: a sign changes nothing there.

    Args:
      a: [problems] bool [k]; problems may have different k, as those of several benchmarks.
      b: [problems] bool [k], of the same problems in the same order.
      level: of the interval, a bootstrap over problems of their differences.
      draws: of signs, and of problems.
      seed: of both.

    Raises:
      ValueError: the numbers of problems differ.
    """
    if len(a) != len(b):
        raise ValueError(f"evaluations of {len(a)} and {len(b)} problems cannot be paired")
    # In units whose sums are exact: choices of signs that give the same mean must count as the same.
    unit = math.lcm(*{len(row) for row in [*a, *b]})
    shares = [[int(row.sum()) * (unit // len(row)) for row in side] for side in (a, b)]
    scaled = np.array(shares[0], np.float64) - np.array(shares[1], np.float64)
    differences = scaled / unit
    low, high = _interval(differences, level, draws, seed)
    return Paired(float(differences.mean()), low, high, sign_flip_p(scaled[scaled != 0], draws, seed))


def _means(right: np.ndarray) -> np.ndarray:
    """Compute the share of right answers to each problem, float [problems]."""
    return np.asarray(right, np.float64).mean(axis=1)


def _interval(values: np.ndarray, level: float, draws: int, seed: int) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the mean of float [n] (Efron and Tibshirani 1993)."""
    if len(values) == 1:
        return float("nan"), float("nan")
    from scipy import stats  # takes a while, and training needs none of it

    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=draws,
        batch=max(1, DRAWN_AT_A_TIME // len(values)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def sign_flip_p(differences: np.ndarray, draws: int, seed: int) -> float:
    """Compute the p-value of differences float [n], none of which is 0."""
    if len(differences) < 2:
        return 1.0  # either sign is as far from 0
    from scipy import stats

    test = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=draws,
        batch=max(1, DRAWN_AT_A_TIME // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _vote(extracted: Sequence[str], right: np.ndarray) -> float:
    """Compute the expected verdict on the winning answer to one problem."""
    voters = [(" ".join(text.split()), bool(verdict)) for text, verdict in zip(extracted, right, strict=True)]
    votes = Counter(text for text, _ in voters if text)
    if not votes:
        return 0.0
    most = max(votes.values())
    winning = [verdict for text, verdict in voters if votes[text] == most]
    return sum(winning) / len(winning)
