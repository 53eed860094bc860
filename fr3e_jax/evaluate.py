"""Benchmarks: `python -m fr3e_jax.evaluate --model DIR_OR_RUN --suite math`.

Every answer is written with its verdict while the batch after it is sampled, and a command that was ended
goes on from there. The table says how sure its numbers are, and `--compare` tells whether one model is better
than another.
"""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fr3e_jax.cli import ending_in_one_line, parse, warn
from fr3e_jax.config import ConfigError
from fr3e_jax.engine.finite import NotFiniteError
from fr3e_jax.evaluation.ask import ask_all, asked_problems, asks_of, how_asked, resolved_settings
from fr3e_jax.evaluation.asked_model import AskedModel, choose_step, find_asked, with_limits
from fr3e_jax.evaluation.compare import check_comparison, compare, comparison_table
from fr3e_jax.evaluation.record import (
    ANSWERS,
    SUMMARY,
    held_settings,
    note_resolved,
    open_directory,
    without_done,
)
from fr3e_jax.evaluation.report import table
from fr3e_jax.evaluation.rescore import changes_table, rescore, write_rescored
from fr3e_jax.evaluation.scores import HowAsked, read_answers, scores_of, summarize
from fr3e_jax.evaluation.settings import HOW_IT_IS_DONE, EvaluationConfig, check_evaluation
from fr3e_jax.evaluation.suites import benchmarks_of
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts, initialize, is_first, leaving_at_once
from fr3e_jax.parallel.mesh import PlacementError, row_parts
from fr3e_jax.parallel.waiting import HostError
from fr3e_jax.problems.corpus import checksum
from fr3e_jax.rewards.verdict import ScorerError
from fr3e_jax.run.build import mesh_of
from fr3e_jax.run.compilation import keep_compiled
from fr3e_jax.run.interruption import exiting_at_sigterm
from fr3e_jax.run.lock import Lock
from fr3e_jax.run.storage import StorageError, in_bucket, location, write_atomically


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Ask, write, and show the table; or judge stored answers again.

    Returns:
      What summary.json says, in the first process; nothing in others.
    """
    if in_bucket(config.out or ""):
        raise ConfigError(f"out {config.out} is in a bucket; write to a directory")
    mesh = mesh_of(config.mesh)
    hosts = Hosts(mesh, config.distributed.timeout)
    console = Console(highlight=False, soft_wrap=True, quiet=not is_first())
    if config.rescore is not None:
        with Lock("evaluate", hosts, say_beside) as lock:
            return judge_again(config, config.rescore, lock, console)
    check_evaluation(config, row_parts(mesh))
    directory = Path(config.out or f"runs/evaluate-{datetime.now():%Y%m%d-%H%M%S}")
    with Lock("evaluate", hosts, say_beside) as lock:
        lock.take(location(str(directory)), "--out")
        for line in lock.messages:
            say_beside(line)
        return evaluate_into(config, directory, lock, console)


def evaluate_into(config: EvaluationConfig, directory: Path, lock: Lock, console: Console) -> dict[str, Any]:
    """Ask and write into a directory that no other process writes to."""
    hosts = lock.hosts
    benchmarks = benchmarks_of(config.suite)
    if unknown := sorted(config.files.keys() - {one.name for one in benchmarks}):
        raise ConfigError(
            f"files names {', '.join(unknown)}, which is not in the suite; it has "
            f"{', '.join(one.name for one in benchmarks)}"
        )
    begun_with = held_settings(directory).get("step") if is_first() else None
    step, trained = choose_step(config, begun_with, hosts, say_beside)
    config = with_limits(dataclasses.replace(config, step=step))
    read = {one: asked_problems(one, config) for one in benchmarks}
    asks = {one: asks_of(one, problems, config) for one, (problems, _) in read.items()}
    number = checksum([ask.problem for some in asks.values() for ask in some])
    hosts.require_same(number, "the problems of the suite")

    def plan(asked: AskedModel) -> dict[str, HowAsked]:
        resolved = resolved_settings(config, asked)
        return {one.name: how_asked(config, one, resolved, problems) for one, (problems, _) in read.items()}

    if is_first() and config.compare:
        there = Path(config.compare)
        check_comparison(there, plan(find_asked(config)), config.compare_anyway, say_beside)
    held = read_answers(directory / ANSWERS, say_beside) if is_first() else []
    if is_first():
        given = dataclasses.asdict(config)
        kept = {name: value for name, value in given.items() if name not in HOW_IT_IS_DONE}
        open_directory(directory, kept, answered=bool(held))
    missing = {one: without_done(one.name, some, held, directory, hosts) for one, some in asks.items()}
    for line in (line for _, messages in read.values() for line in messages):
        console.print(line, markup=False)
    if any(missing.values()):
        asked = find_asked(config)
        if is_first():
            note_resolved(directory, resolved_settings(config, asked))
        ask_all(config, asked, trained, missing, plan(asked), hosts, directory, console)
    if not is_first():
        return {}
    return show_table(config, directory, console)


def show_table(config: EvaluationConfig, directory: Path, console: Console) -> dict[str, Any]:
    """Write and show the table, and the comparison if there is to be one."""
    scores = scores_of(read_answers(directory / ANSWERS))
    summaries = [summarize(score) for score in scores.values()]
    console.print(table(summaries))
    settings: dict[str, Any] = next((one["settings"] for one in summaries if one["settings"]), {})
    summary: dict[str, Any] = {
        "model": settings.get("model", config.model),
        "seed": settings.get("seed", config.seed),
        **{name: settings.get(name) for name in ("step", "source", "template", "stop", "compute_dtype")},
        "benchmarks": summaries,
    }
    place = location(str(directory / SUMMARY))
    write_atomically(place, json.dumps(summary, indent=2) + "\n")
    if config.compare:
        other = Path(config.compare) / ANSWERS
        rows = compare(directory / ANSWERS, other, config.compare_anyway)
        console.print(comparison_table(rows, str(directory), config.compare))
        summary["compared_with"] = {"evaluation": config.compare, "rows": rows}
        write_atomically(place, json.dumps(summary, indent=2) + "\n")
    console.print(
        f"answers with their verdicts: {directory / ANSWERS}\nnumbers: {directory / SUMMARY}", markup=False
    )
    return summary


def judge_again(config: EvaluationConfig, stored: str, lock: Lock, console: Console) -> dict[str, Any]:
    """Judge stored answers with the scorers of now, show what changes, and write it if that is wanted."""
    if config.out is not None:
        lock.take(location(config.out), "--out")
    summary: dict[str, Any] = {}

    def judge() -> None:
        before, after = rescore(Path(stored), config.files, config.scoring, say_beside)
        console.print(changes_table(before, after))
        if config.out is None:
            console.print(f"{stored} is as it was; with --out DIR the new verdicts are written", markup=False)
            summary["benchmarks"] = [summarize(score) for score in scores_of(after).values()]
            return
        write_rescored(Path(stored), Path(config.out), after)
        summary.update(show_table(config, Path(config.out), console))

    lock.hosts.first_alone(judge, "the answers are judged again")
    return summary


def say_beside(line: str) -> None:
    """Show a line beside the results."""
    warn("evaluate", line)


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(EvaluationConfig, "evaluate", None)
    interrupted = f"interrupted; the same command with --out {config.out or 'DIR'} goes on"
    mistakes = (ConfigError, CheckpointError, PlacementError)
    failures = (HostError, NotFiniteError, ScorerError, StorageError)
    with leaving_at_once("evaluate"), ending_in_one_line("evaluate", mistakes, failures, interrupted):
        initialize(config.distributed)
        keep_compiled(config.compilation_cache, None)
        with exiting_at_sigterm():
            evaluate(config)


if __name__ == "__main__":
    main()
