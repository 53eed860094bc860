"""The lengths of answers that a plan assumes."""

import dataclasses
import math

import numpy as np

SPREAD = 0.8  # standard deviation of the logarithm of answers' lengths


def lengths_of(count: int, mean: float, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths int [count] of answers: log-normal with mean `mean`, then cut at `limit`."""
    drawn = np.exp(math.log(max(mean, 1.0)) - SPREAD**2 / 2 + SPREAD * rng.standard_normal(count))
    return np.clip(np.ceil(drawn), 1, limit).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class AnswerLengths:
    """Lengths of the answers of a run, in tokens.

    mean: of answers. limit: most tokens of one. query: of a query. worst: every answer goes to the limit, and
    every position is at the beginning.
    """

    mean: float
    limit: int
    query: int
    worst: bool = False

    def whole(self, queries: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths int [queries, count] of answers to queries."""
        lengths = lengths_of(queries * count, self.mean, self.limit, rng).reshape(queries, count)
        return np.maximum(lengths, self.limit if self.worst else 1)

    def partial(
        self, trajectories: int, first: int, states: int, rollouts: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Lengths int [n, J, M] from states `first` up to `states`, at equal distances in their answers.

        A continuation is as long as the share of the answer that is left.
        """
        lengths = lengths_of(trajectories * (states - first) * rollouts, self.mean, self.limit, rng)
        lengths = lengths.reshape(trajectories, states - first, rollouts)
        if self.worst:
            return np.full_like(lengths, self.limit)
        share = 1 - np.arange(first, states)[:, None] / states
        return np.maximum(np.ceil(lengths * share), 1).astype(np.int32)

    def prefix(self, first: int, states: int) -> np.ndarray:
        """Tokens int [J] of an answer before its states `first` up to `states`."""
        place = np.arange(first, states) / states
        return np.ceil(place * (0 if self.worst else self.mean)).astype(np.int64)
