"""Requests to stop: SIGTERM, which a machine that is preempted sends to its processes."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

import numpy as np

from fr3e_jax.parallel.hosts import Hosts

Handler = Callable[[int, FrameType | None], object]


class Interrupted(Exception):
    """All processes of a run stop here, at the same point of the program."""


@contextlib.contextmanager
def on_sigterm(handler: Handler) -> Iterator[None]:
    """Call a handler at SIGTERM within the block, and put back afterwards what was there before.

    Only the main thread of a process can set handlers; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exiting_at_sigterm() -> contextlib.AbstractContextManager[None]:
    """End the process at SIGTERM with exit code 143, after the blocks that it is in have cleaned up."""
    return on_sigterm(_exit)


class Interruption:
    """Whether one of a run's processes is asked to stop.

    A context manager: SIGTERM is noticed within it, and handled as before once it is left.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.asked = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        self._stack.enter_context(on_sigterm(self.ask))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Remember that this process is asked to stop."""
        self.asked = True

    def check(self) -> None:
        """Stop all processes if one of them is asked to.

        Every process calls this the same number of times, at the same points of the program.

        Raises:
          Interrupted: a process is asked to stop.
          HostError: a process did not come here in time.
        """
        if self.hosts.add_up(np.array([self.asked], np.int32), "a look whether to stop").any():
            raise Interrupted


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
