"""What the command does: run what is missing, list what it costs, draw the report, or repeat runs."""

import contextlib
import dataclasses
import fcntl
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from fr3e_jax.config import ConfigError
from fr3e_jax.config.values import Count, Name, Seed
from fr3e_jax.run.storage import in_bucket
from fr3e_jax.study.costs import cost_of, costs_table, planned_step
from fr3e_jax.study.report import write_report
from fr3e_jax.study.results import (
    RESULTS,
    Results,
    header_of,
    read_results,
    results_files,
    write_results,
)
from fr3e_jax.study.running import Running, suffix
from fr3e_jax.study.runs import reported_runs, sweep_runs
from fr3e_jax.study.settings import NamedStudy, read_study
from fr3e_jax.study.verify import verify


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Run a study: arms x tasks x seeds of training runs, their statistics, figures and page."""

    file: Name | None = None
    """The study file, such as configs/studies/quickstart.yaml; may stand first without `--file`."""
    out: Name = "studies"
    """Directory of results, report and run directories. Several studies may share it."""
    jobs: Count = 1
    """Training runs at a time here."""
    shard: Name | None = None
    """`i/n`: of all runs only the i-th part of n, for several machines that share `out`."""
    dry_run: bool = False
    """List the runs with their costs, and run none."""
    topology: Name | None = None
    """Slice of TPUs, such as v5e-256, for which --dry_run plans the costs."""
    report: bool = False
    """Draw tables, figures and page again from the results file alone; without a file, of all studies."""
    verify: bool = False
    """Run one complete run of each study again, drawn at random, with the code of its commit, and compare it
    with its line."""
    seed: Seed = 0
    """Of what --verify draws, and of the statistics' resamples."""


def with_named_file(argv: Sequence[str]) -> list[str]:
    """Arguments with `--file` before a study file that stands first."""
    return ["--file", *argv] if argv and not argv[0].startswith("-") else list(argv)


def study(options: StudyOptions) -> int:
    """Do what is asked for.

    Returns:
      The exit code: 1 where a run failed or differs.

    Raises:
      ConfigError: the study file or an option is mistaken.
      StorageError: a file cannot be written.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    out = Path(options.out)
    if in_bucket(options.out):
        raise ConfigError(f"out {options.out} is in a bucket; write to a directory that all machines see")
    if sum((options.report, options.verify, options.dry_run)) > 1:
        raise ConfigError("--report, --verify and --dry_run exclude each other; choose one")
    if options.topology is not None and not options.dry_run:
        raise ConfigError("--topology is for --dry_run, which plans the costs for it")
    part = shard_of(options.shard)
    named = None if options.file is None else read_study(options.file, Path(options.file).stem)
    if options.report or options.verify:
        results = held_results(out, console)
        names = chosen_studies(results, named, out)
        if options.verify:
            return verify(results, names, out, options.seed, console)
        write_results(out / f"{RESULTS}.jsonl", results)
        write_report(results, out, options.seed, console)
        return 0
    if named is None:
        raise ConfigError("name a study file, such as configs/studies/quickstart.yaml")
    if options.dry_run:
        return list_costs(named, out, options.topology, console)
    with locked(out, f"{RESULTS}{suffix(part)}"):
        running = Running(named, out, part, options.jobs, console)
        running.run()
        if part is None:
            write_report(running.results, out, options.seed, console)
    return running.summarize()


def shard_of(text: str | None) -> tuple[int, int] | None:
    """Parse `i/n`: (i, n).

    Raises:
      ConfigError: it is none.
    """
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ConfigError(f"shard is {text!r}, must be i/n with i from 1 to n, such as 1/4")
    return int(parts[1]), int(parts[2])


def held_results(out: Path, console: Console) -> Results:
    """The results in a directory.

    Raises:
      ConfigError: there are none.
    """
    if not (files := results_files(out)):
        raise ConfigError(f"there is no {out / RESULTS}.jsonl; --out names the directory of a study")
    return read_results(files, console.print)


def chosen_studies(results: Results, named: NamedStudy | None, out: Path) -> list[str]:
    """The studies that are meant: that of the file, or all.

    Raises:
      ConfigError: there are no results of it.
    """
    if named is None:
        return sorted(results.studies)
    if named.name not in results.studies:
        raise ConfigError(f"{out} has no results of the study {named.name}; run it first")
    return [named.name]


@contextlib.contextmanager
def locked(out: Path, name: str) -> Iterator[None]:
    """Hold a results file for this process; the system gives it back when the process ends, however it does.

    Raises:
      ConfigError: another process holds it, or the directory cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / f".{name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process runs a study in {out}; wait for its end, or choose another --out"
            ) from None
        yield


def list_costs(named: NamedStudy, out: Path, topology: str | None, console: Console) -> int:
    """Show all runs with their costs; those whose learning rate is not chosen yet, with that of the file."""
    header = header_of(named)
    results = read_results(results_files(out), console.print)
    results.studies[named.name] = header
    held = results.of(named.name)
    runs = [*sweep_runs(named), *reported_runs(named)]
    complete = {
        (run.task, run.arm, run.sweep, run.learning_rate if run.sweep else 0.0, run.seed)
        for run in held
        if run.complete
    }
    states = [
        "complete"
        if (run.task, run.arm, run.sweep, run.learning_rate if run.sweep else 0.0, run.seed) in complete
        else "missing"
        for run in runs
    ]
    steps = {} if topology is None else {at: planned_step(one, topology) for at, one in named.configs.items()}
    costs = [cost_of(run, held, steps.get((run.task, run.arm))) for run in runs]
    console.print(costs_table(runs, costs, states, topology))
    return 0
