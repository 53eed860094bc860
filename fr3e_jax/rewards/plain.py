"""Verdicts by comparing texts, numbers and letters, in time linear in the response."""

import re
from fractions import Fraction
from typing import Any

from fr3e_jax.rewards.extract import (
    answer_tag,
    choice_letter,
    has_box,
    last_box,
    last_line,
    last_number,
)
from fr3e_jax.rewards.verdict import Verdict
from fr3e_jax.rewards.writing import without_groups

MOST_DIGITS = 2500  # of a number as text: digits are converted in time that is not linear
MOST_EXPONENT = 1000
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
LATEX_FRACTION = re.compile(
    rf"(?:([0-9]+) *)?\\[dtc]?frac *(?:\{{ *(-?{DECIMAL}) *\}}|([0-9])) *(?:\{{ *({DECIMAL}) *\}}|([0-9]))"
)
SLASH = re.compile(rf"(?:([0-9]+) +)?({DECIMAL}) ?/ ?({DECIMAL})")
POWER = re.compile(
    rf"(?:({DECIMAL}) ?(?:\\times|\\cdot|[*x\u00d7\u00b7]) ?)?"
    r"10\^(?:\{ ?([+-]?[0-9]{1,4}) ?\}|([0-9]{1,4}))"
)
EXPONENT = re.compile(rf"({DECIMAL})[eE]([+-]?[0-9]{{1,4}})")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar) ?\{([0-9]+)\}")


def exact(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether the last box, else answer tag, else line that is not empty, is the answer as text.

    Spaces at the ends do not count, and any others count as one. Letters keep their case.
    """
    candidate = last_box(response) if has_box(response) else answer_tag(response)
    if candidate is None and not has_box(response) and "<answer>" not in response:
        candidate = last_line(response)
    candidate = " ".join((candidate or "").split())
    return Verdict(candidate != "" and candidate == " ".join(answer.split()), candidate)


def numeric(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether the last box, else the last number, has the value of the answer, exactly.

    A percent sign must be in both or in neither.
    """
    candidate = (last_box(response) if has_box(response) else last_number(response)) or ""
    value, wanted = number(candidate), number(answer)
    alike = is_percent(candidate) == is_percent(answer)
    return Verdict(alike and value is not None and value == wanted, candidate)


def choice(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether the letter that is chosen is the answer's, A to Z with or without brackets."""
    candidate = choice_letter(response) or ""
    return Verdict(candidate != "" and candidate == answer.strip().strip("().").upper(), candidate)


def is_percent(text: str) -> bool:
    """Whether a number ends in a percent sign."""
    return text.rstrip(" $").endswith("%")


def number(text: str) -> Fraction | None:
    r"""The exact value of a number as people and LaTeX write it, or None.

    Taken are signs, currency, thousands separators, decimals, 1/2, \frac{1}{2}, 3 1/2, 3\frac12,
    3 \times 10^5, 3e5 and 0.\overline{3}. A percent sign is left out.
    """
    if len(text) > MOST_DIGITS:
        return None
    text = text.strip().replace("\u2212", "-").replace("\\$", "").strip("$\u20ac\u00a3 ")
    text = text.removesuffix("%").removesuffix("\\").rstrip()
    text = without_groups(text)
    negative = text.startswith("-")
    value = unsigned(text[1:].lstrip(" $") if text[:1] in ("-", "+") else text)
    return -value if negative and value is not None else value


def unsigned(text: str) -> Fraction | None:
    """The value of a number without a sign."""
    if re.fullmatch(DECIMAL, text):
        return decimal(text)
    if match := LATEX_FRACTION.fullmatch(text):
        whole, top, digit, bottom, other = match.groups()
        return ratio(whole, top or digit, bottom or other)
    if match := SLASH.fullmatch(text):
        return ratio(*match.groups())
    if match := POWER.fullmatch(text):
        return scaled(match[1] or "1", match[2] or match[3])
    if match := EXPONENT.fullmatch(text):
        return scaled(*match.groups())
    if match := REPEATING.fullmatch(text):
        whole, once, again = match.groups()
        fraction = Fraction(int(again), 10 ** len(once) * (10 ** len(again) - 1))
        return decimal(f"{whole or 0}.{once}") + fraction
    return None


def decimal(text: str) -> Fraction:
    """The value of digits with or without a point."""
    whole, _, part = text.partition(".")
    return Fraction(int(whole + part), 10 ** len(part))


def ratio(whole: str | None, top: str, bottom: str) -> Fraction | None:
    """The value of a fraction, behind a whole number if there is one."""
    over, under = decimal(top.removeprefix("-")), decimal(bottom)
    if under == 0 or (whole and top.startswith("-")):
        return None
    return int(whole or 0) + (-over if top.startswith("-") else over) / under


def scaled(text: str, exponent: str) -> Fraction | None:
    """The value of a decimal times a power of ten."""
    return None if abs(int(exponent)) > MOST_EXPONENT else decimal(text) * Fraction(10) ** int(exponent)
