"""Where a process is in its work with the others, so that it can say so when one of them is gone or late.

The news comes in many ways: an exception out of a computation, a barrier that times out, or jax's runtime,
which aborts this process from a thread of its own. All of them become one line and exit code 1.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jax._src.lib import _jax

GRACE = 3.0  # seconds that an abort leaves to the main thread, if that is about to end the process itself

# How transports and jax's coordinator say that a process does not answer, on CPU, GPU and TPU.
SIGNS = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|coordination service|barrier|heartbeat"
    r"|connection (closed|reset|refused)|broken pipe",
    re.IGNORECASE,
)
KINDS = (RuntimeError, ValueError, OSError)  # jax's own errors are RuntimeErrors


class HostError(RuntimeError):
    """Another process is gone or late; the message says which one waited, where and how long."""


class Whereabouts:
    """Where this process is, and whether it is ending.

    command: what the line begins with. timeout: seconds, as configured. places: (name, when it was entered) of
    the blocks that it is in, innermost last; the first is the command. ending: the main thread has the news. code: exit code, once the
    main thread has said why it ends.
    """

    def __init__(self) -> None:
        self.command = "train"
        self.timeout = 0
        self.places: list[tuple[str, float]] = []
        self.ending = False
        self.code: int | None = None

    def lost(self, cause: object) -> HostError:
        """What to say when the others do not answer.

        Args:
          cause: what was noticed.
        """
        number, count = rank()
        name, begun = self.places[-1] if self.places else ("its own work", time.monotonic())
        outer = "".join(f" of {name!r}" for name, _ in reversed(self.places[:-1]))
        return HostError(
            f"process {number} of {count} waited {time.monotonic() - begun:.0f} s for the others at {name!r}"
            f"{outer} (--distributed.timeout {self.timeout}); one of them is gone or late: "
            f"{' '.join(str(cause).split())[:400]}"
        )

    def last_words(self, *_: object) -> NoReturn:
        """End with the line, from the thread in which jax's runtime would abort."""
        try:
            if self.ending or self.code is not None:
                time.sleep(GRACE)
            if self.code is None:
                line = self.lost("jax's runtime ended this process")
                os.write(2, f"fr3e_jax.{self.command}: error: {line}\n".encode())
        finally:
            os._exit(1 if self.code is None else self.code)


HERE = Whereabouts()


def rank() -> tuple[int, int]:
    """(number of this process, number of processes), also before they have met."""
    state = distributed.global_state
    return state.process_id, state.num_processes


@contextlib.contextmanager
def waiting(place: str) -> Iterator[None]:
    """Name what this block does with the other processes, for the message when they do not answer.

    Raises:
      HostError: they do not answer.
    """
    HERE.places.append((place, time.monotonic()))
    try:
        yield
    except HostError:
        raise
    except KINDS as error:
        if rank()[1] == 1 or not SIGNS.search(f"{type(error).__name__} {error}"):
            raise  # a fault of its own
        HERE.ending = True
        raise HERE.lost(error) from error
    finally:
        HERE.places.pop()


@contextlib.contextmanager
def told_of_losses() -> Iterator[None]:
    """Have the runtime that jax starts in this block end the process with the line, not with a C++ stack.

    It calls back when the coordinator is gone, or tells of a process that is. jaxlib (0.10 to 0.12) cannot
    hand what it says to Python and aborts in trying to, without a stack; so aborts are listened to as well.
    """
    # No public interface has it. With a jax that has it no longer, processes end as jax ends them.
    name, option = "get_distributed_runtime_client", "missed_heartbeat_callback"
    make = getattr(_jax, name, None)
    if make is None or option not in (make.__doc__ or ""):
        yield
        return
    on_abort(HERE.last_words)
    setattr(_jax, name, functools.partial(make, **{option: HERE.last_words}))
    try:
        yield
    finally:
        setattr(_jax, name, make)


HELD: list[Any] = []  # what C points to must not be collected


def on_abort(handler: Callable[[int], Any]) -> None:
    """Call a function in the thread that aborts. Python's own handlers run later, in the main thread."""
    HELD.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handler))
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(HELD[-1], ctypes.c_void_p))
