"""What every task is: a sequence of problems to train on, and others to be judged by."""

import dataclasses
from typing import Any, Protocol

Turns = tuple[tuple[str, str], ...]
"""Turns of a chat: (role, text) each."""


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
    before: Turns = ()
    """What is said before the question, where it is the last turn of a chat: a system turn, earlier turns."""

    @property
    def asked(self) -> str:
        """The text it is known again by: the question behind what was said before, without the system."""
        return "\n".join([*(text for role, text in self.before if role != "system"), self.question])


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
