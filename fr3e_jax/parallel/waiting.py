"""The place where a process waits for the others, and the message when one of them is gone or late.

The loss of a process shows in many ways: an exception out of a computation, a barrier that times out, or an
abort of this process by a thread of jax's runtime. Each becomes one line and exit code 1.
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

BLOCKS = "fr3e_jax_blocks"  # attribute of an error
GRACE = 3.0  # seconds that an abort leaves to the main thread where that is about to end the process itself

# What errors of jax contain, on CPU, GPU and TPU, when a process does not answer.
SIGNS = re.compile(
    r"gloo|nccl|coordination service|barrier|heartbeat|connection (closed|reset|refused)|socket closed"
    r"|(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED):",
    re.IGNORECASE,
)


class HostError(RuntimeError):
    """Another process is gone or late; the message says which process waited, where and how long."""


class Whereabouts:
    """The place where this process waits, and whether it is ending.

    Attributes:
      command: name of the command, which the message begins with.
      timeout: seconds, as configured.
      places: (name, time of entry) of the blocks that it is in, the command first, the innermost last.
      ending: whether the main thread has noticed the loss.
      code: the exit code, once the main thread has printed why it ends.
    """

    def __init__(self) -> None:
        self.command = "train"
        self.timeout = 0
        self.places: list[tuple[str, float]] = []
        self.ending = False
        self.code: int | None = None

    def lost(self, cause: object) -> HostError:
        """Make the error for when the others do not answer.

        Args:
          cause: what showed the loss, such as an exception.
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
        """Print the message and exit, in the thread in which jax's runtime would abort."""
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
    """Return (number of this process, number of processes), also before they have joined."""
    state = distributed.global_state
    return state.process_id, state.num_processes


def blocks_of(error: BaseException) -> list[str]:
    """Return the names of the blocks of `waiting` in which an error was raised, the innermost last."""
    return vars(error).get(BLOCKS, [])


@contextlib.contextmanager
def waiting(place: str) -> Iterator[None]:
    """Name what this block waits for, for the message when the other processes do not answer.

    Raises:
      HostError: they do not answer.
    """
    HERE.places.append((place, time.monotonic()))
    try:
        yield
    except HostError:
        raise
    except (MemoryError, RuntimeError) as error:
        vars(error).setdefault(BLOCKS, [name for name, _ in HERE.places])
        lost = isinstance(error, jax.errors.JaxRuntimeError) and SIGNS.search(str(error))
        if rank()[1] == 1 or not lost:
            raise  # not the loss of a process
        HERE.ending = True
        raise HERE.lost(error) from error
    finally:
        HERE.places.pop()


@contextlib.contextmanager
def reporting_losses() -> Iterator[None]:
    """Have the runtime that jax starts in this block end the process with the message, not a C++ stack trace.

    The runtime calls back when the coordinator is gone, or reports that another process is.
    """
    # There is no public interface. With a jax that has dropped this one, processes end as jax ends them.
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


HELD: list[Any] = []  # functions that C++ points to, which Python must not free


def on_bad_cast(handler: Callable[[], Any]) -> None:
    """Call a function where a thread of C++ would end the process with an uncaught std::bad_cast.

    jaxlib (0.10 to 0.12) throws one instead of calling back, since it cannot pass its status to Python. All
    other exceptions end the process as before.
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
