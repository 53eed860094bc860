"""What every task is: a sequence of problems to train on, and others to be judged by."""

import dataclasses
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question as the model is asked it, and what its answer is judged by."""

    question: str
    answer: str
    scorer: str
    """Name of what judges an answer (host/scoring/rules.py)."""
    source: str = ""
    """Name of the source that it is of."""
    facts: Any = None
    """What the scorer needs beside the answer; goes to a worker process."""


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
