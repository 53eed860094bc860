"""A task with known decisions: the way through a maze, room by room, each with two doors.

    w-n+,s+e-:  in the first room west is a dead end and north leads on, in the second south and not east
    w?-n,s?+s,  is the good answer: looks behind the first door that is listed, then goes through one

The habit is to go through the first door without looking, `!`. In three rooms of four it is a dead end. Then
the walk turns back and goes on by the other door (`w!-n,`), but an answer is right only if it enters no dead
end. Where the first door leads on (`s!+s,`) the choice decides nothing.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from fr3e_jax.examples.decisions import Choice, Worked, decision_offsets, draw_habits, draw_problems

DEAD_END_FIRST = 0.75  # probability that the first door of a room is the wrong one
WALK = re.compile(r"([nesw](\?[-+]|!\+)[nesw],)+")


def problems(split: str, rooms: int = 3, habit: float = 0.55, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of a split.

    Args:
      split: `train` or `held_out`.
      rooms: on the way.
      habit: probability that a worked solution does not look.
      seed: of what is drawn.
    """

    def draw(numbers: random.Random) -> dict[str, Any]:
        pairs = [numbers.sample("nesw", 2) for _ in range(rooms)]
        dead_ends = [int(numbers.random() >= DEAD_END_FIRST) for _ in range(rooms)]
        asked, way = [], ""
        for doors, dead_end in zip(pairs, dead_ends, strict=True):
            asked.append("".join(door + "+-"[k == dead_end] for k, door in enumerate(doors)))
            way += doors[1 - dead_end]
        return {
            "question": f"{','.join(asked)}:",
            "answer": way,
            "first_doors": "".join(pair[0] for pair in pairs),
            "choices": rooms,
            "habit": habit,
        }

    return draw_problems(draw, split, seed)


def score(response: str, answer: str) -> float:
    """1 for a walk through all rooms that enters no dead end, else 0."""
    return float(bool(WALK.fullmatch(response)) and "".join(re.findall("(.),", response)) == answer)


def written(row: dict[str, Any], habits: Sequence[bool]) -> Worked:
    """Walk from room to room; in each of them looking behind the first door is a choice."""
    text = ""
    choices: list[Choice] = []
    for k, (door, leads_on) in enumerate(zip(row["first_doors"], row["answer"], strict=True)):
        text += door
        choices.append(Choice(len(text), decides=door != leads_on))
        looks = k >= len(habits) or not habits[k]
        text += f"{'?' if looks else '!'}{'+' if door == leads_on else '-'}{leads_on},"
    return Worked(text, tuple(choices))


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on, with the habit."""
    return written(row, draw_habits(row, random)).text


def decisions(row: dict[str, Any], response: str) -> list[int]:
    """Where a response decides its verdict, as `decision_offsets` says: at doors to dead ends."""
    return decision_offsets(written, row, response)
