"""What a run tells: JSON lines for machines, a progress bar, lines and a summary for people."""

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

from fr3e_jax.host.progress import bars
from fr3e_jax.host.storage import in_bucket, upload, write_atomically
from fr3e_jax.parallel.hosts import is_first
from fr3e_jax.parallel.waiting import waiting

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
    """The lines of a run's metrics (or samples); a last line that a kill cut short is left out."""
    file = epath.Path(directory) / name
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reopen(directory: epath.Path, folder: Path, name: str, start: int) -> TextIO:
    """Open a file of JSON lines to append to at step `start`: what came after it is dropped.

    It is read from `directory`, and written in `folder`.
    """
    kept = [line for line in read_metrics(directory, name) if start and line["step"] <= start]
    write_atomically(folder / name, "".join(map(to_json_line, kept)))
    return (folder / name).open("a")


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
        """Open the files of `directory` at step `start`."""
        self.directory = directory
        self.folder = Path(tempfile.mkdtemp(prefix="fr3e_jax-") if in_bucket(directory) else directory)
        self.metrics_file = reopen(directory, self.folder, METRICS_FILE, start)
        self.samples_file = reopen(directory, self.folder, SAMPLES_FILE, start)
        if start < total:  # the mark of a run that is complete, perhaps of one with fewer steps
            (directory / SUMMARY_FILE).unlink(missing_ok=True)
        if in_bucket(directory) and (directory / LOG_FILE).exists():
            (self.folder / LOG_FILE).write_text((directory / LOG_FILE).read_text())
        self.log = logging.getLogger(f"fr3e_jax.{directory}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        handler = logging.FileHandler(self.folder / LOG_FILE)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.handlers = [handler]
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = bars(self.console, transient=True)
        self.bar = self.progress.add_task("training", total=total, completed=start)

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()
        if error is not None:
            self.log.error("ended by %s: %s", type(error).__name__, error)
        self.metrics_file.close()
        self.samples_file.close()
        self.log.handlers[0].close()
        self.publish()
        if in_bucket(self.directory):
            shutil.rmtree(self.folder)

    def publish(self) -> None:
        """Copy what was written to the bucket, if the run is in one."""
        if in_bucket(self.directory):
            for name in (METRICS_FILE, SAMPLES_FILE, LOG_FILE):
                upload(self.folder / name, self.directory / name)

    def say(self, message: str) -> None:
        """A line to the terminal and the log."""
        self.console.print(message, markup=False)
        self.log.info(message)

    def step(self, metrics: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """Write the metrics of a step and a state to read, and show the step's line."""
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
            self.log.info("%s: %s", name, value)
        self.console.print(table)
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
