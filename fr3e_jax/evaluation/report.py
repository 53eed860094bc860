"""Answers of an evaluation, read and told: numbers with their error, and two evaluations compared."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.statistics import avg_at_k, bootstrap_interval, maj_at_k, paired_test, pass_at_k

FIELDS = {
    "benchmark",
    "problem",
    "sample",
    "right",
    "extracted",
    "truncated",
    "length",
    "question",
    "answer",
    "response",
}
"""What every line of answers.jsonl has. Newer ones have `prompt` too, what the model saw, and `settings`, how
it was asked."""

HOW_ASKED = ("template", "stop", "compute_dtype", "temperature", "top_k", "top_p", "max_response")
"""Settings that two evaluations which are compared had better share."""

LEVEL = 0.05  # a p-value of at most this decides
MEAN, ALL = "mean", "all"


@dataclasses.dataclass(frozen=True)
class Score:
    """Verdicts on a benchmark, over the samples that every problem has.

    problems: their numbers, ascending. asked: question and answer of each. right, truncated: bool [problems,
    k]. extracted: [problems][k]. length: int [problems, k], tokens. left_out: answers of samples that some
    problem lacks, as an evaluation that was ended has. settings: how the model was asked, as the answers say.
    """

    name: str
    problems: tuple[int, ...]
    asked: tuple[tuple[str, str], ...]
    right: np.ndarray
    extracted: list[list[str]]
    truncated: np.ndarray
    length: np.ndarray
    left_out: int
    settings: dict[str, Any]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl; none where there is no file.

    The last line is dropped if it was cut off while it was written.

    Raises:
      ConfigError: another line is damaged.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    damaged = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if damaged:
                raise ConfigError(
                    f"line {damaged} of {path} is damaged; remove it, or choose another directory"
                )
            try:
                line = json.loads(raw.decode())
            except ValueError:
                damaged = number
                continue
            if not isinstance(line, dict) or not line.keys() >= FIELDS:
                raise ConfigError(
                    f"line {number} of {path} is no answer; remove it, or choose another directory"
                )
            if raw.endswith(b"\n"):
                lines.append(line)
    return lines


def scores_of(lines: Iterable[dict[str, Any]]) -> dict[str, Score]:
    """Benchmark -> its score, in the order of their first answers.

    Raises:
      ConfigError: the problems of a benchmark have no sample in common, or were asked in two ways.
    """
    found: dict[str, dict[int, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[line["benchmark"]][line["problem"]][line["sample"]] = line
    return {name: _score(name, problems) for name, problems in found.items()}


def summarize(score: Score) -> dict[str, Any]:
    """The numbers of a score, for JSON: shares are between 0 and 1, and what is not defined is None."""
    mean, error = avg_at_k(score.right)
    low, high = bootstrap_interval(score.right)
    k = score.right.shape[1]
    return {
        "benchmark": score.name,
        "problems": len(score.problems),
        "k": k,
        "avg": mean,
        "se": _defined(error),
        "low": _defined(low),
        "high": _defined(high),
        "pass": {str(2**i): pass_at_k(score.right, 2**i) for i in range(k.bit_length())},
        "maj": maj_at_k(score.extracted, score.right),
        "truncated": float(score.truncated.mean()),
        "length": float(score.length.mean()),
        "left_out": score.left_out,
        "settings": score.settings,
    }


def table(summaries: Sequence[dict[str, Any]]) -> Table:
    """What summaries say, for people; of several benchmarks also the mean, each counting the same."""
    notes = ["n problems; ± standard error and (95% interval) over them; cut: by the length limit, %"]
    notes += [
        f"{escape(one['benchmark'])}: {one['left_out']} left out, answers of samples that some problems lack"
        for one in summaries
        if one["left_out"]
    ]
    asked = dict.fromkeys(asked_of(one["settings"]) for one in summaries if one["settings"])
    notes += [escape(told) for told in asked]
    shown = Table(title="right answers, %", caption="\n".join(notes))
    add_columns(shown, "benchmark", "n", "avg@k", "pass@k", "maj@k", "cut", "tokens")
    for one in summaries:
        k = one["k"]
        most = max(one["pass"], key=int)
        several = [f"@{most} {_percent(one['pass'][most])}", _percent(one["maj"])] if k > 1 else ["", ""]
        shown.add_row(
            escape(one["benchmark"]),
            str(one["problems"]),
            f"avg@{k} {_percent(one['avg'])}{_error(one)}",
            *several,
            _percent(one["truncated"]),
            f"{one['length']:.0f}",
        )
    if len(summaries) > 1:
        shown.add_section()
        shown.add_row(MEAN, "", _mean(summaries))
    return shown


def asked_of(settings: dict[str, Any]) -> str:
    """Who was asked and how, for people."""
    step, source = settings["step"], settings["source"]
    who = settings["model"] if step is None else f"step {step} of {settings['model']}, begun from {source}"
    stop = f", stop {settings['stop']}" if settings["stop"] else ""
    return f"{who}; template {settings['template']!r}{stop}, {settings['compute_dtype']}"


def compare(path_a: Path, path_b: Path) -> list[dict[str, Any]]:
    """Whether one of two evaluations is better, on each benchmark and on all problems together.

    Args:
      path_a: answers.jsonl of one.
      path_b: of the other. What both have is compared: benchmarks, and problems of each.

    Raises:
      ConfigError: they have no benchmark in common, or asked different questions.
    """
    scores_a, scores_b = (scores_of(read_answers(path)) for path in (path_a, path_b))
    both = [name for name in scores_a if name in scores_b]
    if not both:
        raise ConfigError(f"{path_a} and {path_b} have no benchmark in common; evaluate both on one suite")
    pairs = {name: _paired(scores_a[name], scores_b[name]) for name in both}
    rows = [
        _row(name, *pair) | {"differ": _differ(scores_a[name].settings, scores_b[name].settings)}
        for name, pair in pairs.items()
    ]
    if len(pairs) > 1:
        differ = {name: values for row in rows for name, values in row["differ"].items()}
        each = ([row for pair in pairs.values() for row in pair[side]] for side in (0, 1))
        rows.append(_row(ALL, *each) | {"differ": differ})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]], name_a: str, name_b: str) -> Table:
    """What a comparison says, for people."""
    notes = ["right answers, %; a - b with its 95% interval, and p of a sign-flip test, over problems"]
    differ = {(name, *map(repr, values)): None for row in rows for name, values in row["differ"].items()}
    notes += [escape(f"asked otherwise: {name} is {a} for a and {b} for b") for name, a, b in differ]
    shown = Table(title=f"a: {escape(name_a)}\nb: {escape(name_b)}", caption="\n".join(notes))
    add_columns(shown, "benchmark", "n", "a", "b", "a - b", "p", "better")
    for row in rows:
        if row["benchmark"] == ALL:
            shown.add_section()
        interval = "" if row["low"] is None else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        shown.add_row(
            escape(row["benchmark"]),
            str(row["problems"]),
            _percent(row["a"]),
            _percent(row["b"]),
            f"{100 * row['difference']:+.1f}{interval}",
            f"{row['p']:.4f}",
            row["better"],
        )
    return shown


def add_columns(shown: Table, *names: str) -> None:
    """The columns of a table. Where it is narrow, names and intervals take two lines; no number is cut."""
    for name in names:
        if name in ("benchmark", "avg@k", "a - b"):
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True)


def _score(name: str, problems: dict[int, dict[int, dict[str, Any]]]) -> Score:
    """Of the lines by problem and sample."""
    numbers = sorted(problems)
    samples = sorted(set.intersection(*(set(problems[number]) for number in numbers)))
    if not samples:
        raise ConfigError(f"the problems of {name} have no sample in common; finish the evaluation first")
    lines = [[problems[number][sample] for sample in samples] for number in numbers]

    def field(key: str) -> list[list[Any]]:
        return [[line[key] for line in row] for row in lines]

    return Score(
        name,
        tuple(numbers),
        tuple((row[0]["question"], row[0]["answer"]) for row in lines),
        np.array(field("right"), bool),
        field("extracted"),
        np.array(field("truncated"), bool),
        np.array(field("length"), np.int64),
        sum(len(of) for of in problems.values()) - len(numbers) * len(samples),
        _settings(name, [line for row in lines for line in row]),
    )


def _settings(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How a benchmark was asked; nothing where no line says it.

    Raises:
      ConfigError: some lines say otherwise than others.
    """
    told = [line["settings"] for line in lines if line.get("settings")]
    for other in told:
        if differing := sorted(key for key in other | told[0] if other.get(key) != told[0].get(key)):
            raise ConfigError(
                f"the answers to {name} are of two evaluations, with different {', '.join(differing)}; keep "
                "those of one"
            )
    return told[0] if told else {}


