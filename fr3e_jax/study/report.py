"""The report of studies: a page with tables, and figures, made from the results file alone."""

import math
from itertools import product
from pathlib import Path

from rich.console import Console

from fr3e_jax.config import ConfigError
from fr3e_jax.run.storage import StorageError, brief, write_atomically
from fr3e_jax.study.analysis import EQUAL, Analysis, analyse, commits_of
from fr3e_jax.study.figures import draw_figures
from fr3e_jax.study.results import Results
from fr3e_jax.study.scores import SCORES
from fr3e_jax.study.statistics import Estimate

PAGE, FIGURES = "report.md", "figures"
COSTS = {"tokens": "tokens", "flops": "FLOPs"}
AREA_COLUMNS = tuple(f"{what}, equal {COSTS[cost]}" for what, cost in product(SCORES, EQUAL))
NOTES = (
    "How to read it:\n",
    "- Equal cost: the runs on a task are compared at the most tokens, or FLOPs, that each of them tells of. "
    "The curve of a run that reached its accuracy stays where it ended; of the others the one that ended "
    "first is decisive.",
    "- FLOPs are those of rollouts, updates and all other passes; tokens are all that are drawn.",
    "- Accuracy of an arm: the interquartile mean over tasks and seeds. Intervals are 95% stratified "
    "bootstrap intervals, runs drawn anew within each task.",
    "- Area: the mean accuracy on the way to equal cost.",
    "- Probability of improvement: that a run of the arm scores higher than one of the reference on the "
    "same task, ties half.",
    "- Difference: the mean over pairs of the same task and seed, in points of accuracy; p by a sign-flip "
    "test over pairs. Holm p corrects for all comparisons of the study; only it decides.",
    "- Tokens to the threshold: the median by Kaplan-Meier. A run that ends without reaching it counts as "
    "not reached up to its end.",
    "- A run that failed counts with what it had reached, and its arm is marked.\n",
)


def write_report(results: Results, out: Path, seed: int, console: Console) -> None:
    """Draw figures and page of all studies of a results file into its directory.

    Args:
      out: directory.
      seed: of all resamples.

    Raises:
      StorageError: a file cannot be written.
    """
    parts = ["# Results\n", "Made from `results.jsonl` by `python -m fr3e_jax.study --report`.\n", *NOTES]
    for name in sorted(results.studies):
        runs = results.of(name)
        analysis = analyse(results.studies[name], runs, results.values_of(name), seed)
        try:
            figures = draw_figures(analysis, out / FIGURES, seed)
        except ConfigError as error:
            figures = []
            console.print(f"{error}; the page is written without figures", markup=False)
        except OSError as error:
            raise StorageError(f"{out / FIGURES} cannot be written ({brief(error)})") from None
        parts.append(section(analysis, figures))
    try:
        write_atomically(out / PAGE, "\n".join(parts))
    except OSError as error:
        raise StorageError(f"{out / PAGE} cannot be written ({brief(error)})") from None
    console.print(f"page: {out / PAGE}", markup=False)


def section(analysis: Analysis, figures: list[tuple[str, str]]) -> str:
    """The part of the page that is about one study."""
    header = analysis.header
    lines = [f"## {header.study}", "", f"**{' '.join(header.question.split())}**", ""]
    if header.expected:
        lines += [f"Expected before the first run: {' '.join(header.expected.split())}", ""]
    if not analysis.arms:
        return "\n".join([*lines, "No run is evaluated yet.", "", *failures(analysis)])
    code = ", ".join(commits_of(analysis.runs)) or "an unknown commit"
    lines += [f"{len(analysis.runs)} runs, {analysis.seeds()} an arm and task; code at {code}.", ""]
    for part in (arms_table, comparisons_table, tasks_table, fits_table, values_table, failures):
        lines += part(analysis)
    for file, what in figures:
        lines += [f"![{header.study}: {what}]({FIGURES}/{file})", ""]
    if not figures:
        lines += ["No figures: a single run of each arm has no interval, or matplotlib is missing.", ""]
    return "\n".join(lines)


def arms_table(analysis: Analysis) -> list[str]:
    """Rows of the arms over all tasks."""
    metrics = analysis.header.metrics
    head = ["arm", "runs", *AREA_COLUMNS, "learning rate", *metrics]
    rows = []
    for arm in analysis.arms:
        name = f"{arm.arm} ({arm.failed} failed)" if arm.failed else arm.arm
        rate = "as set" if arm.rate is None else f"{arm.rate:g}"
        values = [*map(percent_of, arm.scores.values()), rate]
        of_metrics = [shown_number(arm.metrics[name]) if name in arm.metrics else "" for name in metrics]
        rows.append([name, str(arm.runs), *values, *of_metrics])
    return markdown(head, rows)


