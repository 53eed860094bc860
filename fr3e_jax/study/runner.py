"""Runs the missing runs of a study, each by the ordinary train command in a process of its own.

A run is resumed by itself where it was killed, and one that is complete is only read, so that a study that is
killed at any moment goes on by the same command.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fr3e_jax.config import resolve
from fr3e_jax.run.run_dir import completed
from fr3e_jax.run.storage import StorageError, brief, write_atomically
from fr3e_jax.study.commits import commit_of_code
from fr3e_jax.study.results import RunResult, StudyHeader, result_of
from fr3e_jax.study.runs import StudyRun

TRAIN = ("-m", "fr3e_jax.train")
LOOK_AT_PROCESSES = 0.2  # seconds between two looks at the processes
AGAIN = 10.0  # seconds until a run whose directory is in use is tried again
IN_USE = "is in use by"
COMMITS, CPUS = "# made by commit ", "# usable CPUs: "  # comments of a settings file
PATIENCE = 60.0  # seconds that a process has to save after it is asked to stop


def usable_cpus() -> int:
    """Count the CPUs that this process, and those that it starts, may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass
class Started:
    """A training run in a process. begun: time of its start, seconds."""

    run: StudyRun
    process: subprocess.Popen
    begun: float


class Runner:
    """Runs runs, some at a time, and reports each that ends.

    Args:
      runs: directory of all runs.
      headers: study -> what it is.
      jobs: number of processes at a time.
      record: is given each run that ends, its result, and the seconds that its process took.
      say: is given a line for people.
      code: directory of the code that runs them; None: this version.
    """

    def __init__(
        self,
        runs: Path,
        headers: dict[str, StudyHeader],
        jobs: int,
        record: Callable[[StudyRun, RunResult, float], None],
        say: Callable[[str], None],
        code: Path | None = None,
    ) -> None:
        self.runs, self.headers, self.jobs = runs, headers, jobs
        self.record, self.say, self.code = record, say, code
        self.commit = commit_of_code()

    def held(self, run: StudyRun) -> RunResult | None:
        """The result of a run that is complete in its directory; None where something is left to do."""
        config = resolve(run.config_in(self.runs))
        summary = completed(config)
        if summary is None:
            return None
        header, directory = self.headers[run.study], self.runs / run.place
        made = self.commits(run), self.cpus(run)
        return result_of(run, directory, header, *made, ended=str(summary.get("ended", "")))

    def run_all(self, wanted: Sequence[StudyRun]) -> None:
        """Run runs to their ends; those that fail are recorded with the reason, and the others go on.

        Raises:
          StorageError: a file of a run cannot be written.
        """
        waiting = [(run, 0.0) for run in wanted]
        with self.processes() as started:
            while waiting or started:
                for one in [one for one in started if one.process.poll() is not None]:
                    started.remove(one)
                    if self.in_use(one):
                        waiting.append((one.run, time.monotonic() + AGAIN))
                    else:
                        self.record(one.run, self.ended(one), time.monotonic() - one.begun)
                due = [entry for entry in waiting if entry[1] <= time.monotonic()]
                for entry in due[: self.jobs - len(started)]:
                    waiting.remove(entry)
                    started.append(self.start(entry[0]))
                time.sleep(LOOK_AT_PROCESSES)

    @contextlib.contextmanager
    def processes(self) -> Iterator[list[Started]]:
        """The processes that run. When the block is left early, each is asked to save and to end."""
        started: list[Started] = []
        try:
            yield started
        finally:
            for one in started:
                one.process.terminate()
            deadline = time.monotonic() + PATIENCE
            for one in started:
                try:
                    one.process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    one.process.kill()

    def start(self, run: StudyRun) -> Started:
        """Start the train command on a run's directory.

        Raises:
          StorageError: its settings cannot be written.
        """
        settings, errors = self.beside(run, ".yaml"), self.beside(run, ".stderr")
        made_by = self.commits(run).split()
        commits = " ".join(made_by if self.commit in made_by else [*made_by, self.commit])
        try:
            settings.parent.mkdir(parents=True, exist_ok=True)
            numbers = sorted({*self.numbers_of_cpus(run), usable_cpus()})
            first = f"{COMMITS}{commits}\n{CPUS}{' '.join(map(str, numbers))}\n"
            write_atomically(settings, first + run.written(whole=self.code is None))
            train, environment = self.train()
            with errors.open("wb") as error_file:
                process = subprocess.Popen(
                    [*train, "--config", str(settings), "--run_dir", str(self.runs / run.place)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=error_file,
                    env=environment,
                )
        except OSError as error:
            raise StorageError(f"{settings} cannot be written ({brief(error)})") from None
        return Started(run, process, time.monotonic())

    def train(self) -> tuple[list[str], dict[str, str]]:
        """The train command of the code that runs, and its environment."""
        if self.code is None:
            return [sys.executable, *TRAIN], dict(os.environ)
        # Without -P Python takes the package in the current directory.
        return [sys.executable, "-P", *TRAIN], {**os.environ, "PYTHONPATH": str(self.code)}

    def ended(self, one: Started) -> RunResult:
        """The result of a run whose process has ended."""
        if (result := self.held(one.run)) is not None:
            return result
        directory, header = self.runs / one.run.place, self.headers[one.run.study]
        made = self.commits(one.run), self.cpus(one.run)
        return result_of(one.run, directory, header, *made, failure=self.failure(one))

    def failure(self, one: Started) -> str:
        """Why a process did not bring its run to the end: its last line of errors."""
        lines = self.errors(one.run)
        if one.process.returncode == 0:
            return "it was stopped before its end"
        code = one.process.returncode
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{lines[-1].removeprefix('fr3e_jax.train: error: ')} ({ending})" if lines else ending

    def in_use(self, one: Started) -> bool:
        """Whether a process was refused since that of a study that was killed is still at the run."""
        refused = one.process.returncode == 2 and any(IN_USE in line for line in self.errors(one.run))
        if refused:
            self.say(f"{one.run.label}: another process is at it; tried again in {AGAIN:.0f} s")
        return refused

    def errors(self, run: StudyRun) -> list[str]:
        """The lines that a run's process wrote as errors."""
        file = self.beside(run, ".stderr")
        text = file.read_text(errors="replace") if file.exists() else ""
        return [line.strip() for line in text.splitlines() if line.strip()]

    def commits(self, run: StudyRun) -> str:
        """The commits of the code that made a run, as its settings file has them; empty before it starts."""
        return self.noted(run, COMMITS)

    def cpus(self, run: StudyRun) -> int | None:
        """How many CPUs a run could use; None where that changed, and before it starts."""
        numbers = self.numbers_of_cpus(run)
        return numbers[0] if len(numbers) == 1 else None

    def numbers_of_cpus(self, run: StudyRun) -> list[int]:
        """All numbers of CPUs that a run could use, as its settings file has them."""
        return [int(number) for number in self.noted(run, CPUS).split()]

    def noted(self, run: StudyRun, beginning: str) -> str:
        """What a comment of a run's settings file says behind its beginning; empty where there is none."""
        file = self.beside(run, ".yaml")
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return next((line.removeprefix(beginning) for line in lines if line.startswith(beginning)), "")

    def beside(self, run: StudyRun, ending: str) -> Path:
        """A file beside a run's directory, of its name."""
        directory = self.runs / run.place
        return directory.with_name(directory.name + ending)
