"""Trackers: TensorBoard, Weights & Biases and trackio are given what the reporter writes.

Each runs in a process of its own (`tracker_process`). A thread writes to its standard input. A step only puts
a message into a queue, so no tracker can end a run or hold it up, whatever its library does. What a tracker
loses is in metrics.jsonl and samples.jsonl.
"""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fr3e_jax.config import Config, ConfigError, ReportConfig, as_written
from fr3e_jax.run.storage import in_bucket, write_atomically

TRACKER_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
WAITING_MESSAGES = 1000  # steps that a tracker may be behind
CLOSING_SECONDS = 30.0  # that all trackers together may take at the end of a run, to send what they hold
IDENTITY_FILE = "report.json"


def require_trackers(report: ReportConfig) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
      ConfigError: with the command that installs one.
    """
    for name in report.to:
        if importlib.util.find_spec(TRACKER_PACKAGES[name]) is None:
            raise ConfigError(
                f"report.to names {name}, and the package {TRACKER_PACKAGES[name]} is not installed; "
                f"pip install 'fr3e_jax[{name}]' brings it"
            )


def open_trackers(config: Config, directory: epath.Path, start: int) -> list["Tracker"]:
    """Start the processes of the trackers that `report.to` names.

    Args:
      config: of the run.
      directory: of the run.
      start: the step that it goes on from; 0 begins a new run, under an id of its own.
    """
    report = config.report
    if not report.to:
        return []
    settings = {
        "id": run_identity(directory, start),
        "project": report.project,
        "name": report.name or directory.name,
        "directory": str(directory),
        # Of a run in a bucket they are written on this machine alone.
        "scratch": tempfile.mkdtemp(prefix="fr3e_jax-") if in_bucket(directory) else str(directory),
        "first_step": start + 1 if start else 0,
        "config": as_written(config),
    }
    return [Tracker(name, settings) for name in report.to]


def run_identity(directory: epath.Path, start: int) -> str:
    """The id that trackers know a run by, which it keeps when it goes on: 8 random hexadecimal digits."""
    file = directory / IDENTITY_FILE
    if start:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(file.read_text())["id"])
    identity = uuid.uuid4().hex[:8]
    write_atomically(file, json.dumps({"id": identity}) + "\n")
    return identity


class Tracker:
    """A process that passes on what it is sent, and that may fail, hang or be slow.

    name: as in `report.to`.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Start the process.

        Args:
          name: as in `report.to`.
          settings: what `tracker_process.open_tracker` needs.
        """
        self.name = name
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115, closed with the tracker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fr3e_jax.run.tracker_process", name],
            stdin=subprocess.PIPE,
            stdout=self.printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the run, which then closes it
        )
        self.messages: queue.Queue[bytes | None] = queue.Queue(WAITING_MESSAGES)
        self.given_up = False
        self.send(settings)
        self.thread = threading.Thread(target=self.pass_on, name=f"to {name}", daemon=True)
        self.thread.start()

    def pass_on(self) -> None:
        """Write messages to the process, until there is no more of one of the two."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError), stdin:
            while (message := self.messages.get()) is not None:
                stdin.write(message)
                stdin.flush()

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; without waiting, and without an error where nobody takes it."""
        if not self.given_up:
            with contextlib.suppress(queue.Full):
                self.messages.put_nowait(json.dumps(message).encode() + b"\n")

    def warnings(self) -> list[str]:
        """A line for people where the tracker has just been lost; then it is sent nothing more."""
        lost = self.process.poll() is not None
        if self.given_up or not (lost or self.messages.full()):
            return []
        why = f"it ended: {self.last_words()}" if lost else f"it is {WAITING_MESSAGES} steps behind"
        self.stop()
        return [f"warning: report.to {self.name} is given up ({why}); metrics.jsonl has all of it"]

    def last_words(self) -> str:
        """The last line that the process printed."""
        self.printed.seek(0)
        lines = [line.strip() for line in self.printed.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "without a word")[:300]

    def stop(self) -> None:
        """End the process, and those that it has started, at once."""
        self.given_up = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(queue.Full):
            self.messages.put_nowait(None)
        self.thread.join()  # what it writes to is gone
        self.printed.close()

    def close(self, deadline: float) -> list[str]:
        """Let the process send what it has, and end it at the deadline.

        Args:
          deadline: in seconds of the monotonic clock.

        Returns:
          Lines for people on what is lost.
        """
        if self.given_up:
            return []
        if lines := self.warnings():
            return lines
        try:
            self.messages.put(None, timeout=max(deadline - time.monotonic(), 0))
            code = self.process.wait(max(deadline - time.monotonic(), 0))
        except (queue.Full, subprocess.TimeoutExpired):
            self.stop()
            return [
                f"warning: report.to {self.name} was not done {CLOSING_SECONDS:g} s behind the end, and is "
                "stopped; it may lack the last steps, which metrics.jsonl has"
            ]
        lines = [f"warning: report.to {self.name} failed at the end: {self.last_words()}"] if code else []
        self.stop()
        return lines


def close_trackers(trackers: Sequence[Tracker]) -> list[str]:
    """Close all of them within `CLOSING_SECONDS`.

    Returns:
      Lines for people on what is lost.
    """
    deadline = time.monotonic() + CLOSING_SECONDS
    return [line for tracker in trackers for line in tracker.close(deadline)]
