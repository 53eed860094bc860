"""What the tasks with known decisions share: their problems, their habits, and where a response decides.

The worked solutions of such a task are good but for a bad habit, and whoever writes one has to choose the
good way or the habit at known places. A place is a decision if the choice made there can decide the verdict
on the whole answer. A task has a function that writes a solution:

    written(row, habits) -> Worked

`habits[k]` says whether the k-th choice of the text follows the habit. Choices beyond the end of `habits`
are good.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

TRAINING, HELD_OUT = 20_000, 500  # different questions of each split, at most
HELD_OUT_SHARE = 8  # one question in so many is held out
DRAWS = 20  # for each question that is wanted, before a small task ends with fewer

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A place where a solution follows the good way or the habit."""

    offset: int
    """The first character, counted from the beginning of the solution, that says which."""
    decides: bool
    """Whether the verdict can depend on it."""


@dataclasses.dataclass(frozen=True)
class Worked:
    """A worked solution, and its choices from left to right."""

    text: str
    choices: tuple[Choice, ...]


Writer = Callable[[Row, Sequence[bool]], Worked]


def draw_problems(draw: Callable[[random.Random], Row], split: str, seed: int) -> list[Row]:
    """The problems of a split, each question once.

    A hash of its question says whether a problem is held out, so that the splits are disjoint for all seeds.

    Args:
      draw: makes a problem with the random numbers that it is given.
      split: `train` or `held_out`.
      seed: of the random numbers. Those of the two splits differ.
    """
    held_out = split == "held_out"
    wanted = HELD_OUT if held_out else TRAINING
    numbers = random.Random(f"{split} {seed}")
    rows: dict[str, Row] = {}
    for _ in range(DRAWS * wanted):
        if len(rows) == wanted:
            break
        row = draw(numbers)
        if (zlib.crc32(row["question"].encode()) % HELD_OUT_SHARE == 0) == held_out:
            rows.setdefault(row["question"], row)
    return list(rows.values())


def draw_habits(row: Row, random: random.Random) -> list[bool]:
    """Follow the habit at each choice with the probability `row["habit"]`, independently."""
    return [random.random() < row["habit"] for _ in range(row["choices"])]


def decision_offsets(written: Writer, row: Row, response: str) -> list[int]:
    """Find the places of a response where it decides its verdict.

    A response is followed as long as it goes the good way or the habit's at each choice. What is behind its
    first other mistake has no decisions.

    Args:
      written: the task's function that writes a solution.
      row: the problem.
      response: any text.

    Returns:
      Offsets of characters, ascending: `response[:offset]` leads to the decision and `response[offset]` makes
      it. With one token per character they are the positions of tokens in the response.
    """
    habits: list[bool] = []
    offsets = []
    while True:
        good = written(row, habits)
        if len(habits) == len(good.choices):
            return offsets
        choice = good.choices[len(habits)]
        if len(response) <= choice.offset or not response.startswith(good.text[: choice.offset]):
            return offsets
        if choice.decides:
            offsets.append(choice.offset)
        habits.append(response[choice.offset] != good.text[choice.offset])
