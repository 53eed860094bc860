"""The endless stream of queries, read by position, so that a position is all there is to resume."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.pretrained.text import Text
from fr3e_jax.types import Problem, Queries

PROMPT_BUCKET = 64  # queries are padded to a multiple of it where their lengths differ from call to call


def padded_width(tokens: int) -> int:
    """The width that queries of so many tokens are padded to, so that few are compiled."""
    return next_multiple(tokens, PROMPT_BUCKET)


@dataclasses.dataclass(frozen=True)
class QueryStream:
    """Training problems by their position in the stream, tokenized.

    problems: the endless stream, a function of the run's seed (`sources.stream`).
    """

    problems: Any
    text: Text
    max_prompt: int
    hosts: Hosts

    def take(self, position: int, count: int) -> tuple[Queries, Sequence[Problem]]:
        """The `count` queries from `position` on, as host arrays, and their problems, read when asked for."""
        problems = self.problems[position : position + count]
        return self.encode(problems, position), problems

    def encode(self, problems: Sequence[Problem], first_index: int = 0) -> Queries:
        """Tokenize problems into right-padded host arrays, each process its own rows.

        Raises:
          ConfigError: a query is longer than `max_prompt`.
        """
        count = len(problems)
        token, length = np.zeros((count, self.max_prompt), np.int32), np.zeros(count, np.int32)
        for i in np.flatnonzero(self.hosts.rows_here(count)).tolist():
            row = encode_query(problems[i], self.text, self.max_prompt)
            token[i, : len(row)], length[i] = row, len(row)
        packed = np.concatenate([token, length[:, None]], axis=1)
        packed = self.hosts.add_up(packed, f"queries from {first_index} on")
        index = np.arange(first_index, first_index + count, dtype=np.int32)
        return Queries(packed[:, :-1], packed[:, -1], index)


def encode_query(problem: Problem, text: Text, max_prompt: int) -> list[int]:
    """Tokenize a problem as the model sees it.

    Raises:
      ConfigError: they are more than `max_prompt`.
    """
    row = text.query(problem.question, problem.before)
    if len(row) > max_prompt:
        raise ConfigError(
            f"query {problem.question[:60]!r} has {len(row)} tokens, more than rollout.max_prompt "
            f"{max_prompt}; raise it, or use --data.too_long drop"
        )
    return row
