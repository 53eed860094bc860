"""What every task is: a sequence of problems to train on, and others to be judged by."""

from typing import Protocol

from fr3e_jax.types import Problem


class Task(Protocol):
    """Training problems, and held-out problems that are none of them."""

    def __len__(self) -> int:
        """Number of training problems."""

    def __getitem__(self, index: int) -> Problem:
        """A training problem, the same at every call.

        Raises:
          IndexError: `index` is not below the length.
        """

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, all different; all of them where there are fewer.

        Raises:
          ConfigError: there is none.
        """
