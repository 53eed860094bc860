"""Two evaluations compared: whether both were asked the same, and whether one is better."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.report import add_columns, percent
from fr3e_jax.evaluation.scores import HowAsked, Score, defined, read_answers, scores_of
from fr3e_jax.evaluation.statistics import paired_test

HOW_ASKED = (
    "template",
    "stop",
    "compute_dtype",
    "temperature",
    "top_k",
    "top_p",
    "max_response",
    "seed",
    "success_at",
)
"""Settings of which a difference makes a comparison one of the settings, not of the models."""

LEVEL = 0.05  # a p-value of at most this decides
ALL = "all"


def compare(
    path_a: Path, path_b: Path, anyway: bool = False, warn: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Tell whether one of two evaluations is better, on each benchmark and on all problems together.

    Args:
      path_a: answers.jsonl of one.
      path_b: of the other. The benchmarks that both have are compared.
      anyway: compare them although they were asked differently, on the problems that both have.
      warn: shows a line on lines that are skipped.

    Raises:
      ConfigError: they have no benchmark in common, or were asked differently.
    """
    scores_a, scores_b = (scores_of(read_answers(path, warn)) for path in (path_a, path_b))
    both = [name for name in scores_a if name in scores_b]
    if not both:
        raise ConfigError(f"{path_a} and {path_b} have no benchmark in common; evaluate both on one suite")
    differ = {name: differences(scores_a[name].how_asked, scores_b[name].how_asked) for name in both}
    if not anyway:
        refuse_differences(differ)
    pairs = {name: _paired(scores_a[name], scores_b[name]) for name in both}
    rows = [_row(name, *pair) | {"differ": differ[name]} for name, pair in pairs.items()]
    if len(pairs) > 1:
        every = {name: values for row in rows for name, values in row["differ"].items()}
        each = ([row for pair in pairs.values() for row in pair[side]] for side in (0, 1))
        rows.append(_row(ALL, *each) | {"differ": every})
    return rows


def check_comparison(
    directory: Path,
    planned: Mapping[str, HowAsked],
    anyway: bool,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Refuse a comparison that could not be made, before anything is asked.

    Args:
      directory: of the evaluation to compare with.
      planned: benchmark -> how it is going to be asked.
      anyway: whether evaluations that were asked differently are compared.
      warn: shows a line on lines that are skipped.

    Raises:
      ConfigError: the directory holds no answers to any of the benchmarks, or to one that was asked
        differently.
    """
    path = directory / "answers.jsonl"
    there = scores_of(read_answers(path, warn))
    both = [name for name in planned if name in there]
    if not both:
        raise ConfigError(
            f"--compare {directory}: there is no {path.name} with answers to {', '.join(planned)} in it"
        )
    if not anyway:
        refuse_differences({name: differences(planned[name], there[name].how_asked) for name in both})


def differences(a: HowAsked, b: HowAsked) -> dict[str, list[Any]]:
    """Find what was asked differently: name -> its values for a and b.

    Settings that one of the two does not record, as answers of earlier versions, are not compared.
    """
    differ = {
        name: [a.settings[name], b.settings[name]]
        for name in HOW_ASKED
        if name in a.settings and name in b.settings and a.settings[name] != b.settings[name]
    }
    if a.samples != b.samples:
        differ["samples"] = [a.samples, b.samples]
    if a.problems != b.problems:
        common = len(a.problems.items() & b.problems.items())
        differ["problems"] = [f"{len(each.problems)} ({common} in common)" for each in (a, b)]
    return differ


def refuse_differences(differ: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Refuse to compare what was asked differently.

    Args:
      differ: benchmark -> name -> values of both.

    Raises:
      ConfigError: something was.
    """
    found: dict[str, list[str]] = {}
    for benchmark, settings in differ.items():
        for name, (a, b) in settings.items():
            found.setdefault(f"{name} is {a!r} here and {b!r} there", []).append(benchmark)
    if found:
        listed = "; ".join(f"{what} ({', '.join(names)})" for what, names in found.items())
        raise ConfigError(
            f"the two evaluations were asked differently: {listed}; evaluate both alike, or add "
            "--compare_anyway, which says so in the table"
        )


def comparison_table(rows: Sequence[dict[str, Any]], name_a: str, name_b: str) -> Table:
    """Show a comparison to people."""
    notes = ["right answers, %; a - b with its 95% interval, and p of a sign-flip test, over problems"]
    differ = {(name, *map(repr, values)): None for row in rows for name, values in row["differ"].items()}
    notes += [escape(f"asked differently: {name} is {a} for a and {b} for b") for name, a, b in differ]
    shown = Table(title=f"a: {escape(name_a)}\nb: {escape(name_b)}", caption="\n".join(notes))
    add_columns(shown, "benchmark", "n", "a", "b", "a - b", "p", "better")
    for row in rows:
        if row["benchmark"] == ALL:
            shown.add_section()
        interval = "" if row["low"] is None else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        shown.add_row(
            escape(row["benchmark"]),
            str(row["problems"]),
            percent(row["a"]),
            percent(row["b"]),
            f"{100 * row['difference']:+.1f}{interval}",
            f"{row['p']:.4f}",
            row["better"],
        )
    return shown


def _paired(a: Score, b: Score) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Verdicts of both on the problems that both were asked."""
    places = {(number, asked): j for j, (number, asked) in enumerate(zip(b.problems, b.asked, strict=True))}
    both = [
        (i, places[number, asked])
        for i, (number, asked) in enumerate(zip(a.problems, a.asked, strict=True))
        if (number, asked) in places
    ]
    if not both:
        raise ConfigError(
            f"the evaluations have no problem of {a.name} in common; evaluate both on the same data"
        )
    return [a.right[i] for i, _ in both], [b.right[j] for _, j in both]


def _row(name: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> dict[str, Any]:
    """Compare the verdicts on the same problems, for JSON."""
    test = paired_test(a, b)
    better = "undecided" if test.p > LEVEL else "a" if test.difference > 0 else "b"
    return {
        "benchmark": name,
        "problems": len(a),
        "a": float(np.mean([row.mean() for row in a])),
        "b": float(np.mean([row.mean() for row in b])),
        "difference": test.difference,
        "low": defined(test.low),
        "high": defined(test.high),
        "p": test.p,
        "better": better,
    }
