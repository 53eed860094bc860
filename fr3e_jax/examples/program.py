"""A task with known decisions: the last value of a variable that a program changes, modulo ten.

    x:=4;x-=2;x:=1;x+=2;x-=4:   sets x to 4, subtracts 2, sets it to 1, adds 2, subtracts 4
    :4=4;-2=2;:1=1;+2=3;-4=9;   is the good answer: what each line does, and the value of x after it

The habit is to add where the line subtracts (`+2=6;`), and to go on without another mistake. A line that
sets x makes up for all mistakes before it, so what was chosen there decides nothing. Several mistakes may
cancel, so some answers are right by luck.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from fr3e_jax.examples.decisions import Choice, Worked, decision_offsets, draw_habits, draw_problems

KINDS = {"-": 0.8, "+": 0.1, ":": 0.1}  # probability that a line subtracts, adds, sets
NUMBERS = "1234"
LINES = re.compile(r"([-+:]\d=\d;)+")


def problems(split: str, lines: int = 3, habit: float = 0.55, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of a split.

    Args:
      split: `train` or `held_out`.
      lines: of the program behind its first one, which sets x. The last one subtracts.
      habit: probability that a worked solution adds where it should subtract.
      seed: of what is drawn.
    """

    def draw(numbers: random.Random) -> dict[str, Any]:
        kinds = numbers.choices(list(KINDS), list(KINDS.values()), k=lines - 1)
        program = [kind + numbers.choice(NUMBERS) for kind in (":", *kinds, "-")]
        row = {"program": program, "choices": lines, "habit": habit}
        asked = ";".join(f"x{line[0]}={line[1]}" for line in program)
        return {"question": f"{asked}:", "answer": written(row, ()).text[-2], **row}

    return draw_problems(draw, split, seed)


def score(response: str, answer: str, row: dict[str, Any]) -> float:
    """1 if there is a line for each of the program, and the last value is right, else 0."""
    complete = LINES.fullmatch(response) and response.count(";") == len(row["program"])
    return float(bool(complete) and response.endswith(f"={answer};"))


def written(row: dict[str, Any], habits: Sequence[bool]) -> Worked:
    """Calculate line by line; the sign of each line that subtracts is a choice."""
    program = row["program"]
    last_set = max(k for k, line in enumerate(program) if line[0] == ":")
    text, value = "", 0
    choices: list[Choice] = []
    for k, (kind, number) in enumerate(program):
        adds = kind == "+"
        if kind == "-":
            adds = len(choices) < len(habits) and habits[len(choices)]
            choices.append(Choice(len(text), decides=k > last_set))
        sign = "+" if adds else kind
        value = (int(number) * (-1 if sign == "-" else 1) + (0 if kind == ":" else value)) % 10
        text += f"{sign}{number}={value};"
    return Worked(text, tuple(choices))


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on, with the habit."""
    return written(row, draw_habits(row, random)).text


def decisions(row: dict[str, Any], response: str) -> list[int]:
    """Where a response decides its verdict, as `decision_offsets` says: before signs that count."""
    return decision_offsets(written, row, response)
