"""Reports of a run: JSON lines for programs; a progress bar, lines and a summary for people."""

import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from fr3e_jax.config import AlarmsConfig, Config
from fr3e_jax.parallel.hosts import is_first
from fr3e_jax.parallel.waiting import waiting
from fr3e_jax.progress import bars
from fr3e_jax.run.alarms import alarm_news, alarms_on
from fr3e_jax.run.jsonl import Lines, LineWriter, read_lines, to_line
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.run.storage import StorageError, in_bucket, upload, write_atomically, writing
from fr3e_jax.run.trackers import Tracker, close_trackers, open_trackers

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
SUMMARY_FILE, LOG_FILE = "summary.json", "log.txt"
NO_STAGES = ("time/step", "time/evaluate", "time/share_")


class Stopwatch:
    """Measures the seconds that each stage takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage. The block must end with its results on the host."""
        start = time.perf_counter()
        try:
            with waiting(name):
                yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Name the seconds `time/STAGE`, as metrics."""
        return {f"time/{name}": round(value, 4) for name, value in self.seconds.items()}


def read_metrics(directory: epath.PathLike, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Read the metrics of a run (or its samples), in the order of steps; damaged lines are left out."""
    return by_step(read_lines(epath.Path(directory) / name))[0]


def by_step(lines: Lines) -> tuple[list[dict[str, Any]], Lines]:
    """Sort lines by their step; of several lines of a step, the last one counts.

    Returns:
      (objects in the order of steps, the lines with those that name no step among the damaged).
    """
    kept: dict[int, dict[str, Any]] = {}
    damaged = list(lines.damaged)
    for number, value in lines.objects:
        if type(step := value.get("step")) is int:
            kept[step] = value
        else:
            damaged.append(number)
    return [kept[step] for step in sorted(kept)], dataclasses.replace(lines, damaged=sorted(damaged))


