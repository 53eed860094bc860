"""Figures of a study as SVG, the same bytes for the same results: without a date, and without random names.

Every figure shows intervals and says its number of seeds. Without an interval there is no figure.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
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
        if (metric := analysis.header.scatter) is not None:
            file = f"{name}-scatter.svg"
            save(draw_scatter(figure_class, analysis, metric), folder / file)
            figures.append((file, f"the score of each arm over {metric}"))
        if analysis.values:
            file = f"{name}-values.svg"
            save(draw_values(figure_class, analysis), folder / file)
            figures.append((file, "how well M rollouts tell V(S_j), and at which cost"))
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
        shorten(panel)
    panels[0].set(ylabel="held-out accuracy", ylim=(0, 1.02))
    panels[-1].legend(frameon=False)
    figure.suptitle(
        f"{analysis.header.study}: interquartile mean of {analysis.seeds()}, 95% intervals", fontsize=9
    )
    return figure


def shorten(panel: Any) -> None:
    """Write large numbers under a panel as 200k or 1.5M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_arms(figure_class: Any, analysis: Analysis) -> Any:
    """Arms at equal cost with their intervals, and their probability of improvement over the reference."""
    rows, reference = len(analysis.header.arms), analysis.header.reference
    compared = list(dict.fromkeys(comparison.task for comparison in analysis.comparisons))
    figure = figure_class(figsize=(6.4 + 3.2 * len(compared), 1.4 + 0.3 * rows), layout="constrained")
    panels = figure.subplots(1, 2 + len(compared), sharey=True)
    height = {arm: rows - i for i, arm in enumerate(analysis.header.arms)}
    for panel, cost in zip(panels, EQUAL, strict=False):
        for arm in analysis.arms:
            interval(panel, arm.scores[analysis.header.judged_by, cost], height[arm.arm], "C0")
        panel.set(xlabel=f"{analysis.header.judged_by}, equal {'FLOPs' if cost == 'flops' else cost}")
    for comparison in analysis.comparisons:
        shift, color = (0.12, "C0") if comparison.cost == "tokens" else (-0.12, "C1")
        panel = panels[2 + compared.index(comparison.task)]
        interval(panel, comparison.improvement, height[comparison.arm] + shift, color)
    for task, panel in zip(compared, panels[2:], strict=True):
        panel.axvline(0.5, color="gray", lw=0.8, ls=":")
        panel.set(xlabel=f"probability of improvement over {reference}", xlim=(-0.02, 1.02))
        on = f"{task}, " if task else ""
        panel.set_title(f"{on}blue: equal tokens, orange: equal FLOPs", fontsize=8)
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


def draw_scatter(figure_class: Any, analysis: Analysis, metric: str) -> Any:
    """The score of each arm at equal tokens over a metric of its runs, both with their intervals."""
    figure = figure_class(figsize=(5.6, 3.8), layout="constrained")
    panel, judged_by = figure.subplots(), analysis.header.judged_by
    for number, arm in enumerate(analysis.arms):
        if metric in arm.metrics:
            cross(panel, arm.metrics[metric], arm.scores[judged_by, "tokens"], f"C{number % 10}", arm.arm)
    panel.set(xlabel=f"{metric}, mean over steps", ylabel=f"{judged_by}, equal tokens")
    panel.legend(frameon=False, fontsize=7)
    panel.set_title(f"{analysis.header.study}: {analysis.seeds()}, 95% intervals", fontsize=9)
    return figure


def cross(panel: Any, x: Estimate, y: Estimate, color: str, label: str) -> None:
    """Draw a point with the intervals of both of its numbers, where they have one."""
    panel.plot([x.value], [y.value], "o", color=color, ms=4, label=label)
    if not math.isnan(x.low):
        panel.plot([x.low, x.high], [y.value, y.value], color=color, lw=1.2)
    if not math.isnan(y.low):
        panel.plot([x.value, x.value], [y.low, y.high], color=color, lw=1.2)


def draw_values(figure_class: Any, analysis: Analysis) -> Any:
    """Variance of V(S_j) over M, states that are accepted and missed, and the error over its cost."""
    figure = figure_class(figsize=(10.2, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    sizes = list(analysis.values)
    lines = (
        ("variance", "variance between estimates"),
        ("binomial", "V (1 - V) / M"),
        ("accepted", "accepted: rewards differ"),
        ("missed", "missed: rewards equal, but not of more rollouts"),
    )
    for number, (name, label) in enumerate(lines):
        panel = panels[0] if number < 2 else panels[1]
        curve(panel, sizes, [analysis.values[m][name] for m in sizes], f"C{number}", label)
    tokens = [analysis.values[m]["tokens"].value / analysis.values[m]["accepted"].value for m in sizes]
    errors = [analysis.values[m]["accepted_error"] for m in sizes]
    curve(panels[2], tokens, errors, "C4", "error of V, accepted states")
    for m, x, error in zip(sizes, tokens, errors, strict=True):
        panels[2].annotate(
            f"M = {m}", (x, error.value), textcoords="offset points", xytext=(4, 4), fontsize=7
        )
    panels[0].set(xlabel="M", ylabel="variance of V(S_j)", xscale="log", yscale="log")
    panels[1].set(xlabel="M", ylabel="share of states", xscale="log", ylim=(0, 1))
    panels[2].set(xlabel="tokens for each accepted state", ylabel="absolute error of V(S_j)")
    for panel in panels[:2]:
        panel.set_xticks(sizes, [str(m) for m in sizes])
        panel.minorticks_off()
    for panel in panels:
        panel.legend(frameon=False, fontsize=7)
    figure.suptitle(
        f"{analysis.header.study}: starting model, {len(analysis.header.seeds)} seeds, 95% intervals",
        fontsize=9,
    )
    return figure


def curve(panel: Any, x: Sequence[float], y: Sequence[Estimate], color: str, label: str) -> None:
    """Draw estimates with their intervals as a line."""
    panel.plot(x, [one.value for one in y], "o-", color=color, ms=3, lw=1, label=label)
    for at, one in zip(x, y, strict=True):
        if not math.isnan(one.low):
            panel.plot([at, at], [one.low, one.high], color=color, lw=1.2)
