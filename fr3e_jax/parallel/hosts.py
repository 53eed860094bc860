"""Several processes, one on each host, that run one program.

All take the same decisions, since they take them from values that are equal on all processes. Each tokenizes
and scores the text of its own rows of a batch. None waits longer for another than the time-out.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool, Shaped
from orbax.checkpoint import multihost

from fr3e_jax.config import ConfigError, DistributedConfig
from fr3e_jax.parallel.mesh import MESH_AXES
from fr3e_jax.parallel.sizes import next_power_of_two
from fr3e_jax.parallel.waiting import HERE, HostError, rank, reporting_losses, waiting

Done = TypeVar("Done")
Failure = TypeVar("Failure", bound=Exception)

INITIALIZE = "FR3E_DISTRIBUTED"
ADDRESS, PROCESSES, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LINGER = 3.0  # seconds for which the first process, which coordinates the others, outlives them when it fails


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, where the configuration or the environment says that there are others.

    jax finds them by itself on Cloud TPU, GKE, Slurm and MPI. Elsewhere `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say where they are. Call it before anything else of jax.

    Raises:
      ConfigError: they are not found, or only some of the variables are set.
      HostError: they do not all join within the time-out.
    """
    if not (config.initialize or os.environ.get(INITIALIZE, "") not in ("", "0")):
        return
    given = [name for name in (ADDRESS, PROCESSES, NUMBER) if os.environ.get(name)]
    place: dict[str, Any] = {}
    if PROCESSES in given or NUMBER in given:
        missing = [name for name in (ADDRESS, PROCESSES, NUMBER) if name not in given]
        if missing:
            raise ConfigError(f"{' and '.join(given)} set, and {' and '.join(missing)} not; set all 3")
        try:
            place = {"num_processes": int(os.environ[PROCESSES]), "process_id": int(os.environ[NUMBER])}
        except ValueError:
            raise ConfigError(f"{PROCESSES} and {NUMBER} must be whole numbers") from None
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own handling of SIGTERM counts calls that a run and orbax would both make, each by its own count.
    jax.config.update("jax_enable_preemption_service", False)
    HERE.timeout = config.timeout
    with waiting("the start"), reporting_losses():
        try:
            jax.distributed.initialize(
                **place,
                initialization_timeout=config.timeout,
                heartbeat_timeout_seconds=config.timeout,
                shutdown_timeout_seconds=config.timeout,
            )
        except ValueError as error:
            raise ConfigError(
                f"--distributed.initialize: the other processes are not found ({error}); on machines that "
                f"jax does not know, set {ADDRESS} (host:port of the first), {PROCESSES} and {NUMBER}"
            ) from None
        except RuntimeError as error:
            if not jax.distributed.is_initialized():
                raise ConfigError(f"the first process cannot serve the others: {error}") from None
            raise HERE.lost("they did not all come") from error


def is_first() -> bool:
    """Tell whether this process is the first, which writes the files of a run."""
    return jax.process_index() == 0


