"""How often each question was answered right, and which questions come next by it.

The paper leaves open how the difficulty of questions is to be used. Here each training question has a
remembered success rate, and the endless stream passes over some questions: over solved ones, or mostly over
those that are nearly always or nearly never answered right.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from fr3e_jax.problems.task import Task
from fr3e_jax.types import Problem

SampleBy = Literal["uniform", "difficulty"]

MOST_QUESTIONS = 2**20  # that are remembered
NEWEST = 0.5  # weight of the newest visit in a remembered rate
FLOOR = 0.1  # least weight of a question that is not retired: it comes in one epoch of ten
RATE_ROUNDING = 1e-6
POSITIONS_AT_ONCE = 4096  # positions that are looked at together
SHARE_PARTS = 2**20  # into which the shares of sources are rounded
ORDER, CHANCE = 1, 2  # what random numbers are for


@dataclasses.dataclass(frozen=True, eq=False)
class SuccessRates:
    """Success rates of all training questions, those of the first source first. None is changed in place."""

    visits: Int32[np.ndarray, " questions"]
    """How many rounds have asked each question."""
    rate: Float32[np.ndarray, " questions"]
    """Average share of right answers, 0 where there is no visit."""


def unseen(questions: int) -> SuccessRates:
    """Make the rates of questions that have not been asked."""
    return SuccessRates(np.zeros(questions, np.int32), np.zeros(questions, np.float32))


def visited(
    rates: SuccessRates, question: Int[np.ndarray, " n"], success: Float[np.ndarray, " n"]
) -> SuccessRates:
    """Add visits, one after the other: the first sets a rate, and each later one has half of the weight.

    The policy changes, so that older answers count for less.

    Args:
      rates: up to here.
      question: number of each question that was asked.
      success: its share of right answers; nan where none counts, which is no visit.
    """
    visits, rate = rates.visits.copy(), rates.rate.copy()
    for number, share in zip(question.tolist(), success.tolist(), strict=True):
        if np.isnan(share):
            continue
        weight = NEWEST if visits[number] else 1.0
        rate[number] += np.float32(weight * (share - rate[number]))
        visits[number] += 1
    return SuccessRates(visits, rate)


def retired(rates: SuccessRates, retire_above: float | None) -> Bool[np.ndarray, " questions"]:
    """Tell which questions are solved: visited, with a rate of at least `retire_above`; with None none is."""
    if retire_above is None:
        return np.zeros(rates.rate.shape, bool)
    return (rates.visits > 0) & (rates.rate >= retire_above - RATE_ROUNDING)


def acceptance(
    rates: SuccessRates, retire_above: float | None, sample_by: SampleBy
) -> Float[np.ndarray, " questions"]:
    """Compute the probability that a question is asked where the stream comes to it; 0 of those retired.

    By `uniform` it is 1. By `difficulty` it is in proportion to 4 p (1 - p), p being the remembered rate, the
    variance of a reward of 0 or 1 and so the signal in a group; it is at least 0.1, and 1 of questions that
    have not been asked. The largest is scaled to 1.
    """
    weight = np.ones(rates.rate.shape)
    if sample_by == "difficulty":
        p = rates.rate.astype(float)
        weight = np.where(rates.visits > 0, np.maximum(4 * p * (1 - p), FLOOR), 1.0)
    weight = np.where(retired(rates, retire_above), 0.0, weight)
    return weight / max(float(weight.max()), FLOOR)


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """The endless stream of questions that passes over some: a function of seed, position and rates.

    Every position has a question: those of a source in a new order in each epoch, and each source at its
    share of the positions. Whether it is asked is drawn by `acceptance`.

    tasks, weights: of the sources, as of `sources.stream`. seed: of the run. retire_above, sample_by: as in
    the data section.
    """

    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    seed: int
    retire_above: float | None
    sample_by: SampleBy

    @functools.cached_property
    def begins(self) -> list[int]:
        """The number of the first question of each source, and of all questions."""
        return [0, *np.cumsum([len(task) for task in self.tasks]).tolist()]

    @property
    def questions(self) -> int:
        """How many training questions there are, of all sources together."""
        return self.begins[-1]

    def problem(self, question: int) -> Problem:
        """Look up a training question by its number among those of all sources."""
        source = int(np.searchsorted(self.begins, question, side="right")) - 1
        return self.tasks[source][question - self.begins[source]]

    def left(self, rates: SuccessRates) -> int:
        """Number of the questions that are not retired."""
        return self.questions - int(retired(rates, self.retire_above).sum())

    def positions(self, start: int, count: int, rates: SuccessRates) -> tuple[Int[np.ndarray, " count"], int]:
        """Find the next positions whose questions are asked; at least one question is not retired.

        Args:
          start: the first position to look at.
          count: how many are wanted.
          rates: by which questions are passed over.

        Returns:
          (positions, ascending, the position behind the last of them).
        """
        probability = acceptance(rates, self.retire_above, self.sample_by)
        chosen: list[Int[np.ndarray, " some"]] = []
        found, block = 0, start // POSITIONS_AT_ONCE
        while found < count:
            where = np.arange(POSITIONS_AT_ONCE) + block * POSITIONS_AT_ONCE
            # Drawn for whole blocks, so that it does not matter where a step begins.
            chance = np.random.default_rng((self.seed, CHANCE, block)).random(POSITIONS_AT_ONCE)
            asked = (where >= start) & (chance < probability[self.numbers(where)])
            chosen.append(where[asked][: count - found])
            found += len(chosen[-1])
            block += 1
        positions = np.concatenate(chosen)
        return positions, int(positions[-1]) + 1

    def numbers(self, position: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Find the numbers of the questions at positions."""
        source, occurrence = sources_at(position, shares_in_parts(self.weights))
        number = np.zeros(len(position), np.int64)
        for i, task in enumerate(self.tasks):
            mine = source == i
            epoch, place = np.divmod(occurrence[mine], len(task))
            row = np.zeros(len(epoch), np.int64)
            for e in np.unique(epoch).tolist():
                row[epoch == e] = epoch_order(self.seed, i, e, len(task))[place[epoch == e]]
            number[mine] = self.begins[i] + row
        return number

    def remembered(
        self, rates: SuccessRates, visits: Iterable[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]
    ) -> SuccessRates:
        """Add the visits of a step's rounds: (positions, shares of right answers) of each."""
        for position, success in visits:
            rates = visited(rates, self.numbers(position), success)
        return rates

    def metrics(self, rates: SuccessRates) -> dict[str, float]:
        """Compute metrics: questions that were asked, questions that are retired, and the mean rate."""
        seen = rates.visits > 0
        gone = int(retired(rates, self.retire_above).sum())
        numbers: dict[str, float] = {"questions/asked": int(seen.sum()), "questions/retired": gone}
        return numbers | ({"questions/rate": float(rates.rate[seen].mean())} if seen.any() else {})


