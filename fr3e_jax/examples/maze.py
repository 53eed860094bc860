"""A task with known decisions: the way through a maze of rooms with one-way doors.

    a|c:de,b-,a:bc,e.,d-=   begins in room a; doors lead from c to d and e; b and d are dead ends; e is the
                            goal
    a:b?-c:d?-e.            is the good answer: in each room it looks behind the first door that is listed

`?` looks behind a door: `-` is a dead end, so the other door is taken, and `+` is none. The habit is to go
through the first door without looking, `!`. In three rooms of four that leads into a dead end, where the walk
ends (`a:b!b-`). In the others both ways lead on, and the choice decides nothing.
"""

import random
import re
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

from fr3e_jax.examples.decisions import Choice, Worked, decision_offsets, draw_habits, draw_problems

DEAD_END_FIRST = 0.75  # probability that the first door of a room is the wrong one
WALK = re.compile(r"([a-z]:[a-z](\?[-+]|!))+[a-z]\.")


def problems(split: str, rooms: int = 3, habit: float = 0.5, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of a split.

    Args:
      split: `train` or `held_out`.
      rooms: on the way, without the goal, 1 to 12.
      habit: probability that a worked solution does not look.
      seed: of what is drawn.
    """

    def draw(numbers: random.Random) -> dict[str, Any]:
        names = numbers.sample(ascii_lowercase, 2 * rooms + 1)
        way, dead = names[: rooms + 1], names[rooms + 1 :]
        first = [numbers.random() < DEAD_END_FIRST for _ in dead]
        doors = [d + n if f else n + d for d, n, f in zip(dead, way[1:], first, strict=True)]
        map_ = [f"{room}:{two}" for room, two in zip(way, doors, strict=False)]
        map_ += [f"{room}-" for room in dead] + [f"{way[-1]}."]
        numbers.shuffle(map_)
        return {
            "question": f"{way[0]}|{','.join(map_)}=",
            "answer": "".join(way),
            "doors": doors,
            "choices": rooms,
            "habit": habit,
        }

    return draw_problems(draw, split, seed)


def score(response: str, answer: str) -> float:
    """1 for a walk through the rooms that lead to the goal, else 0."""
    return float(bool(WALK.fullmatch(response)) and "".join(re.findall("([a-z])[:.]", response)) == answer)


def written(row: dict[str, Any], habits: Sequence[bool]) -> Worked:
    """Walk from room to room; in each of them looking behind the first door is a choice."""
    text, way = "", row["answer"]
    choices: list[Choice] = []
    for k, (room, following, doors) in enumerate(zip(way, way[1:], row["doors"], strict=False)):
        text += f"{room}:{doors[0]}"
        dead_end = doors[0] != following
        choices.append(Choice(len(text), decides=dead_end))
        if k < len(habits) and habits[k]:
            text += "!"
            if dead_end:
                return Worked(f"{text}{doors[0]}-", tuple(choices))
        else:
            text += "?-" if dead_end else "?+"
    return Worked(f"{text}{way[-1]}.", tuple(choices))


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on, with the habit."""
    return written(row, draw_habits(row, random)).text


def decisions(row: dict[str, Any], response: str) -> list[int]:
    """Where a response decides its verdict, as `decision_offsets` says: at doors to dead ends."""
    return decision_offsets(written, row, response)
