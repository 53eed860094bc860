"""How many of the places that decide an answer the positions are."""

import numpy as np
import pytest

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.step.decisions import decision_metrics
from fr3e_jax.types import Problem, Rollouts, States

WORDS = ["ab", "c", "def", "g", "h"]


def decode(rows):
    return [WORDS[token] for (token,) in rows]


def made(positions, decisions):
    """One trajectory of all five words, with these positions; the second query's has none that is kept."""
    k = len(positions)
    states = States(
        query=np.array([0, 1], np.int32),
        base=np.array([1, 0], np.int32),
        response=np.tile(np.arange(5, dtype=np.int32), (2, 1)),
        prefix_length=np.array([[0, *positions], [0] * (k + 1)], np.int32),
        valid=np.array([[True] * (k + 1), [False] * (k + 1)]),
    )
    zeros = np.zeros((2, 2, 5), np.float32)
    length = np.array([[1, 5], [5, 5]], np.int32)
    base = Rollouts(zeros.astype(np.int32), zeros, zeros, zeros, length, length > 0)
    problems = [Problem("?", "!", "exact", "mine.py", decisions=decisions)] * 2
    return decision_metrics(base, states, problems, decode)


def test_positions_are_held_against_the_tokens_that_decide():
    """Characters 0 and 4 are of the words 0 and 2: `ab c def g h`."""
    metrics = made([2, 3, 4], lambda response: [0, 4] if response == "abcdefgh" else [])
    assert metrics == pytest.approx(
        {"decisions/hit": 1 / 3, "decisions/chance": 2 / 5, "decisions/found": 1 / 2}
    )


def test_two_decisions_in_a_token_are_one():
    assert made([2], lambda _: [3, 4, 5])["decisions/found"] == 1


def test_a_share_of_nothing_is_left_out():
    assert made([2], lambda _: []).keys() == {"decisions/hit", "decisions/chance"}
    assert made([], lambda _: [0]).keys() == {"decisions/chance", "decisions/found"}
    assert made([2], None) == {}


def test_a_function_that_fails_is_named():
    with pytest.raises(RuleError, match=r"mine.py: decisions\(row, response\) failed: KeyError"):
        made([2], lambda _: {}["x"])
