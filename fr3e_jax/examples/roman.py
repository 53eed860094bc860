"""A task of one's own, from text to a model that learns: numbers in Roman numerals.

Four is IV and nine is IX, but old clocks and inscriptions write IIII and VIIII. The worked solutions do so
six times out of ten, so that a model that was warmed up on them knows both ways and prefers the old one. The
score then teaches it the other:

    python -m fr3e_jax.sft --config configs/roman_sft.yaml
    python -m fr3e_jax.train --config configs/roman.yaml
"""

import random
from typing import Any

OLD_WAY = 0.6  # probability of writing a four or a nine the old way
NUMERALS = {1: "I", 5: "V", 10: "X", 50: "L", 100: "C", 500: "D", 1000: "M"}


def digit(value: int, one: int, old: bool = False) -> str:
    """A decimal digit in Roman numerals.

    Args:
      value: 0 to 9.
      one: what a unit of it is: 1, 10, 100 or 1000.
      old: whether to write 4 and 9 without subtraction.
    """
    if value in (4, 9) and not old:
        return NUMERALS[one] + NUMERALS[one * (5 if value == 4 else 10)]
    fives = NUMERALS[5 * one] if value >= 5 else ""
    return fives + NUMERALS[one] * (value % 5)


def roman(number: int, old: tuple[bool, bool, bool] = (False, False, False)) -> str:
    """A number from 1 to 3999; `old` says of hundreds, tens and ones whether they are written the old way."""
    thousands, hundreds, tens, ones = (number // one % 10 for one in (1000, 100, 10, 1))
    lower = zip((hundreds, tens, ones), (100, 10, 1), old, strict=True)
    return digit(thousands, 1000) + "".join(digit(value, one, way) for value, one, way in lower)


def problems(split: str) -> list[dict[str, Any]]:
    """The problems of a split; one number in eight is held out."""
    numbers = list(range(1, 4000))
    random.Random(0).shuffle(numbers)
    chosen = numbers[:500] if split == "held_out" else numbers[500:]
    return [{"question": f"{n} in Roman numerals:", "answer": roman(n), "number": n} for n in chosen]


def score(response: str, answer: str, row: dict[str, Any]) -> float:
    """1 for the numeral; 0.3 for the right number written the old way in some place; else 0."""
    if response == answer:
        return 1.0
    ways = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
    return 0.3 if response in {roman(row["number"], way) for way in ways} else 0.0


def solution(row: dict[str, Any], random: random.Random) -> str:
    """A worked solution to warm up on; it writes each four and each nine the old way six times out of ten."""
    hundreds, tens, ones = (random.random() < OLD_WAY for _ in range(3))
    return roman(row["number"], (hundreds, tens, ones))
