"""Figures of a study as SVG, the same bytes for the same results: without a date, and without random names.

Every figure shows intervals and says its number of seeds. Without an interval there is no figure.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fr3e_jax.config import ConfigError
from fr3e_jax.study.analysis import EQUAL, Analysis, equal_cost_score
from fr3e_jax.study.curves import accuracy_at
from fr3e_jax.study.results import AXES
from fr3e_jax.study.scores import scores_by_task
from fr3e_jax.study.statistics import Estimate, middle, performance_profile, profile_band

POINTS = 41  # of a curve
BAND_RESAMPLES = 500
AXIS_LABELS = {"tokens": "generated tokens", "flops": "FLOPs of rollouts and updates", "seconds": "seconds"}


def draw_figures(analysis: Analysis, folder: Path, seed: int) -> list[tuple[str, str]]:
    """Draw the figures of a study.

    Args:
      folder: that they are written to.
      seed: of the resamples.

    Returns:
      (name of the file, what it shows) of each figure; none where there is a single run of every arm.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    scores = [score for arm in analysis.arms for score in arm.scores.values()]
    if all(math.isnan(score.low) for score in scores):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    name, figures = analysis.header.study, []
    with style() as figure_class:
        for axis in AXES:
            file = f"{name}-{axis}.svg"
            save(draw_curves(figure_class, analysis, axis, seed), folder / file)
            figures.append((file, f"held-out accuracy over {AXIS_LABELS[axis]}"))
        file = f"{name}-arms.svg"
        save(draw_arms(figure_class, analysis), folder / file)
        figures.append((file, "arms at equal cost, and the comparison with the reference"))
        file = f"{name}-profile.svg"
        save(draw_profiles(figure_class, analysis, seed), folder / file)
        figures.append((file, "share of runs above a score"))
    return figures


@contextlib.contextmanager
def style() -> Iterator[Any]:
    """Give the class of figures, with matplotlib's own settings in place of the user's.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'fr3e_jax[plot]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "fr3e_jax",
                "svg.fonttype": "none",
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
            }
        )
        yield Figure


def save(figure: Any, file: Path) -> None:
    """Write a figure without date and version."""
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def draw_curves(figure_class: Any, analysis: Analysis, axis: str, seed: int) -> Any:
    """Accuracy over cost, a panel for each task: interquartile mean over seeds with its 95% interval."""
    tasks = list(analysis.budgets["tokens"])
    figure = figure_class(figsize=(1.2 + 3.4 * len(tasks), 3.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, tasks, strict=True):
        of_task = [run for run in analysis.runs if run.task == task]
        grid = np.linspace(0, max(run.curve[axis][-1] for run in of_task), POINTS)
        for number, arm in enumerate(analysis.header.arms):
            runs = [run for run in of_task if run.arm == arm]
            if not runs:
                continue
            values = np.array([[accuracy_at(*run.over(axis), cost) for cost in grid] for run in runs])
            # Where runs end without being decided, the curve ends with the first of them.
            ends = [run.curve[axis][-1] for run in runs if not run.decided]
            shown = grid <= min(ends, default=math.inf)
            rng = np.random.default_rng(seed)
            drawn = rng.integers(len(runs), size=(BAND_RESAMPLES, len(runs)))
            bands = stats.trim_mean(values[drawn], 0.25, axis=1)
            low, high = middle(bands)
            center = stats.trim_mean(values, 0.25, axis=0)
            panel.plot(grid[shown], center[shown], color=f"C{number % 10}", label=arm)
            if len(runs) > 1:
                panel.fill_between(
                    grid[shown], low[shown], high[shown], color=f"C{number % 10}", alpha=0.2, lw=0
                )
        panel.set(title=task, xlabel=AXIS_LABELS[axis])
    panels[0].set(ylabel="held-out accuracy", ylim=(0, 1.02))
    panels[-1].legend(frameon=False)
    figure.suptitle(
        f"{analysis.header.study}: interquartile mean of {analysis.seeds()}, 95% intervals", fontsize=9
    )
    return figure


def draw_arms(figure_class: Any, analysis: Analysis) -> Any:
    """Arms at equal cost with their intervals, and their probability of improvement over the reference."""
    rows, reference = len(analysis.header.arms), analysis.header.reference
    figure = figure_class(figsize=(9.6, 1.4 + 0.3 * rows), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    height = {arm: rows - i for i, arm in enumerate(analysis.header.arms)}
    for panel, cost in zip(panels, EQUAL, strict=False):
        for arm in analysis.arms:
            interval(panel, arm.scores[analysis.header.judged_by, cost], height[arm.arm], "C0")
        panel.set(xlabel=f"{analysis.header.judged_by}, equal {'FLOPs' if cost == 'flops' else cost}")
    for comparison in analysis.comparisons:
        shift, color = (0.12, "C0") if comparison.cost == "tokens" else (-0.12, "C1")
        interval(panels[2], comparison.improvement, height[comparison.arm] + shift, color)
    panels[2].axvline(0.5, color="gray", lw=0.8, ls=":")
    panels[2].set(xlabel=f"probability of improvement over {reference}", xlim=(-0.02, 1.02))
    panels[2].set_title("blue: equal tokens, orange: equal FLOPs", fontsize=8)
    panels[0].set_yticks(list(height.values()), list(height))
    panels[0].set_ylim(0.4, rows + 0.6)
    figure.suptitle(
        f"{analysis.header.study}: interquartile mean over tasks and {analysis.seeds()}, 95% stratified "
        "bootstrap intervals",
        fontsize=9,
    )
    return figure


def interval(panel: Any, estimate: Estimate, height: float, color: str) -> None:
    """Draw an estimate with its interval; nothing where it has none."""
    if not math.isnan(estimate.low):
        panel.plot([estimate.low, estimate.high], [height, height], color=color, lw=2)
        panel.plot([estimate.value], [height], color=color, marker="|", ms=9, mew=2)


def draw_profiles(figure_class: Any, analysis: Analysis, seed: int) -> Any:
    """The share of runs above each score at equal tokens, with pointwise intervals."""
    figure = figure_class(figsize=(4.8, 3.2), layout="constrained")
    panel, tasks = figure.subplots(), list(analysis.budgets["tokens"])
    thresholds = np.linspace(0, 1, POINTS)
    for number, arm in enumerate(analysis.header.arms):
        scores = scores_by_task(
            analysis.runs, arm, tasks, equal_cost_score(analysis.header.judged_by, "tokens", analysis.budgets)
        )
        if not scores:
            continue
        low, high = profile_band(scores, thresholds, seed, BAND_RESAMPLES)
        panel.plot(thresholds, performance_profile(scores, thresholds), color=f"C{number % 10}", label=arm)
        panel.fill_between(thresholds, low, high, color=f"C{number % 10}", alpha=0.2, lw=0)
    panel.set(
        xlabel=f"{analysis.header.judged_by}, equal tokens",
        ylabel="share of runs above it",
        ylim=(-0.02, 1.02),
    )
    panel.legend(frameon=False)
    panel.set_title(f"{analysis.header.study}: {analysis.seeds()}, 95% intervals", fontsize=9)
    return figure
