"""What the calls of the library give: queries, base trajectories, states, answers, and how they are shown."""

import dataclasses
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from fr3e_jax.config import ConfigError
from fr3e_jax.types import Queries, Rollouts, States

SHOWN = 3  # rows of what a repr shows


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Questions and their tokens. `queries` is padded with copies of the first to what the mesh divides."""

    questions: tuple[str, ...]
    queries: Queries

    def __repr__(self) -> str:
        tokens = self.queries.length[: len(self.questions)]
        return f"{len(self.questions)} queries of {tokens.min()} to {tokens.max()} tokens"


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """Base trajectories of queries.

    seed, step: what they were drawn with.
    """

    encoded: Encoded
    rollouts: Rollouts
    """Leaves [B, R, S], those of queries that are only padding included."""
    engine: Any
    """The `Explorer` that sampled them."""
    seed: int
    step: int

    @property
    def texts(self) -> list[list[str]]:
        """The text of every base trajectory, without those of padding: [B][R]."""
        return [self.texts_of(b) for b in range(len(self.encoded.questions))]

    def texts_of(self, query: int) -> list[str]:
        """The texts of the R base trajectories of a query, by its row."""
        token, length = self.rollouts.token[query], self.rollouts.length[query]
        answers = [token[r, :n] for r, n in enumerate(length)]
        return self.engine.model.text.answers(answers, self.rollouts.stopped[query])

    def __repr__(self) -> str:
        r = self.rollouts.length.shape[1]
        shown = enumerate(self.encoded.questions[:SHOWN])
        lines = [f"  {question!r}: {self.texts_of(b)[0]!r}" for b, question in shown]
        return "\n".join([f"{r} base trajectories of each of {self.encoded}; the first of each:", *lines])


@dataclasses.dataclass(frozen=True, eq=False)
class Restarts:
    """States of kept trajectories, N x J, to restart from.

    arrays: laid out for the mesh, so that N has rows of padding, which are not valid. value: once it is known
    (`with_values`).
    """

    base: Base
    arrays: States
    value: Float[np.ndarray, "N J"] | None = None

    @property
    def valid(self) -> Bool[np.ndarray, "N J"]:
        """Which states there are."""
        return np.asarray(self.arrays.valid)

    @property
    def prefixes(self) -> list[list[str | None]]:
        """The text that each state keeps of its base trajectory, [N][J]; None where there is no state."""
        return [
            [self.prefix(n, j) if valid else None for j, valid in enumerate(row)]
            for n, row in enumerate(self.valid)
        ]

    def prefix(self, trajectory: int, state: int) -> str:
        """The text that a state keeps of its base trajectory."""
        length = self.arrays.prefix_length[trajectory, state]
        return self.base.engine.model.text.decode([self.arrays.response[trajectory, :length]])[0]

    def with_values(self, value: Any) -> "Restarts":
        """The same states with V(S_j), float32 [N, J], to be shown."""
        shaped("value", value, self.valid.shape)
        return dataclasses.replace(self, value=np.asarray(value))

    def __repr__(self) -> str:
        kept = np.flatnonzero(self.valid.any(axis=1)).tolist()
        lines = [f"{self.valid.sum()} states of {len(kept)} trajectories"]
        for n in kept[:SHOWN]:
            lines.append(f"  {self.base.encoded.questions[self.arrays.query[n]]!r}")
            for j in np.flatnonzero(self.valid[n]).tolist():
                worth = "" if self.value is None else f"V={self.value[n, j]:.2f} "
                lines.append(f"    {worth}{self.prefix(n, j)!r}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Whole answers, prefixes included. question: of each trajectory, [N]. text: [N][J][M], None where there
    is no state."""

    question: list[str]
    text: list[list[list[str] | None]]
    rollouts: int

    def __repr__(self) -> str:
        some = next((texts for row in self.text for texts in row if texts), [])
        return f"answers of {self.rollouts} partial rollouts of each state, such as {some[:SHOWN]!r}"


def shaped(name: str, x: Array | np.ndarray | Any, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape.

    Raises:
      ConfigError: with both.
    """
    if np.shape(x) != shape:
        raise ConfigError(f"{name} has shape {list(np.shape(x))}, must be {list(shape)}")
