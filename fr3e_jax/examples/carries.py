"""A task with known decisions: additions in columns, nearly all of which carry.

    7+5,4+8:    is 47 + 85, in columns, the ones first
    =12,+13,    is the good answer: the total of each column, and `+` where 1 is carried into it

The habit is to forget a carry (`=12,=12,`) and to go on without another mistake. No column has digits that
sum to nine, so whether a column carries does not depend on what is carried into it: the decisions are
independent, an answer is right only if all of them are, and nothing before its end shows that one was wrong.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from fr3e_jax.examples.decisions import Choice, Worked, decision_offsets, draw_habits, draw_problems

CARRYING = 0.9  # probability that a column carries; the last one always does
CARRIED = [(x, y) for x in range(10) for y in range(10) if x + y > 9]
NOT_CARRIED = [(x, y) for x in range(1, 5) for y in range(1, 5)]  # few, since they are rare
COLUMN = re.compile(r"[=+](\d)(\d),")


def problems(split: str, digits: int = 3, habit: float = 0.55, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of a split.

    Args:
      split: `train` or `held_out`.
      digits: of each operand.
      habit: probability that a worked solution forgets a carry.
      seed: of what is drawn.
    """

    def draw(numbers: random.Random) -> dict[str, Any]:
        columns = []
        for i in range(digits):
            carries = i == digits - 1 or numbers.random() < CARRYING
            columns.append(numbers.choice(CARRIED if carries else NOT_CARRIED))
        a, b = (int("".join(str(column[k]) for column in reversed(columns))) for k in (0, 1))
        asked = ",".join(f"{x}+{y}" for x, y in columns)
        return {
            "question": f"{asked}:",
            "answer": str(a + b),
            "columns": columns,
            "choices": digits,
            "habit": habit,
        }

    return draw_problems(draw, split, seed)


def score(response: str, answer: str) -> float:
    """1 if the totals of the columns make the sum, else 0."""
    if not re.fullmatch(f"({COLUMN.pattern})+", response):
        return 0.0
    totals = COLUMN.findall(response)
    return float(totals[-1][0] + "".join(ones for _, ones in reversed(totals)) == answer)


def written(row: dict[str, Any], habits: Sequence[bool]) -> Worked:
    """Write the columns from the ones upwards; each carry into a column is a choice."""
    text, carried = "", 0
    choices: list[Choice] = []
    for x, y in row["columns"]:
        if carried:
            forgotten = len(choices) < len(habits) and habits[len(choices)]
            choices.append(Choice(len(text), decides=True))
            carried = 0 if forgotten else 1
        text += f"{'+' if carried else '='}{x + y + carried:02},"
        carried = (x + y + carried) // 10
    return Worked(text, tuple(choices))


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on, with the habit."""
    return written(row, draw_habits(row, random)).text


def decisions(row: dict[str, Any], response: str) -> list[int]:
    """Where a response decides its verdict, as `decision_offsets` says: before each carry."""
    return decision_offsets(written, row, response)