def comparisons_table(analysis: Analysis) -> list[str]:
    """Rows of the comparisons with the reference."""
    if not analysis.comparisons:
        return []
    reference = analysis.header.reference
    each = analysis.header.compare == "each_task"
    head = [
        *(["task"] if each else []),
        f"against {reference}",
        "at equal",
        "probability of improvement",
        "difference",
        "pairs",
        "p",
        "Holm p",
    ]
    rows = []
    for one in analysis.comparisons:
        difference = one.difference
        rows.append(
            [
                *([one.task] if each else []),
                one.arm,
                COSTS[one.cost],
                shown_number(one.improvement, 2),
                percent_of(difference.estimate, signed=True),
                str(difference.pairs),
                f"{difference.p:.3f}",
                f"{one.corrected:.3f}",
            ]
        )
    count = len(analysis.comparisons)
    by = {"area": "the area", "accuracy": "the accuracy"}[analysis.header.judged_by]
    said = f"Arms are compared by {by}. Holm p is corrected for {count} comparison{'s' * (count != 1)}."
    return [*markdown(head, rows), said, ""]


def tasks_table(analysis: Analysis) -> list[str]:
    """Rows of each arm on each task."""
    head = ["task", "arm", "seeds", *AREA_COLUMNS]
    head += [f"tokens to {analysis.header.threshold:.0%}", "reached by"]
    rows = [
        [
            one.task,
            one.arm,
            str(one.runs),
            *map(percent_of, one.scores.values()),
            tokens_of(one.median),
            f"{one.reached} of {one.runs}",
        ]
        for one in analysis.tasks
    ]
    return markdown(head, rows)


def fits_table(analysis: Analysis) -> list[str]:
    """Rows of the sigmoids over FLOPs, of the arms and tasks that one was found for."""
    head = ["task", "arm", "asymptote", "FLOPs at half of the gain", "exponent", "residual"]
    rows = []
    for one in analysis.tasks:
        if one.fit is None:
            continue
        fit, errors = one.fit
        values = ((name, getattr(fit, name)) for name in ("asymptote", "midpoint", "efficiency"))
        shown = [f"{value:.3g}{bounds(*errors[name])}" for name, value in values]
        rows.append([one.task, one.arm, *shown, f"{fit.residual:.3f}"])
    return markdown(head, rows) if rows else []


VALUES_COLUMNS = {
    "variance": "variance of V",
    "binomial": "V (1 - V) / M",
    "bias": "bias of V",
    "accepted": "accepted",
    "missed": "missed",
    "accepted_error": "error of V, accepted",
    "tokens": "tokens",
}


def values_table(analysis: Analysis) -> list[str]:
    """Rows of what M rollouts tell of the value of a state under the starting model."""
    if not analysis.values:
        return []
    rows = []
    for m, means in analysis.values.items():
        shown = [shown_number(means[name], 0 if name == "tokens" else 4) for name in VALUES_COLUMNS]
        rows.append([str(m), *shown])
    said = (
        "V(S_j) by M rollouts of the starting model, against all other rollouts from the same state. "
        "Accepted: share of estimates whose rewards differ, which a run would train on. Missed: share that "
        "it would not, of states whose rewards differ somewhere. Error: absolute, of the accepted."
    )
    return [said, "", *markdown(["M", *VALUES_COLUMNS.values()], rows)]


def failures(analysis: Analysis) -> list[str]:
    """Lines on the runs that failed, each with its reason."""
    lines = [f"- {run.task}, {run.arm}, seed {run.seed}: {run.reason}" for run in analysis.failed]
    return ["Failed:", "", *lines, ""] if lines else []


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown, and an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def bounds(low: float, high: float) -> str:
    """An interval behind its value; nothing where there is none."""
    return "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"


def percent_of(estimate: Estimate, signed: bool = False) -> str:
    """A share as points of a hundred, with its interval."""
    sign = "+" if signed else ""
    shown = f"{100 * estimate.value:{sign}.1f}"
    if math.isnan(estimate.low):
        return shown
    return f"{shown} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f})"


def shown_number(estimate: Estimate, digits: int = 3) -> str:
    """A number with its interval."""
    shown = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return shown
    return f"{shown} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def tokens_of(estimate: Estimate) -> str:
    """A median of tokens, with its interval."""

    def one(value: float) -> str:
        return "never" if math.isinf(value) else f"{value:,.0f}"

    if math.isnan(estimate.low):
        return one(estimate.value)
    return f"{one(estimate.value)} ({one(estimate.low)} to {one(estimate.high)})"
