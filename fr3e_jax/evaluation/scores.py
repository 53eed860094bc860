"""Verdicts of an evaluation, read from answers.jsonl, and the numbers that they come to."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.statistics import avg_at_k, bootstrap_interval, maj_at_k, pass_at_k
from fr3e_jax.run.jsonl import read_lines

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
"""Fields of every line of answers.jsonl. Newer lines also have `prompt`, what the model saw, and `settings`,
how it was asked."""


@dataclasses.dataclass(frozen=True)
class HowAsked:
    """How a benchmark was asked, or is going to be.

    settings: name -> value; none where the answers do not say. samples: answers to each problem, k. problems:
    number -> (question, answer).
    """

    settings: dict[str, Any]
    samples: int
    problems: dict[int, tuple[str, str]]


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

    @property
    def how_asked(self) -> HowAsked:
        """What a comparison needs to know of it."""
        problems = dict(zip(self.problems, self.asked, strict=True))
        return HowAsked(self.settings, self.right.shape[1], problems)


def read_answers(path: Path, warn: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Read the lines of answers.jsonl; none where there is no file.

    Args:
      path: of the file.
      warn: shows a line on a last line that was cut off while it was written, which is skipped.

    Raises:
      ConfigError: another line is damaged.
    """
    lines = read_lines(path)
    if lines.damaged:
        raise ConfigError(
            f"line {lines.damaged[0]} of {path} is damaged; remove it, or choose another directory"
        )
    for number, line in lines.objects:
        if not line.keys() >= FIELDS:
            raise ConfigError(f"line {number} of {path} is no answer; remove it, or choose another directory")
    if warn is not None:
        for message in lines.warnings():
            warn(message)
    return [line for _, line in lines.objects]


def scores_of(lines: Iterable[dict[str, Any]]) -> dict[str, Score]:
    """Sort answers into scores, benchmark -> score, in the order of their first answers.

    Raises:
      ConfigError: the problems of a benchmark have no sample in common, or were asked in two ways.
    """
    found: dict[str, dict[int, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[line["benchmark"]][line["problem"]][line["sample"]] = line
    return {name: _score(name, problems) for name, problems in found.items()}


def summarize(score: Score) -> dict[str, Any]:
    """Compute the numbers of a score, for JSON: shares lie between 0 and 1, what is not defined is None."""
    mean, error = avg_at_k(score.right)
    low, high = bootstrap_interval(score.right)
    k = score.right.shape[1]
    return {
        "benchmark": score.name,
        "problems": len(score.problems),
        "k": k,
        "avg": mean,
        "se": defined(error),
        "low": defined(low),
        "high": defined(high),
        "pass": {str(2**i): pass_at_k(score.right, 2**i) for i in range(k.bit_length())},
        "maj": maj_at_k(score.extracted, score.right),
        "truncated": float(score.truncated.mean()),
        "length": float(score.length.mean()),
        "left_out": score.left_out,
        "settings": score.settings,
    }


def defined(value: float) -> float | None:
    """Replace nan by None, which JSON has."""
    return None if math.isnan(value) else value


def _score(name: str, problems: dict[int, dict[int, dict[str, Any]]]) -> Score:
    """Make a score of lines by problem and sample."""
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
    """Read how a benchmark was asked; nothing where no line says it.

    Raises:
      ConfigError: some lines say otherwise than others.
    """
    settings = [line["settings"] for line in lines if line.get("settings")]
    for other in settings:
        differing = sorted(key for key in other | settings[0] if other.get(key) != settings[0].get(key))
        if differing:
            raise ConfigError(
                f"the answers to {name} are of two evaluations, with different {', '.join(differing)}; keep "
                "those of one"
            )
    return settings[0] if settings else {}
