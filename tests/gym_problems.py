"""Problems of reasoning-gym and what is right for them."""

import itertools
import time

import pytest

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym; pip install 'fr3e_jax[gym]'")

from fr3e_jax.problems.gym import GymTask
from fr3e_jax.rewards.gym import score

# One asks for three figures, the other for one of several numbers that are far from each other.
ROUNDED = ("power_function", "number_format")


def problems_of(name, count, seconds=0.5):
    """Some training problems; fewer of the few data sets that take long to make one."""
    task = GymTask(name, {}, 3)
    end = time.monotonic() + seconds
    return [task[i] for i in itertools.takewhile(lambda i: i == 0 or time.monotonic() < end, range(count))]


def near(answer):
    """Numbers that are not the answer, but nearly."""
    try:
        n = float(answer)
    except (TypeError, ValueError):
        return []
    whole = (
        [int(answer) + 1, int(answer) - 1, f"{answer} or {int(answer) + 1}"]
        if n == int(n) and "." not in str(answer)
        else []
    )
    return [*whole, *([f"-{answer}".replace("--", "")] if n else []), n + 0.1, f"{answer}1"]


def right(problem, response):
    return score(response, problem.answer, problem.facts).right
