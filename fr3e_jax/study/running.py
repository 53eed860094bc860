"""A study that is run: runs what is missing, keeps the results, and says how far it is."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fr3e_jax.progress import bars
from fr3e_jax.study.results import (
    RESULTS,
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
from fr3e_jax.study.settings import NamedStudy
from fr3e_jax.study.values import block_statistics, rewards_of_states, rounded_statistics

RUNS = "runs"


def suffix(part: tuple[int, int] | None) -> str:
    """What the results file of a part of the runs has in its name."""
    return "" if part is None else f"-{part[0]}-of-{part[1]}"


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
