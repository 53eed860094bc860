"""Verdicts on problems of reasoning-gym, by its verifiers: those that neither run what the model wrote nor
take a wrong answer for a right one.
"""

import contextlib
import copy
import functools
import io
import json
import warnings
from typing import Any

import reasoning_gym  # takes a second, and here a worker's time limits do not run yet

from fr3e_jax.rewards.countdown import makes
from fr3e_jax.rewards.extract import answer_tag, has_box, last_box, last_line
from fr3e_jax.rewards.gym_facts import REFUSED, GymFacts
from fr3e_jax.rewards.verdict import Verdict


@functools.lru_cache(maxsize=64)
def verifier(name: str, parameters: str) -> Any:
    """Make a data set of one problem: only its verifier is wanted."""
    return reasoning_gym.create_dataset(name, **json.loads(parameters), size=1, seed=0)


def judged_of_gym(response: str) -> str:
    """The part of a response that is its answer: its last <answer>, else its last box, else its last line.

    Nothing, where the last tag or box is not closed.
    """
    if "<answer>" in response:
        return answer_tag(response) or ""
    return last_box(response) or "" if has_box(response) else last_line(response)


def score(response: str, answer: str, facts: GymFacts) -> Verdict:
    """Judge whether the verifier gives full marks; a verifier that fails over a text gives none.

    Raises:
      ValueError: the data set is refused.
    """
    name, parameters, entry = facts
    if name in REFUSED:
        raise ValueError(f"gym:{name} cannot be judged: {REFUSED[name]}")
    text = judged_of_gym(response)
    if name == "countdown":
        return Verdict(makes(text, entry["metadata"]["numbers"], entry["metadata"]["target"]), text)
    if name == "puzzle24":
        operators = json.loads(parameters).get("operators", "+-*/")
        return Verdict(makes(text, entry["metadata"]["numbers"], 24, operators), text)
    verify = verifier(name, parameters).score_answer
    try:
        # Some verifiers print or warn, and some write into the entry, which other answers share.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            right = verify(answer=text, entry=copy.deepcopy(entry)) == 1.0
    except Exception:
        right = False
    return Verdict(bool(right), text)
