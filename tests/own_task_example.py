"""A task of one's own: sort the digits of a number. Run it with `--data.source own_task_example.py`."""

import random
import re


def problems(split: str, digits: int = 6, count: int = 1000) -> list[dict[str, str]]:
    """The problems of a split, the same at every call.

    `split` is "train" or "held_out"; the other arguments are the source's `parameters`.
    """
    # A number belongs to one split only, by its remainder.
    remainders = {"train": (1, 2, 3, 4), "held_out": (0,)}[split]
    draw = random.Random(split)
    numbers: dict[int, None] = {}  # each once, in the order that they were drawn
    while len(numbers) < count:
        number = draw.randrange(10 ** (digits - 1), 10**digits)
        if number % 5 in remainders:
            numbers[number] = None
    return [
        {
            "question": f"Sort the digits of {n} in ascending order. End with the result.",
            "answer": "".join(sorted(str(n))),
        }
        for n in numbers
    ]


def score(response: str, answer: str) -> bool:
    """Whether the last number in the response is the answer; runs in a worker process."""
    found = re.findall(r"\d+", response)
    return bool(found) and found[-1] == answer
