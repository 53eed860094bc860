"""What a run tells: JSON lines for machines, a progress bar, lines and a summary for people."""

import contextlib
import json
import logging
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from etils import epath
from rich.console import Console
from rich.table import Table

from fr3e_jax.parallel.hosts import is_first
from fr3e_jax.parallel.waiting import waiting
from fr3e_jax.progress import bars
from fr3e_jax.run.storage import StorageError, in_bucket, upload, write_atomically, writing

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
SUMMARY_FILE, LOG_FILE = "summary.json", "log.txt"


class Stopwatch:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage; the block ends with its results on the host."""
        start = time.perf_counter()
        try:
            with waiting(name):
                yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/STAGE` in seconds."""
        return {f"time/{name}": round(value, 4) for name, value in self.seconds.items()}


def read_metrics(directory: epath.PathLike, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The lines of a run's metrics (or samples), by step; one that is cut short or damaged is left out."""
    return read_lines(epath.Path(directory) / name)[0]


def read_lines(file: epath.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The JSON lines of a file, by step, and the numbers from 1 of those that are cut short or damaged.

    Of several lines of a step, the last is taken.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found, damaged = {}, []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and type(step := value.get("step")) is int:
            found[step] = value
        else:
            damaged.append(number)
    return [found[step] for step in sorted(found)], damaged


def reopen(directory: epath.Path, folder: Path, name: str, start: int) -> tuple[TextIO, list[str]]:
    """Open a file of JSON lines to append to at step `start`: what came after it is dropped.

    It is read from `directory`, and written in `folder`.

    Returns:
      (the file, lines on what of it is lost).
    """
    found, damaged = read_lines(directory / name)
    kept = [line for line in found if start and line["step"] <= start]
    told = []
    if damaged and start:
        several = f"lines {', '.join(map(str, damaged))} are" if len(damaged) > 1 else f"line {damaged[0]} is"
        told.append(f"warning: {directory / name}: {several} cut short or damaged, and left out")
    missing = sorted(set(range(start + 1)) - {line["step"] for line in kept})
    if missing and start and name == METRICS_FILE:
        steps = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        told.append(f"warning: {directory / name} has no line of step {steps}")
    write_atomically(folder / name, "".join(map(to_json_line, kept)))
    return (folder / name).open("a"), told


class LogFile(logging.FileHandler):
    """A log whose errors are raised, where logging would print them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what went wrong."""
        raise


def open_reporter(directory: epath.PathLike, total: int, start: int) -> "Reporter | Silent":
    """What tells of a run at step `start` of `total`: the first process tells, the others are silent."""
    return Reporter(epath.Path(directory), total, start) if is_first() else Silent()


class Silent:
    """Tells nothing, where another process tells it."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, message: str) -> None:
        """Nothing."""

    def step(self, metrics: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """Nothing."""

    def summary(self, summary: Mapping[str, Any], rows: Mapping[str, str]) -> None:
        """Nothing."""


class Reporter:
    """Writes metrics, log and summary of a run, and shows them on the terminal.

    Of a run in a bucket the files are written in a folder here, and copied there after every step: nothing is
    appended to in a bucket.
    """

    def __init__(self, directory: epath.Path, total: int, start: int) -> None:
        """Open the files of `directory` at step `start`.

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
            handler = LogFile(self.folder / LOG_FILE)
        self.log = logging.getLogger(f"fr3e_jax.{directory}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.handlers = [handler]
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = bars(self.console, transient=True)
        self.bar = self.progress.add_task("training", total=total, completed=start)
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
                raise  # else it is told why the run ended, which may be the same full disk

    def close(self, error: BaseException | None) -> None:
        """Write to the end, with the error that the run ended by."""
        with contextlib.ExitStack() as stack:
            if in_bucket(self.directory):
                stack.callback(shutil.rmtree, self.folder)
            stack.callback(self.publish)
            stack.callback(self.log.handlers[0].close)
            stack.callback(self.samples_file.close)
            stack.callback(self.metrics_file.close)
            if error is not None:
                self.log.error("ended by %s: %s", type(error).__name__, error)

    def publish(self) -> None:
        """Copy what was written to the bucket, if the run is in one."""
        if in_bucket(self.directory):
            for name in (METRICS_FILE, SAMPLES_FILE, LOG_FILE):
                upload(self.folder / name, self.directory / name)

    def say(self, message: str) -> None:
        """A line to the terminal and the log."""
        self.console.print(message, markup=False)
        with writing(self.directory):
            self.log.info(message)

    def step(self, metrics: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """Write the metrics of a step and a state to read, and show the step's line."""
        with writing(self.directory):
            if sample is not None:
                self.samples_file.write(to_json_line({"step": metrics["step"], **sample}))
                self.samples_file.flush()
            self.metrics_file.write(to_json_line(metrics))
            self.metrics_file.flush()
        self.say(step_line(metrics))
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


def step_line(metrics: Mapping[str, Any]) -> str:
    """One readable line of a step."""
    parts = [f"step {metrics['step']:>4}"]
    if "reward/root_mean" in metrics:
        parts += [
            f"root reward {metrics['reward/root_mean']:.3f}",
            f"entropy {metrics['entropy/mean']:.3f} nats",
            f"states +{metrics['states/accepted']} -{metrics['states/rejected']}",
            f"{metrics['tokens/generated']:,} tokens",
        ]
    elif "rounds" in metrics:
        parts.append("no sampling: the states carried over fill the batch")
    if metrics.get("update/skipped"):
        parts.append(f"updates skipped: {metrics['update/skipped']} (loss or gradient not finite)")
    if "time/step" in metrics:
        stages = " ".join(
            f"{name.removeprefix('time/')} {value:.1f}"
            for name, value in metrics.items()
            if name.startswith("time/") and name not in ("time/step", "time/evaluate")
        )
        parts.append(f"{metrics['time/step']:.1f} s ({stages})")
    if "eval/accuracy" in metrics:
        parts.append(f"held-out accuracy {metrics['eval/accuracy']:.1%}")
    return " | ".join(parts)


def to_json_line(metrics: Mapping[str, Any]) -> str:
    """One object, one line."""
    return json.dumps(metrics) + "\n"
