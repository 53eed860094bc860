"""The endless stream of queries, read by position, so that a position is all there is to resume."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from fr3e_jax.config import ConfigError
from fr3e_jax.host.tasks import Problem, Task
from fr3e_jax.host.text import Text
from fr3e_jax.types import Queries


@dataclasses.dataclass(frozen=True)
class QueryStream:
    """A task's training problems, shuffled anew in every epoch by the seed of the run."""

    task: Task
    text: Text
    max_prompt: int
    seed: int

    def take(self, position: int, count: int) -> tuple[Queries, list[Problem]]:
        """The `count` queries from `position` on, as host arrays, and their problems."""
        shuffled = grain.MapDataset.source(self.task).seed(self.seed).shuffle().repeat()
        problems = [shuffled[i] for i in range(position, position + count)]
        return encode_queries(problems, self.text, self.max_prompt, position), problems


def encode_queries(problems: Sequence[Problem], text: Text, max_prompt: int, first_index: int = 0) -> Queries:
    """Tokenize problems into right-padded host arrays.

    Raises:
      ConfigError: a query is longer than `max_prompt`.
    """
    rows = [text.query(problem.question) for problem in problems]
    token = np.zeros((len(rows), max_prompt), np.int32)
    for i, row in enumerate(rows):
        if len(row) > max_prompt:
            raise ConfigError(
                f"query {problems[i].question[:60]!r} has {len(row)} tokens, more than "
                f"rollout.max_prompt {max_prompt}; raise it"
            )
        token[i, : len(row)] = row
    length = np.array([len(row) for row in rows], np.int32)
    index = np.arange(first_index, first_index + len(rows), dtype=np.int32)
    return Queries(token, length, index)
