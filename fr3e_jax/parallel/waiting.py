"""Where a process is in its work with the others, so that it can say so when one of them is gone or late.

The news comes in many ways: an exception out of a computation, a barrier that times out, or jax's runtime,
which aborts this process from a thread of its own. All of them become one line and exit code 1.
"""

import contextlib
import ctypes
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jaxlib import _jax

GRACE = 3.0  # seconds that an abort leaves to the main thread, if that is about to end the process itself

# How jax says, on CPU, GPU and TPU, that a process does not answer.
SIGNS = re.compile(
    r"gloo|nccl|coordination service|barrier|heartbeat|connection (closed|reset|refused)|socket closed"
    r"|(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED):",
    re.IGNORECASE,
)


class HostError(RuntimeError):
    """Another process is gone or late; the message says which one waited, where and how long."""


class Whereabouts:
    """Where this process is, and whether it is ending.

    Attributes:
      command: what the line begins with.
      timeout: seconds, as configured.
      places: (name, when it was entered) of the blocks that it is in, the innermost last, the command first.
      ending: whether the main thread has the news.
      code: the exit code, once the main thread has said why it ends.
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
    except jax.errors.JaxRuntimeError as error:
        if rank()[1] == 1 or not SIGNS.search(str(error)):
            raise  # a fault of its own
        HERE.ending = True
        raise HERE.lost(error) from error
    finally:
        HERE.places.pop()


@contextlib.contextmanager
def told_of_losses() -> Iterator[None]:
    """Have the runtime that jax starts in this block end the process with the line, not with a C++ stack.

    It calls back when the coordinator is gone, or tells of a process that is.
    """
    # No public interface has it. With a jax that has it no longer, processes end as jax ends them.
    name, option = "get_distributed_runtime_client", "missed_heartbeat_callback"
    make = getattr(_jax, name, None)
    if make is None or option not in (make.__doc__ or ""):
        yield
        return
    on_bad_cast(HERE.last_words)
    setattr(_jax, name, functools.partial(make, **{option: HERE.last_words}))
    try:
        yield
    finally:
        setattr(_jax, name, make)


HELD: list[Any] = []  # what C++ points to must not be collected


def on_bad_cast(handler: Callable[[], Any]) -> None:
    """Call a function where a thread of C++ would end the process with an uncaught std::bad_cast.

    jaxlib (0.10 to 0.12) throws one instead of calling back, as it cannot hand its status to Python. Every
    other exception ends the process as before.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):  # not a Linux with this C++
        return
    kind = ctypes.CFUNCTYPE(None)
    set_terminate.restype, set_terminate.argtypes = kind, (kind,)
    current_type.restype = ctypes.POINTER(ctypes.c_char_p)  # a std::type_info: (its methods, its name)

    def end() -> None:
        thrown = current_type()
        if thrown and thrown[1] == b"St8bad_cast":
            handler()
        before()

    HELD.append(kind(end))
    before = set_terminate(HELD[-1])
