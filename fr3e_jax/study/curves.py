"""Held-out accuracy over what it cost: at a budget, on average up to it, to a threshold, and as a sigmoid.

A curve has a point for each evaluation of a run. Between two evaluations it is a straight line, and after the
last one it stays where it is.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import optimize

FIT_RESAMPLES = 100
FEWEST_POINTS = 5  # of a curve that three numbers are fitted to


def accuracy_at(cost: np.ndarray, accuracy: np.ndarray, budget: float) -> float:
    """Compute the accuracy at a budget.

    Args:
      cost: float [n] of each evaluation, ascending from 0. accuracy: float [n].
      budget: in the unit of cost.
    """
    return float(np.interp(budget, cost, accuracy))


def area_under_curve(cost: np.ndarray, accuracy: np.ndarray, budget: float) -> float:
    """Compute the mean accuracy over costs from 0 to a budget: the area under the curve by its width.

    Args: as `accuracy_at`.
    """
    if budget <= 0:
        return float(accuracy[0])
    inside = cost < budget
    x = np.append(cost[inside], budget)
    y = np.append(accuracy[inside], accuracy_at(cost, accuracy, budget))
    return float(np.trapezoid(y, x) / budget)


def cost_to_threshold(cost: np.ndarray, accuracy: np.ndarray, threshold: float) -> tuple[float, bool]:
    """Find the cost of the first evaluation at which the accuracy is at least a threshold.

    Returns:
      (the cost, True); where it never is, (the cost of the last evaluation, False): the run is censored.
    """
    reached = np.flatnonzero(accuracy >= threshold)
    return (float(cost[reached[0]]), True) if reached.size else (float(cost[-1]), False)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """A saturating curve of accuracy over compute (ScaleRL, arXiv 2510.13786, equation 1).

    accuracy(C) = start + (asymptote - start) / (1 + (midpoint / C) ** efficiency).

    start: accuracy before training. asymptote: accuracy at unlimited compute. midpoint: compute at which half
    of the gain is made. efficiency: exponent, which is larger where the curve is steeper. residual: root mean
    square of what is left between curve and points.
    """

    start: float
    asymptote: float
    midpoint: float
    efficiency: float
    residual: float


def sigmoid_at(
    cost: np.ndarray, start: float, asymptote: float, midpoint: float, efficiency: float
) -> np.ndarray:
    """Compute the accuracy of a sigmoid at costs above 0, float [n]."""
    return start + (asymptote - start) / (1 + (midpoint / cost) ** efficiency)


def fit_sigmoid(
    cost: np.ndarray, accuracy: np.ndarray, start: float, near: Sigmoid | None = None
) -> Sigmoid | None:
    """Fit a sigmoid by least squares.

    Args:
      cost: float [n], of the evaluations of one run or several; those at cost 0 are left out.
      accuracy: float [n].
      start: accuracy before training, which the curve begins at.
      near: a curve of which another one is looked for nearby.

    Returns:
      The curve, whose asymptote lies between 0 and 1; None where fewer than five points are left, where the
      accuracy is the same everywhere, or where no curve is found.
    """
    x, y = cost[cost > 0], accuracy[cost > 0]
    if len(x) < FEWEST_POINTS or np.ptp(y) == 0:
        return None
    largest = float(x.max())

    def curve(scaled: np.ndarray, asymptote: float, log_midpoint: float, efficiency: float) -> np.ndarray:
        return sigmoid_at(scaled, start, asymptote, np.exp(log_midpoint), efficiency)

    first = (float(y.max()), float(np.log(0.3)), 1.5)
    if near is not None:
        first = (near.asymptote, float(np.log(near.midpoint / largest)), near.efficiency)
    bounds = ([0.0, np.log(1e-4), 0.05], [1.0, np.log(1e3), 20.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (asymptote, log_midpoint, efficiency), _ = optimize.curve_fit(
                curve, x / largest, y, p0=np.clip(first, *bounds), bounds=bounds, max_nfev=5000
            )
        except RuntimeError:
            return None
    left = curve(x / largest, asymptote, log_midpoint, efficiency) - y
    midpoint = float(np.exp(log_midpoint)) * largest
    return Sigmoid(
        start, float(asymptote), midpoint, float(efficiency), float(np.sqrt(np.mean(np.square(left))))
    )


def fit_with_errors(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0, resamples: int = FIT_RESAMPLES
) -> tuple[Sigmoid, dict[str, tuple[float, float]]] | None:
    """Fit one sigmoid to the curves of several runs, with intervals of its three numbers.

    Whole runs are drawn anew, since the points of a run depend on each other.

    Args:
      curves: (cost, accuracy) of each run, both float [n] and from cost 0 on.
      seed: of the draws.
      resamples: number of draws.

    Returns:
      (the curve, name -> (low, high) of its 95% interval); None where no curve is found.
    """
    whole = fit_runs(curves)
    if whole is None:
        return None
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if len(curves) > 1 else 0):
        chosen = rng.integers(len(curves), size=len(curves))
        fitted = fit_runs([curves[i] for i in chosen], whole)
        if fitted is not None:
            drawn.append((fitted.asymptote, fitted.midpoint, fitted.efficiency))
    names = ("asymptote", "midpoint", "efficiency")
    if not drawn:
        return whole, dict.fromkeys(names, (float("nan"), float("nan")))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return whole, {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def fit_runs(curves: Sequence[tuple[np.ndarray, np.ndarray]], near: Sigmoid | None = None) -> Sigmoid | None:
    """Fit one sigmoid to the points of several runs; it begins at their mean accuracy before training."""
    cost, accuracy = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    return fit_sigmoid(cost, accuracy, float(np.mean([y[0] for _, y in curves])), near)
