"""Verdicts on the built-in additions."""

import re
from typing import Any

from fr3e_jax.rewards.verdict import Verdict

# Commas belong to a number only where they separate thousands.
WHOLE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


def carry_addition(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether what follows the last column is the sum."""
    result = response.rpartition(";")[2]
    return Verdict(result == f"={answer}", result.removeprefix("="))


def word_addition(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether the last number of a response equals the sum."""
    numbers = WHOLE_NUMBER.findall(response)
    # Compared as text: a response can hold a number of any length.
    last = numbers[-1].replace(",", "") if numbers else ""
    return Verdict(last == answer, last)
