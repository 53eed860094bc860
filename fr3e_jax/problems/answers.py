"""Answers of a data set that no response is ever right for, found when it is read.

Every answer is put before its own scorer as a model would write it, and looked at for being an answer at
all: `['70']` as text is not what anybody answers, though it equals itself. Nothing here depends on a clock,
so that all hosts decide alike, and everything takes time linear in the text.
"""

import re

from fr3e_jax.config import ConfigError
from fr3e_jax.rewards import plain
from fr3e_jax.rewards.extract import CLAIM, has_box, last_box
from fr3e_jax.types import Problem

MOST_BAD = 0.1  # share of the answers that may be so before a source is refused
EXAMPLES = 3
MOST_WORDS = 30  # of an answer; more are a solution
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
LIST = re.compile(r"""[\[(]\s*(["']).*\1\s*(?:,\s*)?[\])]""", re.DOTALL)
NOTHING = frozenset(["nan", "null", "n/a", "<na>"])  # how programs write that there is none
LIST_TEXT = "it is a list written as text; make it a list of the file, or its elements"
PLACES = ("math", "numeric", "choice")
"""Scorers that look for the answer in a response; `exact` compares texts, whatever they are."""


def unanswerable(problem: Problem) -> str | None:
    """Say why no response to a problem of a data set can be right; None where one can."""
    answer, scorer = problem.answer, problem.scorer
    if scorer in PLACES and (why := dressed(answer)):
        return why
    if scorer == "math":
        return no_mathematics(answer)
    if scorer == "numeric":
        right = plain.numeric(boxed(answer), answer).right or plain.numeric(answer, answer).right
        return None if right else "it is no number, which `numeric` compares"
    if scorer == "choice":
        letter = answer.strip().strip("().").upper()  # as the scorer reads it
        right = plain.choice(boxed(letter), answer).right
        return None if right else "it is no letter of A to Z, which `choice` compares"
    if scorer == "exact":
        right = plain.exact(boxed(answer), answer).right or plain.exact(answer, answer).right
        tagged = "<answer>" in answer  # which only another tag or a box around it would let stand
        return None if right and not tagged else "a response that says it is judged by another part of it"
    return None


def boxed(answer: str) -> str:
    """An answer as models are asked to write it."""
    return rf"\boxed{{{answer}}}"


def dressed(answer: str) -> str | None:
    """Say what stands around an answer that no model would repeat, and what removes it; None without it."""
    if has_box(answer):
        return "it has a box in it; set answer_is to last_box"
    if "####" in answer:
        return "it has #### in it; set answer_is to after_hashes"
    if CLAIM.search(answer) or "<answer>" in answer:
        return "it has words around it; leave the answer alone in its column"
    if LIST.fullmatch(answer):
        return LIST_TEXT
    if len(answer) > 1 and QUOTED.fullmatch(answer):
        return "it is in quotation marks; take them away"
    if answer.casefold() in NOTHING:
        return "it says that there is none"
    return None


def no_mathematics(answer: str) -> str | None:
    """Say why the scorer `math` finds no response equal to an answer; None where it can."""
    if not answer.strip(" .,;:?!$_*#/\\'\"`~-"):
        return "it has neither a number nor a word"
    if len(WORD.findall(answer)) > MOST_WORDS:
        return "it is a solution; name the column of the answer, or set answer_is"
    # The scorer's first rule: what is boxed is the answer as text.
    if (last_box(boxed(answer)) or "").strip() != answer.strip():
        return "its braces are not closed"
    return None


def judged_answers(
    name: str, problems: list[Problem], drop: bool, remedy: str
) -> tuple[list[Problem], list[str]]:
    """Sort out the problems of a source whose answers can never be right.

    Args:
      name: of the source.
      problems: all that it has.
      drop: leave them out.
      remedy: what a person can do beside correcting them.

    Raises:
      ConfigError: they are more than MOST_BAD of all, and stay; or all are.
    """
    bad = {i: why for i, problem in enumerate(problems) if (why := unanswerable(problem))}
    if not bad:
        return problems, []
    examples = [f"{problems[i].answer[:40]!r} ({problems[i].place}: {bad[i]})" for i in list(bad)[:EXAMPLES]]
    counts = f"{len(bad):,} of {len(problems):,}"
    line = f"{name}: {counts} answers can never be right, such as {', '.join(examples)}"
    if len(bad) == len(problems):
        raise ConfigError(f"{line}; name another column, answer_is or scorer")
    if drop:
        return [p for i, p in enumerate(problems) if i not in bad], [f"{line}; they are left out"]
    if len(bad) > MOST_BAD * len(problems):
        raise ConfigError(f"{line}; correct them, or change the source's answer, answer_is or scorer{remedy}")
    return problems, [f"{line}; they stay in{remedy}"]
