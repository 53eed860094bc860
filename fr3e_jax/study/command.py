"""What the command does: run what is missing, list what it costs, draw the report, or repeat runs."""

import contextlib
import dataclasses
import fcntl
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fr3e_jax.config import ConfigError
from fr3e_jax.config.values import Count, Name, Seed
from fr3e_jax.progress import bars
from fr3e_jax.run.storage import in_bucket
from fr3e_jax.study.costs import cost_of, costs_table, planned_step
from fr3e_jax.study.report import write_report
from fr3e_jax.study.results import (
    RESULTS,
    Results,
    RunResult,
    StudyHeader,
    ValuesResult,
    header_of,
    read_results,
    results_files,
    write_results,
)
from fr3e_jax.study.runner import Runner
from fr3e_jax.study.runs import StudyRun, reported_runs, sweep_runs
from fr3e_jax.study.scores import chosen_rates
from fr3e_jax.study.settings import NamedStudy, read_study
from fr3e_jax.study.values import block_statistics, rewards_of_states, rounded_statistics
from fr3e_jax.study.verify import verify

RUNS = "runs"


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


def suffix(part: tuple[int, int] | None) -> str:
    """What the results file of a part of the runs has in its name."""
    return "" if part is None else f"-{part[0]}-of-{part[1]}"


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


class Running:
    """A study that is run: what is there, what is missing, and how far it is."""

    def __init__(
        self, named: NamedStudy, out: Path, part: tuple[int, int] | None, jobs: int, console: Console
    ) -> None:
        self.named, self.part, self.jobs, self.console = named, part, jobs, console
        self.header: StudyHeader = header_of(named)
        self.file = out / f"{RESULTS}{suffix(part)}.jsonl"
        self.results = read_results(results_files(out), console.print)
        own = [self.file] if part is not None and self.file.exists() else []
        self.own = self.results if part is None else read_results(own, lambda _: None)
        for results in (self.results, self.own):
            results.studies[named.name] = self.header
        self.runner = Runner(out / RUNS, self.results.studies, jobs, self.record, self.say)
        self.progress = bars(console, transient=True)
        self.bar = self.progress.add_task(named.name, total=0)
        self.took: list[float] = []
        self.left = self.done = 0
        self.waiting: list[str] = []

    def say(self, line: str) -> None:
        """Show a line."""
        self.console.print(line, markup=False)

    def run(self) -> None:
        """Run what is missing: measurements, the search for learning rates, and what is reported."""
        with self.progress:
            self.measure_values()
            self.run_missing(list(sweep_runs(self.named)))
            rates = None
            if self.header.rates:
                rates = chosen_rates(self.header, self.results.of(self.named.name))
                for arm, rate in rates.items():
                    self.say(f"{arm}: learning rate {rate:g}, by the search")
                self.waiting = [arm for arm in self.header.arms if arm not in rates]
            self.run_missing(list(reported_runs(self.named, rates)))

    def measure_values(self) -> None:
        """Measure the values of states under the starting models, where the results do not have them yet."""
        values, name = self.named.study.values, self.named.name
        if not values.sizes or (self.part is not None and self.part[0] != 1):
            return
        for run in reported_runs(self.named):
            if run.arm != self.named.reference:
                continue
            wanted = {(name, run.task, run.seed, run.settings, values.rollouts, m): m for m in values.sizes}
            if wanted.keys() <= self.results.values.keys():
                continue
            begun = time.monotonic()
            rewards, tokens = rewards_of_states(run.config, values)
            for key, m in wanted.items():
                statistics = rounded_statistics(block_statistics(rewards, tokens, m))
                measured = ValuesResult(*key[:4], self.runner.commit, *key[4:], statistics)
                self.results.values[key] = self.own.values[key] = measured
            write_results(self.file, self.own)
            self.say(
                f"{name}: {run.task}, seed {run.seed}: {len(rewards)} states by {values.rollouts} rollouts, "
                f"{duration(time.monotonic() - begun)}"
            )

    def run_missing(self, runs: list[StudyRun]) -> None:
        """Run those of some runs that are this machine's and not complete; take up the others."""
        if self.part is not None:
            number, parts = self.part
            runs = [run for i, run in enumerate(runs) if i % parts == number - 1]
        missing = []
        for run in runs:
            held = self.runner.held(run)
            if held is not None:
                self.keep(held)
            elif not self.has_result(run):
                missing.append(run)
        write_results(self.file, self.own)
        self.done, self.left, self.took = len(runs) - len(missing), len(missing), []
        self.progress.update(self.bar, total=len(runs), completed=self.done)
        if runs:
            self.say(f"{self.named.name}: {len(runs)} runs, {self.done} complete, {self.left} to run")
        self.runner.run_all(missing)

    def has_result(self, run: StudyRun) -> bool:
        """Whether the results have a run as complete, whose directory may be elsewhere."""
        return any(
            (one.task, one.arm, one.seed, one.sweep, one.settings)
            == (run.task, run.arm, run.seed, run.sweep, run.settings)
            and one.complete
            for one in self.results.runs.values()
            if one.study == run.study
        )

    def keep(self, result: RunResult) -> None:
        """Take a result up."""
        self.results.runs[result.key] = result
        self.own.runs[result.key] = result

    def record(self, run: StudyRun, result: RunResult, seconds: float) -> None:
        """Take the result of a run up that has just ended, write it, and say how far the study is."""
        self.keep(result)
        write_results(self.file, self.own)
        self.took.append(seconds)
        self.done, self.left = self.done + 1, self.left - 1
        self.progress.update(self.bar, completed=self.done)
        left = self.left * sum(self.took) / len(self.took) / self.jobs
        ending = f"{self.left} to run, about {duration(left)}" if self.left else "none to run"
        self.say(f"{run.label}: {outcome(result)}, {duration(seconds)} | {ending}")

    def summarize(self) -> int:
        """Show what there is, and what failed with its reason.

        Returns:
          The exit code: 1 where a run failed.
        """
        runs = self.results.of(self.named.name)
        failed = [run for run in runs if not run.complete]
        table = Table(title=f"{self.named.name}: {self.named.study.question}", title_justify="left")
        for column in ("task", "arm", "complete", "failed", "missing"):
            table.add_column(column, justify="left" if column in ("task", "arm") else "right")
        for task in self.header.tasks:
            for arm in self.header.arms:
                of_arm = [run for run in runs if (run.task, run.arm, run.sweep) == (task, arm, False)]
                complete = sum(run.complete for run in of_arm)
                missing = len(self.header.seeds) - len(of_arm)
                table.add_row(task, arm, *map(str, (complete, len(of_arm) - complete, missing)))
        self.console.print(table)
        for run in failed:
            self.say(f"failed: {run.task}, {run.arm}, seed {run.seed}: {run.reason}")
        if failed:
            self.say("the same command tries them again, each from its last checkpoint")
        if self.waiting:
            self.say(
                f"{', '.join(self.waiting)}: the search for the learning rate is not complete, on other "
                "machines perhaps; the same command goes on when it is"
            )
        self.say(f"results: {self.file}")
        return 1 if failed else 0


def outcome(result: RunResult) -> str:
    """What came of a run, in some words."""
    if not result.complete:
        return f"failed: {result.reason}"
    accuracy = "not recorded" if result.final_accuracy is None else f"{result.final_accuracy:.1%}"
    steps, tokens = result.curve["step"][-1], result.curve["tokens"][-1]
    return f"held-out accuracy {accuracy} after {steps} steps and {tokens:,} tokens"


def duration(seconds: float) -> str:
    """A time for people: seconds below two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
