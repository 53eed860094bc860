"""Stored answers judged again: what the scorers of this version say of an earlier evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fr3e_jax.algorithm.success import solved
from fr3e_jax.config import ConfigError, ScoringConfig, SourceConfig
from fr3e_jax.evaluation.ask import asked_problems
from fr3e_jax.evaluation.record import ANSWERS, RESOLVED, SETTINGS, held_settings, write_settings
from fr3e_jax.evaluation.report import add_columns, percent
from fr3e_jax.evaluation.scores import read_answers
from fr3e_jax.evaluation.settings import NEWER, EvaluationConfig
from fr3e_jax.evaluation.suites import benchmarks_of
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verify import begin_judging
from fr3e_jax.run.jsonl import to_line
from fr3e_jax.run.storage import write_atomically
from fr3e_jax.types import Problem

SHOWN_CHANGES = 3  # changed verdicts that are shown of each benchmark


def rescore(
    directory: Path, files: dict[str, str], scoring: ScoringConfig, warn: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Judge the answers of an evaluation again.

    The problems are read anew, as the evaluation was begun with, since a scorer may need more of them than
    the answers hold.

    Args:
      directory: of the evaluation.
      files: benchmark -> a copy of its data on this machine, read instead of the hub's.
      scoring: limits of the processes that judge.
      warn: shows a line on lines that are skipped.

    Returns:
      (the lines of answers.jsonl before, and with the new verdicts).

    Raises:
      ConfigError: there is no evaluation, or its problems are not those of the data now.
      ScorerError: a user's own scorer failed.
    """
    held = held_settings(directory)
    lines = read_answers(directory / ANSWERS, warn)
    if not held or not lines:
        raise ConfigError(f"--rescore {directory}: there are no {SETTINGS} and {ANSWERS} with answers in it")
    suite = held["suite"]
    if not isinstance(suite, str):
        suite = [SourceConfig(**source) for source in suite]
    config = EvaluationConfig(suite=suite, seed=held.get("seed", 0), limit=held.get("limit", 0), files=files)
    named = {line["benchmark"] for line in lines}
    problems = {one.name: asked_problems(one, config)[0] for one in benchmarks_of(suite) if one.name in named}
    asked = [_problem_of(line, problems.get(line["benchmark"], []), directory) for line in lines]
    pool = ScoringPool(sorted({problem.scorer for problem in asked}), **dataclasses.asdict(scoring))
    try:
        verdicts = begin_judging(pool, [line["response"] for line in lines], asked)()
    finally:
        pool.close()
    success_at = (NEWER | held)["success_at"]
    judged = [
        line
        | {
            "right": bool(solved(verdict.score, success_at)) and not line["truncated"],
            "extracted": verdict.extracted,
        }
        for line, verdict in zip(lines, verdicts, strict=True)
    ]
    return lines, judged


def write_rescored(source: Path, out: Path, judged: Sequence[dict[str, Any]]) -> None:
    """Write new verdicts as an evaluation of their own, which names the one whose answers they are of.

    Args:
      source: directory of the evaluation.
      out: directory to write.
      judged: lines of answers.jsonl.

    Raises:
      ConfigError: `out` holds an evaluation, or cannot be written.
    """
    if held_settings(out):
        raise ConfigError(f"--out {out} holds an evaluation; choose another")
    held = held_settings(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_settings(out, held | {RESOLVED: (held.get(RESOLVED) or {}) | {"rescored": str(source)}})
        write_atomically(out / ANSWERS, b"".join(map(to_line, judged)))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None


def changes_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """Show, benchmark by benchmark, which verdicts changed, with examples."""
    rows: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for old, new in zip(before, after, strict=True):
        rows.setdefault(old["benchmark"], []).append((old, new))
    notes = ["answers that are right, %, by the verdicts that were stored and by those of now"]
    for name, pairs in rows.items():
        changed = [(old, new) for old, new in pairs if old["right"] != new["right"]]
        for old, new in changed[:SHOWN_CHANGES]:
            verdict = "right" if new["right"] else "wrong"
            notes.append(
                escape(
                    f"{name}, problem {old['problem']}, sample {old['sample']}: now {verdict}, "
                    f"{new['extracted'][:40]!r} (before {old['extracted'][:40]!r}), answer "
                    f"{old['answer'][:40]!r}"
                )
            )
        if len(changed) > SHOWN_CHANGES:
            notes.append(escape(f"{name}: {len(changed) - SHOWN_CHANGES} more changed"))
    shown = Table(title="verdicts of now", caption="\n".join(notes))
    add_columns(shown, "benchmark", "answers", "before", "now", "now right", "now wrong")
    for name, pairs in rows.items():
        gained = sum(new["right"] and not old["right"] for old, new in pairs)
        lost = sum(old["right"] and not new["right"] for old, new in pairs)
        shares = (sum(pair[side]["right"] for pair in pairs) / len(pairs) for side in (0, 1))
        shown.add_row(escape(name), str(len(pairs)), *map(percent, shares), f"+{gained}", f"-{lost}")
    return shown


def _problem_of(line: dict[str, Any], problems: Sequence[Problem], directory: Path) -> Problem:
    """Find the problem of a stored answer."""
    number = line["problem"]
    problem = problems[number] if number < len(problems) else None
    if problem is None or (problem.question, problem.answer) != (line["question"], line["answer"]):
        raise ConfigError(
            f"problem {number} of {line['benchmark']} is not the one that {directory / ANSWERS} has an "
            "answer to; restore the data, or name a copy of it with --files"
        )
    return problem
