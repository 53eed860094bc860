"""Several processes, one a host, that run one program.

All take the same decisions, since they take them from values that are equal everywhere; each does the work on
text for its own rows of a batch. None waits longer for another than the time-out.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from fr3e_jax.config import ConfigError, DistributedConfig
from fr3e_jax.parallel.mesh import MESH_AXES
from fr3e_jax.parallel.waiting import HERE, HostError, rank, told_of_losses, waiting

INITIALIZE = "FR3E_DISTRIBUTED"
ADDRESS, PROCESSES, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


SERVED = 3.0  # seconds for which the first process still serves the others when it ends


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, where the configuration or the environment says that there are others.

    Where they are is found by jax (Cloud TPU, GKE, Slurm, MPI), or said by `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Call it before anything else of jax.

    Raises:
      ConfigError: they are not found, or the environment says only a part of it.
      HostError: they do not come within the time-out.
    """
    if not (config.initialize or os.environ.get(INITIALIZE, "") not in ("", "0")):
        return
    said = [name for name in (ADDRESS, PROCESSES, NUMBER) if os.environ.get(name)]
    told: dict[str, Any] = {}
    if PROCESSES in said or NUMBER in said:
        missing = [name for name in (ADDRESS, PROCESSES, NUMBER) if name not in said]
        if missing:
            raise ConfigError(f"{' and '.join(said)} set, and {' and '.join(missing)} not; set all three")
        try:
            told = {"num_processes": int(os.environ[PROCESSES]), "process_id": int(os.environ[NUMBER])}
        except ValueError:
            raise ConfigError(f"{PROCESSES} and {NUMBER} must be whole numbers") from None
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own notice of SIGTERM counts calls that both a run and orbax would make, each by its own numbers.
    jax.config.update("jax_enable_preemption_service", False)
    HERE.timeout = config.timeout
    with waiting("the start"), told_of_losses():
        try:
            jax.distributed.initialize(
                **told,
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
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def gather(tree: Any) -> Any:
    """Arrays of the mesh, whole, on the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a mesh. timeout: seconds that one waits for the others."""

    mesh: Mesh
    timeout: int

    def meet(self, where: str) -> None:
        """Wait for all processes.

        Raises:
          HostError: not all of them came in time.
        """
        if jax.process_count() == 1:
            return
        # Where processes are named orbax waits at the coordinator, with a time-out, not in a collective.
        everyone = set(range(jax.process_count()))
        HERE.timeout = self.timeout
        with waiting(where):
            multihost.sync_global_processes(where, timeout=self.timeout, processes=everyone)

    def rows_here(self, rows: int) -> np.ndarray:
        """Which rows of a batch this process answers for, bool [rows].

        Those whose first device is its own, so that a row has one process, also where several hold it.

        Args:
          rows: of the batch; the row parts of the mesh divide them.
        """
        devices = self.mesh.devices.reshape(-1, self.mesh.shape[MESH_AXES[-1]])
        here = [device.process_index == jax.process_index() for device in devices[:, 0]]
        return np.broadcast_to(np.array(here)[:, None], (len(here), rows // len(here))).reshape(rows)

    def add_up(self, x: np.ndarray, where: str) -> np.ndarray:
        """Sum over processes of host arrays, each of which is 0 in the rows of others.

        It follows work on text, for which each process takes its own time: so they meet first.
        """
        if jax.process_count() == 1:
            return x
        self.meet(where)
        with waiting(where):
            return np.asarray(multihost_utils.process_allgather(x)).sum(axis=0).astype(x.dtype)

    def of_first(self, number: int, where: str) -> int:
        """The first process's number, in [0, 2^31), on all of them."""
        return int(self.add_up(np.array([number if is_first() else 0], np.int32), where)[0])

    def said(self, text: str, where: str) -> str:
        """What a process says (400 bytes), known to all: the first that says something; else empty."""
        own = np.zeros((jax.process_count(), 400), np.uint8)
        raw = text.encode()[: own.shape[1]]
        own[jax.process_index(), : len(raw)] = list(raw)
        rows = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self.add_up(own, where)]
        return next(filter(None, rows), "")

    def require_same(self, number: int, what: str) -> None:
        """Refuse what is not the same on every host, by a number in [0, 2^31) that stands for it.

        Raises:
          ConfigError: this process has another than the first.
        """
        if self.of_first(number, f"{what} are read") != number:
            raise ConfigError(f"{what} are not the same on every host; copy those of the first")


@contextlib.contextmanager
def leaving_at_once(command: str) -> Iterator[None]:
    """Where there are several processes, end one that fails at once.

    jax's farewell at the end of a process waits for the others, who wait for this one in the midst of a step.

    Args:
      command: name of the module that is run.
    """
    HERE.command = command
    try:
        with waiting(command):
            yield
            if jax.distributed.is_initialized():
                with waiting("the end"):  # not where Python ends, which shows a traceback
                    jax.distributed.shutdown()
    except SystemExit as ending:
        if jax.distributed.is_initialized() and ending.code not in (0, None):
            leave(ending.code if isinstance(ending.code, int) else 1)
        raise
    except HostError as error:  # from where no command looks for it
        print(f"fr3e_jax.{command}: error: {error}", file=sys.stderr)
        leave(1)
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            leave(1)
        raise


def leave(code: int) -> NoReturn:
    """Exit without a farewell; the first process after those that leave for the same reason.

    It serves the others, who are to say for themselves why they end.
    """
    HERE.code = code
    sys.stdout.flush()
    sys.stderr.flush()
    if rank()[0] == 0:
        time.sleep(SERVED)
    os._exit(code)
