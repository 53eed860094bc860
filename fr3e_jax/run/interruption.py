"""Being asked to stop by SIGTERM, which a machine that is taken away sends to what runs on it."""

import signal
from types import FrameType

import numpy as np

from fr3e_jax.parallel.hosts import Hosts


class Interrupted(Exception):
    """All processes stop here, at the same point of the program."""


class Interruption:
    """Whether the run is asked to stop, on any of its hosts."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Remember it."""
        self.asked = True

    def check(self) -> None:
        """Stop if it is asked for. Every process calls it as often, at the same points of the program.

        Raises:
          Interrupted: a process is asked to stop.
          HostError: a process did not come here in time.
        """
        if self.hosts.add_up(np.array([self.asked], np.int32), "a look whether to stop").any():
            raise Interrupted
