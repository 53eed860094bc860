"""The lock on a directory, or a place in a bucket, that one run at a time may write to.

The lock is the file `lock.json` there. It names the process that owns the place, which writes it anew every
BEAT seconds. Another process that finds it decides whether the owner is alive:

- On the same machine the operating system knows, at once.
- On another machine, or in another container, it looks for WATCH seconds whether the file is written anew.
  Where the last writing is STALE seconds old, the owner is taken for dead at once. So a run that goes on on
  another machine after a preemption waits for a minute at most, and a second start of a run that is going on
  is refused within BEAT seconds.

The lock of a dead owner is taken over. Of the several processes of a run the first owns the lock.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.run.lock_file import LOCK_FILE, LockFile, lock_file
from fr3e_jax.run.storage import FULL, ChangedError, StorageError, brief, in_bucket

BEAT = 15.0  # seconds between two writings of the lock by its owner
WATCH = 60.0  # seconds without a new writing after which an owner on another machine is dead
STALE = 300.0  # age in seconds, by this machine's clock, at which nobody looks for WATCH seconds
LOOK = 1.0  # seconds between two looks at the lock of another machine


class HeldError(ConfigError):
    """A living process owns the place; the message says which."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that a lock names.

    host: name of the machine, for people. machine: identifies its kernel and its process numbers. pid:
    number of the process. started: when that process began, against numbers that are used again. token:
    identifies this taking of the lock. beat: how often the lock was written. time: of the last writing,
    seconds since 1970.
    """

    command: str
    host: str
    machine: str
    pid: int
    started: str
    token: str
    beat: int
    time: float

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.host}"


def this_process(command: str) -> Owner:
    """This process as the owner of a lock that it has not written yet."""
    pid = os.getpid()
    return Owner(
        command, socket.gethostname(), this_machine(), pid, start_of(pid), uuid.uuid4().hex, 0, time.time()
    )


def this_machine() -> str:
    """Identify the running kernel and the space of process numbers, which containers have of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not a Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def start_of(pid: int) -> str:
    """When a process of this machine began, in the system's own units; empty if there is none.

    A process that has ended and that its parent has not looked after yet is none.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if state in "ZX" else fields[18]
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip()


def parse_owner(content: bytes) -> Owner | None:
    """The owner that a lock file names; None where the file is damaged."""
    try:
        fields = json.loads(content)
        owner = Owner(**{field.name: fields[field.name] for field in dataclasses.fields(Owner)})
        return owner if isinstance(owner.pid, int) and isinstance(owner.time, int | float) else None
    except (ValueError, KeyError, TypeError):
        return None


class Lock:
    """The lock of one command on one place.

    A context manager that releases the lock at its end, also where the end is an error.
    """

    def __init__(self, command: str, hosts: Hosts, say: Callable[[str], None] = print) -> None:
        """Prepare a lock; nothing is taken yet.

        Args:
          command: name of the module that is run.
          hosts: all processes of the run.
          say: shows a line, where a decision takes a while.
        """
        self.hosts = hosts
        self.say = say
        self.owner = this_process(command)
        self.messages: list[str] = []
        """Lines for people on locks that were taken over."""
        self._place: epath.Path | None = None
        self._file: LockFile | None = None
        self._made: list[Path] = []
        self._watched: tuple[bytes, float] | None = None  # a foreign lock, and when it was first seen so
        self._beating: threading.Thread | None = None
        self._ending = threading.Event()
        self._lost = ""

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, place: epath.Path, option: str = "--run_dir") -> None:
        """Take the lock of a place. Every process of a run calls this; the first one takes it.

        A directory that is not there is made. Nothing happens where the lock is held already.

        Args:
          place: directory, or place in a bucket.
          option: that named it, for messages.

        Raises:
          HeldError: a living process owns it.
          ConfigError: it cannot be written to.
          StorageError: the disk is full, or the bucket does not answer.
        """
        if self._place is not None:
            return
        kinds: tuple[type[Exception], ...] = (HeldError, ConfigError, StorageError)
        while True:
            outcome = ""
            if is_first():
                try:
                    outcome = "" if self._attempt(place, option) else "wait"
                except kinds as error:
                    kind = next(number for number, each in enumerate(kinds) if isinstance(error, each))
                    outcome = f"{kind} {error}"
            outcome = self.hosts.said(outcome, f"the lock of {option} is taken")
            if not outcome:
                break
            if outcome != "wait":
                number, _, message = outcome.partition(" ")
                raise kinds[int(number)](message)
            time.sleep(LOOK)
        self._place = place
        if is_first():
            self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._beating.start()

    def check(self) -> None:
        """Refuse to go on where another process has taken the lock over.

        Raises:
          StorageError: it has, since this one did not write the lock for too long.
        """
        if self._lost:
            raise StorageError(self._lost)

    def release(self) -> None:
        """Give the lock back, if it is held; directories that were made for it go if they are empty."""
        if self._beating is not None:
            self._ending.set()
            self._beating.join()
            self._beating = None
        if self._file is not None and not self._lost:
            # Otherwise what is left is the lock of a dead process.
            with contextlib.suppress(OSError, StorageError, ChangedError):
                self._file.remove()
        self._file, self._place = None, None
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break
        self._made = []

    def _attempt(self, place: epath.Path, option: str) -> bool:
        """Try once to take the lock; False: look again soon."""
        try:
            self._make_directory(place)
            file = lock_file(place)
            held = file.read()
            if held is not None and not self._may_replace(held, place):
                return False
            file.write(self._content())
        except ChangedError:  # by another process that came first
            return False
        except OSError as error:
            if error.errno in FULL:
                raise StorageError(f"{option} {place} cannot be written ({brief(error)})") from None
            raise ConfigError(f"{option} {place} cannot be written: {error}") from None
        self._file = file
        return True

    def _make_directory(self, place: epath.Path) -> None:
        """Make the directory and those above it, and remember which of them were not there."""
        if in_bucket(place):
            return
        folder = Path(place).absolute()
        absent = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = self._made or absent

    def _may_replace(self, held: bytes, place: epath.Path) -> bool:
        """Whether the owner of a lock is dead; False where that is not known yet.

        Raises:
          HeldError: it is alive.
        """
        owner = parse_owner(held)
        if owner is not None and owner.token == self.owner.token:
            return True  # a writing of which the answer was lost
        if owner is not None and owner.machine == self.owner.machine:
            if owner.started and start_of(owner.pid) == owner.started:
                raise HeldError(self._refusal(owner, place))
            self.messages.append(f"{place} was left by {owner}, which has ended; it is taken over")
            return True
        now = time.monotonic()
        if self._watched is None:
            if owner is not None and time.time() - owner.time > STALE:
                minutes = (time.time() - owner.time) / 60
                self.messages.append(
                    f"{place} was left by {owner}, not heard of for {minutes:.0f} minutes; it is taken over"
                )
                return True
            self._watched = held, now
            self.say(
                f"{place} has the lock of {owner or 'an unknown process'}; for {WATCH:.0f} s it is watched "
                "whether that is alive"
            )
        first, since = self._watched
        if held != first:
            if owner is None:
                self._watched = held, now
                return False
            raise HeldError(self._refusal(owner, place))
        if now - since < WATCH:
            return False
        self.messages.append(
            f"{place} was left by {owner or 'an unknown process'}, not heard of for {WATCH:.0f} s; it is "
            "taken over"
        )
        return True

    def _refusal(self, owner: Owner, place: epath.Path) -> str:
        return (
            f"{place} is in use by {owner}; wait for its end, stop it, or choose another directory (if it is "
            f"surely dead, delete {place / LOCK_FILE})"
        )

    def _content(self) -> bytes:
        """The lock file's next content."""
        self.owner = dataclasses.replace(self.owner, beat=self.owner.beat + 1, time=time.time())
        fields: dict[str, Any] = dataclasses.asdict(self.owner)
        return json.dumps(fields, indent=1).encode() + b"\n"

    def _beat(self) -> None:
        """Write the lock anew until it is released, or another process has taken it over."""
        assert self._file is not None
        while not self._ending.wait(BEAT):
            try:
                self._file.write(self._content())
            except ChangedError:
                try:
                    held = self._file.read()
                except Exception:
                    continue
                owner = parse_owner(held or b"")
                if held is None or (owner is not None and owner.token == self.owner.token):
                    continue  # deleted by hand, or a writing of which the answer was lost
                self._lost = (
                    f"{self._place} was taken over by {owner or 'another process'}, since this process did "
                    f"not write its lock for {WATCH:.0f} s; it ends"
                )
                return
            except Exception:  # such as a bucket that does not answer: the next try is soon
                continue