@functools.lru_cache(maxsize=16)
def epoch_order(seed: int, source: int, epoch: int, questions: int) -> Int[np.ndarray, " questions"]:
    """Shuffle the questions of a source for one of its epochs."""
    return np.random.default_rng((seed, ORDER, source, epoch)).permutation(questions)


def shares_in_parts(weights: Sequence[float]) -> list[int]:
    """Round the shares of sources to whole parts, at least one each."""
    total = sum(weights)
    return [max(round(SHARE_PARTS * weight / total), 1) for weight in weights]


def sources_at(
    position: Int[np.ndarray, " n"], shares: Sequence[int]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Find the source at each position of the mixed stream, and how often it came before.

    The first source has its share of the positions, evenly spread; the second has its share of what the first
    leaves; and so on.
    """
    source, occurrence = np.full(position.shape, len(shares) - 1), position.copy()
    open_, before, rest = np.ones(position.shape, bool), position.copy(), sum(shares)
    for i, share in enumerate(shares[:-1]):
        others, others_next = (x * (rest - share) // rest for x in (before, before + 1))
        mine = open_ & (others == others_next)
        source[mine], occurrence[mine] = i, (before - others)[mine]
        open_, before, rest = open_ & ~mine, others, rest - share
    occurrence[open_] = before[open_]
    return source, occurrence
