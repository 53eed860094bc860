"""The endless stream of queries, read by position, so that a position is all there is to resume.

Where questions are passed over by their remembered success rates, these belong to it (`difficulty`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fr3e_jax.config import ConfigError, DataConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.pretrained.text import Text
from fr3e_jax.problems.corpus import Corpus, is_made, sources_of
from fr3e_jax.problems.difficulty import MOST_QUESTIONS, Difficulty, SuccessRates
from fr3e_jax.problems.own_task import is_own
from fr3e_jax.types import Problem, Queries

PROMPT_BUCKET = 64  # queries are padded to a multiple of it where their lengths differ from call to call


def padded_width(tokens: int) -> int:
    """The width that queries of so many tokens are padded to, so that few are compiled."""
    return next_multiple(tokens, PROMPT_BUCKET)


@dataclasses.dataclass(frozen=True)
class QueryStream:
    """Training problems by their position in the stream, tokenized.

    problems: the endless stream, a function of the run's seed (`sources.stream`). difficulty: what passes
    over questions by their rates, in its place; None where all are asked.
    """

    problems: Any
    text: Text
    max_prompt: int
    hosts: Hosts
    difficulty: Difficulty | None = None

    def take(
        self, position: int, count: int, rates: SuccessRates | None = None
    ) -> tuple[Queries, Sequence[Problem], int]:
        """The next `count` queries from `position` on.

        Args:
          position: the first to look at.
          count: how many are wanted.
          rates: remembered success rates, where there is `difficulty`.

        Returns:
          (queries as host arrays, their problems, read when asked for, the position behind the last).
        """
        if self.difficulty is None or rates is None:
            problems = self.problems[position : position + count]
            return self.encode(problems, position), problems, position + count
        index, following = self.difficulty.positions(position, count, rates)
        problems = self.problems_at(index)
        queries = self.encode(problems, position)
        return dataclasses.replace(queries, index=index.astype(np.int32)), problems, following

    def problems_at(self, index: Int[np.ndarray, " B"]) -> list[Problem]:
        """Read the problems of queries again, by their places in the stream (`Queries.index`)."""
        if self.difficulty is None:
            return [self.problems[int(place)] for place in index]
        return [self.difficulty.problem(number) for number in self.difficulty.numbers(index).tolist()]

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


def difficulty_of(corpus: Corpus, data: DataConfig, seed: int, queries: int) -> Difficulty | None:
    """Make what passes over questions by their remembered success rates; None where all are asked.

    Args:
      corpus: of the run.
      data: its data section.
      seed: of the run.
      queries: of a round.

    Raises:
      ConfigError: the sources have no questions that come again, or too many or too few of them.
    """
    if data.retire_above is None and data.sample_by == "uniform":
        return None
    option = "data.sample_by difficulty" if data.retire_above is None else "data.retire_above"
    endless = [one.name for one in sources_of(data.source) if is_made(one.name) and not is_own(one.name)]
    if endless:
        raise ConfigError(
            f"{option} remembers questions that come again, and {endless[0]} makes new ones without end; "
            "name data sets, files or tasks of your own in data.source, or leave the option out"
        )
    made = Difficulty(corpus.tasks, corpus.weights, seed, data.retire_above, data.sample_by)
    if made.questions > MOST_QUESTIONS:
        raise ConfigError(
            f"{option} remembers up to {MOST_QUESTIONS:,} questions, and data.source has "
            f"{made.questions:,}; name fewer in data.source, or leave the option out"
        )
    if data.retire_above is not None and made.questions < queries:
        raise ConfigError(
            f"data.source has {made.questions} questions, fewer than rollout.queries {queries}, so that "
            "data.retire_above would leave less than a round; lower rollout.queries"
        )
    return made


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
