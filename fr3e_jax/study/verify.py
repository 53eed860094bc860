"""A run of each study again, to be compared with its line in the results."""

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flax import traverse_util
from rich.console import Console

from fr3e_jax.config import ConfigError
from fr3e_jax.study.commits import code_of
from fr3e_jax.study.results import Results, RunResult, StudyHeader
from fr3e_jax.study.runner import Runner, usable_cpus
from fr3e_jax.study.runs import StudyRun, with_seed
from fr3e_jax.study.settings import training_config

VERIFIED = "verify"  # folder of --out in which runs are repeated
COMPARED_FIELDS = ("decided", "final_accuracy", "tokens_to_threshold", "metrics")
COMPARED_CURVES = ("step", "tokens", "flops", "accuracy")


def verify(results: Results, names: list[str], out: Path, seed: int, console: Console) -> int:
    """Repeat one complete run of each study, drawn at random, and compare all but the seconds.

    It is repeated with the code of the commit that made it.

    Args:
      results: of the studies.
      names: of the studies that are meant.
      out: directory in which it is repeated, from the beginning.
      seed: of the draw.

    Returns:
      The exit code: 1 where a run differs or fails.

    Raises:
      ConfigError: a study has no complete run.
      StorageError: a file of a run cannot be written.
    """
    failures = 0
    for name in names:
        expected = drawn_run(results, name, seed)
        run = run_of(results.studies[name], expected)
        console.print(f"{run.label}: run again", markup=False)
        (out / VERIFIED).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=out / VERIFIED))
        again: list[RunResult] = []
        take = functools.partial(take_result, again)
        try:
            with as_many_cpus(expected.cpus, console), code_of(expected.commit, console) as code:
                runner = Runner(folder.resolve(), results.studies, 1, take, console.print, code)
                runner.run_all([run])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        differ = differences_between(expected, again[0])
        failures += bool(differ)
        for line in differ or [f"as in its line: {len(again[0].curve['step'])} evaluations agree"]:
            console.print(f"{run.label}: {line}", markup=False)
    return 1 if failures else 0


@contextlib.contextmanager
def as_many_cpus(cpus: int | None, console: Console) -> Iterator[None]:
    """Let processes use as many CPUs as a run had, since XLA orders its sums by their number.

    Args:
      cpus: that the run could use; None: it is not known.
      console: where people read, if there are too few.
    """
    if cpus is None or cpus == usable_cpus():
        yield
        return
    if cpus > usable_cpus() or not hasattr(os, "sched_setaffinity"):
        console.print(f"it had {cpus} CPUs, and here are {usable_cpus()}: rounding may differ", markup=False)
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[-cpus:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def take_result(taken: list[RunResult], run: StudyRun, result: RunResult, seconds: float) -> None:
    """Put the result of a run that has ended into a list."""
    taken.append(result)


def drawn_run(results: Results, study: str, seed: int) -> RunResult:
    """Draw a complete run that is reported.

    Raises:
      ConfigError: there is none.
    """
    complete = [run for run in results.of(study) if run.complete and not run.sweep]
    if not complete:
        raise ConfigError(f"the study {study} has no complete run to repeat")
    return random.Random(f"{seed} {study}").choice(complete)


def run_of(header: StudyHeader, result: RunResult) -> StudyRun:
    """Make the run of a result from the settings in the results file.

    Raises:
      ConfigError: this version does not know them, or gives them another hash.
    """
    options = traverse_util.unflatten_dict(header.settings[f"{result.task}/{result.arm}"], sep=".")
    config = with_seed(training_config(options), result.seed, result.learning_rate)
    run = StudyRun(
        result.study, result.task, result.arm, result.seed, result.learning_rate, result.sweep, config
    )
    if run.settings != result.settings:
        raise ConfigError(
            f"{run.label}: its settings are not those of the line in this version; go back to commit "
            f"{result.commit}"
        )
    return run


def differences_between(expected: RunResult, again: RunResult) -> list[str]:
    """Say in what a repeated run differs, a line each; nothing where it does not."""
    if not again.complete:
        return [f"failed: {again.reason}"]
    lines = []
    for name in COMPARED_CURVES:
        before, after = expected.curve[name], again.curve[name]
        if before != after:
            first = next(
                (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]),
                min(len(before), len(after)),
            )
            lines.append(
                f"{name} differs from evaluation {first} on: {before[first : first + 1]} in its line, "
                f"{after[first : first + 1]} now"
            )
    fields = dataclasses.asdict(expected), dataclasses.asdict(again)
    for name in COMPARED_FIELDS:
        if fields[0][name] != fields[1][name]:
            lines.append(f"{name} is {fields[0][name]} in its line, {fields[1][name]} now")
    return lines
