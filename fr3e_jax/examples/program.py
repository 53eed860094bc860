"""A task with known decisions: the last value of a small program that calculates modulo ten.

    a3;a-4=b;b+2=c;b-7=d:   sets a to 3, b to a - 4, c to b + 2 and d to b - 7
    3-4b9;9+2c1;9-7d2;      is the good answer: each line with the values in it

The habit is to add where the line subtracts (`3+4b7;`), and to go on without another mistake. Only the last
value counts: a wrong line that it does not depend on decides nothing. Several mistakes may cancel, so some
answers are right by luck.
"""

import random
import re
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

from fr3e_jax.examples.decisions import Choice, Worked, decision_offsets, draw_habits, draw_problems

SUBTRACTING = 0.9  # probability that a line subtracts; the last one always does
FROM_PREVIOUS = 0.75  # probability that a line uses the variable before it; else any earlier one
NUMBERS = (1, 2, 3, 4, 6, 7, 8, 9)  # adding 5 or subtracting it is the same modulo ten


def problems(split: str, lines: int = 3, habit: float = 0.55, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of a split.

    Args:
      split: `train` or `held_out`.
      lines: of the program behind its first one, 1 to 25.
      habit: probability that a worked solution adds where it should subtract.
      seed: of what is drawn.
    """

    def draw(numbers: random.Random) -> dict[str, Any]:
        first, program = numbers.randrange(10), []
        for k in range(lines):
            used = k if numbers.random() < FROM_PREVIOUS else numbers.randrange(k + 1)
            sign = "-" if k == lines - 1 or numbers.random() < SUBTRACTING else "+"
            program.append((used, sign, numbers.choice(NUMBERS)))
        names = ascii_lowercase
        shown = [f"{names[j]}{sign}{n}={names[k]}" for k, (j, sign, n) in enumerate(program, 1)]
        row = {"first": first, "program": program, "choices": lines, "habit": habit}
        last = written(row, ()).text[-2]
        return {"question": f"a{first};{';'.join(shown)}:", "answer": last, **row}

    return draw_problems(draw, split, seed)


def score(response: str, answer: str, row: dict[str, Any]) -> float:
    """1 if the lines end with the right value of the last variable, else 0."""
    last = ascii_lowercase[len(row["program"])]
    lines = re.fullmatch(r"(\d[-+]\d[a-z]\d;)+", response)
    return float(bool(lines) and response.endswith(f"{last}{answer};"))


def written(row: dict[str, Any], habits: Sequence[bool]) -> Worked:
    """Calculate line by line; the sign of each line that subtracts is a choice."""
    program, names = row["program"], ascii_lowercase
    needed = {len(program)}
    for k in range(len(program), 0, -1):
        if k in needed:
            needed.add(program[k - 1][0])
    text, values = "", [row["first"]]
    choices: list[Choice] = []
    for k, (used, sign, number) in enumerate(program, 1):
        text += str(values[used])
        adds = sign == "+"
        if not adds:
            adds = len(choices) < len(habits) and habits[len(choices)]
            choices.append(Choice(len(text), decides=k in needed))
        values.append((values[used] + (number if adds else -number)) % 10)
        text += f"{'+' if adds else '-'}{number}{names[k]}{values[k]};"
    return Worked(text, tuple(choices))


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on, with the habit."""
    return written(row, draw_habits(row, random)).text


def decisions(row: dict[str, Any], response: str) -> list[int]:
    """Where a response decides its verdict, as `decision_offsets` says: before signs that count."""
    return decision_offsets(written, row, response)