def accuracies_of(metrics: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> held-out accuracy, of the steps that have been evaluated."""
    return {line["step"]: line["eval/accuracy"] for line in metrics if "eval/accuracy" in line}


def reopen(directory: epath.Path, folder: Path, name: str, start: int) -> tuple[LineWriter, list[str]]:
    """Open a file of JSON lines to append to at step `start`; lines of later steps are dropped.

    Args:
      directory: of the run, where the file is read.
      folder: where it is written.
      name: of the file.
      start: the step that the run goes on from; at 0 the file begins anew.

    Returns:
      (the file, lines for people on what of it is lost).
    """
    found, lines = by_step(read_lines(directory / name))
    kept = [line for line in found if start and line["step"] <= start]
    messages = lines.warnings() if start else []
    missing = sorted(set(range(start + 1)) - {line["step"] for line in kept})
    if missing and start and name == METRICS_FILE:
        steps = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        messages.append(f"warning: {directory / name} has no line of step {steps}")
    write_atomically(folder / name, b"".join(map(to_line, kept)))
    return LineWriter(folder / name), messages


class LogFile(logging.FileHandler):
    """A log file whose errors are raised; logging would print them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error that is being handled."""
        raise


def open_reporter(directory: epath.PathLike, config: Config, start: int) -> "Reporter | Silent":
    """Open what reports a run that goes on from step `start`; in all processes but the first it is silent."""
    directory = epath.Path(directory)
    if not is_first():
        return Silent(directory, start)
    trackers = open_trackers(config, directory, start)
    return Reporter(directory, config.steps, start, config.alarms, trackers)


class Silent:
    """Reports nothing, where another process reports the run.

    accuracies: step -> held-out accuracy, as `Reporter` has it. lines: empty, since the first
    process alone decides by them.
    """

    lines: tuple[Mapping[str, Any], ...] = ()

    def __init__(self, directory: epath.Path, start: int) -> None:
        earlier = read_metrics(directory) if start else []
        self.accuracies = accuracies_of(line for line in earlier if line["step"] <= start)
        self.within_step = StepProgress(say=self.say)

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, message: str) -> None:
        """Do nothing."""

    def step(self, metrics: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """Remember the accuracy."""
        self.accuracies |= accuracies_of([metrics])

    def summary(self, summary: Mapping[str, Any], rows: Mapping[str, str]) -> None:
        """Do nothing."""


class Reporter:
    """Writes metrics, log and summary of a run, and shows them on the terminal.

    The files of a run in a bucket are written in a folder on this machine, and copied to the bucket after
    every step, since nothing can be appended to in a bucket.

    accuracies: step -> held-out accuracy, of all steps of this run, those before it was resumed included.
    lines: metrics of all these steps, as they are written.
    within_step: shows the progress of the step that is being made.
    """

    def __init__(
        self,
        directory: epath.Path,
        total: int,
        start: int,
        alarms: AlarmsConfig | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the files of `directory` at step `start`.

        Args:
          directory: of the run.
          total: steps of the run.
          start: the step that it goes on from.
          alarms: thresholds of the signs that it goes wrong; by default those of `AlarmsConfig`.
          trackers: are told of each step too.

        Raises:
          StorageError: they cannot be written.
        """
        self.directory = directory
        self.folder = Path(tempfile.mkdtemp(prefix="fr3e_jax-") if in_bucket(directory) else directory)
        with writing(directory):
            self.metrics_file, lost_metrics = reopen(directory, self.folder, METRICS_FILE, start)
            self.samples_file, lost_samples = reopen(directory, self.folder, SAMPLES_FILE, start)
            if start < total:  # the mark of a run that is complete, perhaps of one with fewer steps
                (directory / SUMMARY_FILE).unlink(missing_ok=True)
            if in_bucket(directory) and (directory / LOG_FILE).exists():
                (self.folder / LOG_FILE).write_bytes((directory / LOG_FILE).read_bytes())
            handler = LogFile(self.folder / LOG_FILE, encoding="utf-8")
        self.alarms, self.trackers = alarms or AlarmsConfig(), trackers
        self.lines: list[Mapping[str, Any]] = list(read_metrics(self.folder))
        self.accuracies = accuracies_of(self.lines)
        self.log = logging.getLogger(f"fr3e_jax.{directory}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.handlers = [handler]
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = bars(self.console, transient=True)
        self.bar = self.progress.add_task("training", total=total, completed=start)
        self.within_step = StepProgress(self.say, self.describe if self.console.is_terminal else None)
        self.lost = [*lost_metrics, *lost_samples]

    def __enter__(self) -> "Reporter":
        self.progress.start()
        for line in self.lost:
            self.say(line)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()
        try:
            with writing(self.directory):
                self.close(error)
        except StorageError:
            if error is None:
                raise  # otherwise the user is told why the run ended, which may be the same full disk

    def close(self, error: BaseException | None) -> None:
        """Write the error that the run ended by, if any, and close all trackers and files."""
        with contextlib.ExitStack() as stack:
            if in_bucket(self.directory):
                stack.callback(shutil.rmtree, self.folder)
            stack.callback(self.publish)
            stack.callback(self.log.handlers[0].close)
            stack.callback(self.samples_file.close)
            stack.callback(self.metrics_file.close)
            for line in close_trackers(self.trackers):
                self.say(line)
            if error is not None:
                self.log.error("ended by %s: %s", type(error).__name__, error)

    def publish(self) -> None:
        """Copy the files to the bucket, if the run is in one."""
        if in_bucket(self.directory):
            for name in (METRICS_FILE, SAMPLES_FILE, LOG_FILE):
                upload(self.folder / name, self.directory / name)

    def say(self, message: str) -> None:
        """Show a line on the terminal, and write it to the log."""
        self.console.print(message, markup=False)
        with writing(self.directory):
            self.log.info(message)

    def describe(self, doing: str) -> None:
        """Show on the progress bar what the run is doing; empty for what it always does."""
        self.progress.update(self.bar, description=doing or "training")

    def step(self, metrics: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """Write the metrics of a step with its alarms, and a state to read; show the step's line."""
        before: Mapping[str, Any] = self.lines[-1] if self.lines else {}
        if alarms := alarms_on(self.alarms, [*self.lines, metrics]):
            metrics = {**metrics, "alarms": alarms}
        self.lines.append(metrics)
        with writing(self.directory):
            if sample is not None:
                self.samples_file.write([{"step": metrics["step"], **sample}])
            self.metrics_file.write([metrics])
        self.accuracies |= accuracies_of([metrics])
        self.say(step_line(metrics, before))
        for name, sentence in alarms.items():
            if name not in before.get("alarms", {}):
                self.say(f"alarm {name}: {sentence}")
        for tracker in self.trackers:
            tracker.send({"metrics": metrics, "sample": sample})
            for line in tracker.warnings():
                self.say(line)
        self.progress.update(self.bar, completed=metrics["step"])
        self.publish()

    def summary(self, summary: Mapping[str, Any], rows: Mapping[str, str]) -> None:
        """Show `rows` as the table that a run ends with, and write summary.json, which says that it has."""
        self.progress.stop()
        table = Table(title="summary", show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)
        with writing(self.directory):
            for name, value in rows.items():
                self.log.info("%s: %s", name, value)
            self.publish()
            write_atomically(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def step_line(metrics: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """Describe a step in one line for people.

    Args:
      metrics: of the step.
      before: of the step before it, whose alarms are not said again.
    """
    parts = [f"step {metrics['step']:>4}"]
    if "entropy/mean" in metrics:
        if "reward/root_mean" in metrics:  # unless explore.keep has kept nothing
            parts.append(f"root reward {metrics['reward/root_mean']:.3f}")
        parts += [
            f"entropy {metrics['entropy/mean']:.3f} nats",
            f"states +{metrics['states/accepted']} -{metrics['states/rejected']}",
            f"{metrics['tokens/generated']:,} tokens",
        ]
    elif "rounds" in metrics:
        parts.append("no sampling: the states carried over fill the batch")
    if "states/missing" in metrics:
        missing, trained = metrics["states/missing"], "update/loss" in metrics
        parts.append(f"batch short by {missing} states" if trained else "no state to train on, no update")
    if metrics.get("update/skipped"):
        parts.append(f"updates skipped: {metrics['update/skipped']} (loss or gradient not finite)")
    if "time/step" in metrics:
        stages = " ".join(
            f"{name.removeprefix('time/')} {value:.1f}"
            for name, value in metrics.items()
            if name.startswith("time/") and not name.startswith(NO_STAGES)
        )
        parts.append(f"{metrics['time/step']:.1f} s ({stages})")
    if "eval/accuracy" in metrics:
        parts.append(f"held-out accuracy {metrics['eval/accuracy']:.1%}")
    parts += alarm_news(before or {}, metrics)
    return " | ".join(parts)
