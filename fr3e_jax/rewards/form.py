"""Verdicts on the form of a response, by a regular expression of the user's."""

import re
from typing import Any

from fr3e_jax.rewards.verdict import Verdict

NAME = "form"
"""Of the scorer. It is isolated: some patterns take time that grows with a power of the response's length."""


def score(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether a response matches a pattern, which is given in place of an answer."""
    return Verdict(re.search(answer, response) is not None, "")