def gather(tree: Any) -> Any:
    """Copy arrays of the mesh, whole, to the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes that share a mesh. timeout: seconds that one waits for the others."""

    mesh: Mesh
    timeout: int

    def meet(self, where: str) -> None:
        """Wait until all processes have come here.

        Args:
          where: what this process waits for, for the message.

        Raises:
          HostError: not all of them came in time.
        """
        if jax.process_count() == 1:
            return
        # Where it is given processes, orbax waits at the coordinator with a time-out, not in a collective.
        everyone = set(range(jax.process_count()))
        HERE.timeout = self.timeout
        with waiting(where):
            multihost.sync_global_processes(where, timeout=self.timeout, processes=everyone)

    def rows_here(self, rows: int) -> Bool[np.ndarray, " {rows}"]:
        """Find the rows of a batch whose text this process works on.

        These are the rows whose first device is its own: each row has one process, also where several
        processes hold it.

        Args:
          rows: of the batch; the row parts of the mesh divide them.
        """
        devices = self.mesh.devices.reshape(-1, self.mesh.shape[MESH_AXES[-1]])
        here = [device.process_index == jax.process_index() for device in devices[:, 0]]
        return np.broadcast_to(np.array(here)[:, None], (len(here), rows // len(here))).reshape(rows)

    def add_up(self, x: Shaped[np.ndarray, "*axes"], where: str) -> Shaped[np.ndarray, "*axes"]:
        """Add up host arrays over processes, each of which is 0 in the rows of others.

        It follows work on text, which takes each process another time. So they meet first.

        Raises:
          HostError: not all of them came in time.
        """
        if jax.process_count() == 1:
            return x
        self.meet(where)
        with waiting(where):
            return np.asarray(multihost_utils.process_allgather(x)).sum(axis=0).astype(x.dtype)

    def of_first(self, number: int, where: str) -> int:
        """Share a number in [0, 2^31): all processes return that of the first."""
        return int(self.add_up(np.array([number if is_first() else 0], np.int32), where)[0])

    def said(self, text: str, where: str) -> str:
        """Share a text of at most 400 bytes: all processes return the first that is not empty."""
        own = np.zeros((jax.process_count(), 400), np.uint8)
        raw = text.encode()[: own.shape[1]]
        own[jax.process_index(), : len(raw)] = list(raw)
        rows = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self.add_up(own, where)]
        return next(filter(None, rows), "")

    def first_alone(self, work: Callable[[], Any], where: str) -> None:
        """Let the first process work while the others wait, however long it takes.

        They meet several times within a time-out, so that they still notice when it is gone.

        Args:
          work: done in a thread where there are other processes.
          where: what these wait for, for the message.

        Raises:
          HostError: a process is gone or late.
          Exception: on the first process, what `work` raises.
        """
        if jax.process_count() == 1:
            work()
            return
        doing = concurrent.futures.ThreadPoolExecutor(1).submit(work) if is_first() else None
        done = False
        while not done:
            if doing is not None:
                concurrent.futures.wait([doing], self.timeout / 4)
            done = self.of_first(doing is not None and doing.done(), where) == 1
        if doing is not None:
            doing.result()

    def all_or_none(self, work: Callable[[], Done], failure: type[Failure], where: str) -> Done:
        """Do work that may fail on some of the processes; where it fails on one, all raise.

        So they end alike, and can save before, for which each needs the others.

        Args:
          work: what this process does.
          failure: the error of `work` that the processes share. Any other is raised here alone.
          where: what the processes wait for, for the message.

        Returns:
          What `work` returns.

        Raises:
          Failure: `work` raised it here or on another process, whose message is cut off after 400 bytes.
          HostError: not all of them came in time.
        """
        own: Failure | None = None
        try:
            done = work()
        except failure as error:
            own = error
        message = self.said("" if own is None else str(own) or "it failed", where)
        if own is not None:
            raise own
        if message:
            raise failure(message)
        return done

    def gather_bytes(self, data: bytes, where: str) -> list[bytes]:
        """Share bytes of any length: all processes return those of each process, in their order.

        Raises:
          HostError: not all of them came in time.
        """
        if jax.process_count() == 1:
            return [data]
        lengths = np.zeros(jax.process_count(), np.int32)
        lengths[jax.process_index()] = len(data)
        lengths = self.add_up(lengths, where)
        padded = np.zeros(next_power_of_two(int(lengths.max())), np.uint8)  # a program for each length
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        with waiting(where):
            rows = np.asarray(multihost_utils.process_allgather(padded))
        return [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]

    def require_same(self, number: int, what: str) -> None:
        """Refuse what is not the same on every host.

        Args:
          number: a checksum of it, in [0, 2^31).
          what: its name in the plural, for the message.

        Raises:
          ConfigError: this process has another number than the first.
        """
        if self.of_first(number, f"{what} are read") != number:
            raise ConfigError(f"{what} are not the same on every host; copy those of the first")


@contextlib.contextmanager
def leaving_at_once(command: str) -> Iterator[None]:
    """Run a command in this block; where there are several processes, end one that fails at once.

    At its normal end a process of jax waits for the others, who may wait for this one in the midst of a step.

    Args:
      command: name of the module that is run, for messages.
    """
    HERE.command = command
    try:
        with waiting(command):
            yield
            if jax.distributed.is_initialized():
                with waiting("the end"):  # jax would do it while Python exits, and fail with a traceback
                    jax.distributed.shutdown()
    except SystemExit as ending:
        if jax.distributed.is_initialized() and ending.code not in (0, None):
            leave(ending.code if isinstance(ending.code, int) else 1)
        raise
    except HostError as error:  # which the command did not catch
        print(f"fr3e_jax.{command}: error: {error}", file=sys.stderr)
        leave(1)
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            leave(1)
        raise


def leave(code: int) -> NoReturn:
    """Exit without waiting for the others, the first process some seconds later.

    The others may leave for the same reason, and need the first, their coordinator, to report it.
    """
    HERE.code = code
    sys.stdout.flush()
    sys.stderr.flush()
    if rank()[0] == 0:
        time.sleep(LINGER)
    os._exit(code)