def _differ(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Setting -> its two values, of those that both say and that decide what an answer is worth."""
    return {name: [a[name], b[name]] for name in HOW_ASKED if name in a and name in b and a[name] != b[name]}


def _paired(a: Score, b: Score) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Verdicts of both on the problems that both have."""
    places = {number: place for place, number in enumerate(b.problems)}
    both = [(i, places[number]) for i, number in enumerate(a.problems) if number in places]
    if not both:
        raise ConfigError(
            f"the evaluations have no problem of {a.name} in common; take the same limit for both"
        )
    for i, j in both:
        if a.asked[i] != b.asked[j]:
            raise ConfigError(
                f"the evaluations differ: problem {a.problems[i]} of {a.name} has another question or answer "
                "in each; evaluate both on the same data"
            )
    return [a.right[i] for i, _ in both], [b.right[j] for _, j in both]


def _row(name: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> dict[str, Any]:
    """What a comparison of the same problems says, for JSON."""
    told = paired_test(a, b)
    better = "undecided" if told.p > LEVEL else "a" if told.difference > 0 else "b"
    return {
        "benchmark": name,
        "problems": len(a),
        "a": float(np.mean([row.mean() for row in a])),
        "b": float(np.mean([row.mean() for row in b])),
        "difference": told.difference,
        "low": _defined(told.low),
        "high": _defined(told.high),
        "p": told.p,
        "better": better,
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _mean(summaries: Sequence[dict[str, Any]]) -> str:
    """Of benchmarks, whose errors are independent."""
    mean = _percent(float(np.mean([one["avg"] for one in summaries])))
    errors = [one["se"] for one in summaries]
    return mean if None in errors else f"{mean} ± {_percent(math.hypot(*errors) / len(errors))}"


def _error(one: dict[str, Any]) -> str:
    if one["se"] is None:
        return ""
    return f" ± {_percent(one['se'])} ({_percent(one['low'])}\N{EN DASH}{_percent(one['high'])})"
