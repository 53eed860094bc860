"""Questions and answers with characters that the model's tokenizer cannot say.

Such a question is another one to the model, and such an answer can never be given. Tokenizers that spell
bytes, as Qwen's do, can say everything. Those with a token for each of a few characters cannot.
"""

from collections.abc import Sequence
from typing import Literal

from fr3e_jax.config import ConfigError
from fr3e_jax.pretrained.text import Text
from fr3e_jax.types import Problem

SHOWN_PROBLEMS = 3
Others = Literal["refuse", "drop", "keep"]
LETTERS = ("math", "numeric")
"""Scorers that take an answer in several ways of writing: only its letters and digits must be sayable."""
WRITTEN = ("exact", "choice", *LETTERS)
"""Scorers whose answers a response has to hold. Others make what they like of the answer of a row."""


def lost_characters(problems: Sequence[Problem], text: Text) -> dict[int, str]:
    """Find the characters of each problem that the tokenizer cannot say, by the problem's index.

    The turns of a chat before the question count as the question; control tokens in it do not count.
    """
    control = text.control
    questions = ["".join([*(turn for _, turn in p.before), p.question]) for p in problems]
    lost = text.lost(control.sub("", question) if control else question for question in questions)
    for i, characters in text.lost(map(needed_of, problems)).items():
        lost[i] = "".join(dict.fromkeys(lost.get(i, "") + characters))
    return lost


def needed_of(problem: Problem) -> str:
    """The text of an answer without which no response can be right; empty where a scorer asks for none."""
    if problem.scorer not in WRITTEN:
        return ""
    letters = problem.scorer in LETTERS
    return "".join(c for c in problem.answer if c.isalnum()) if letters else problem.answer


def sayable(
    problems: Sequence[Problem], text: Text, whose: str, others: Others = "refuse", remedy: str = ""
) -> tuple[list[Problem], list[str]]:
    """The problems that the model's tokenizer can say.

    Args:
      problems: of one source.
      text: the tokenizer.
      whose: name of the source, for messages.
      others: what becomes of the others.
      remedy: what a person can do beside changing the model.

    Returns:
      (the problems, lines for people on the others).

    Raises:
      ConfigError: there are others and they are refused, or there are only others.
    """
    lost = lost_characters(problems, text)
    kept = [problem for i, problem in enumerate(problems) if i not in lost]
    if not lost:
        return kept, []
    characters = "".join(sorted(set("".join(lost.values()))))
    shown = characters if len(characters) <= 40 else characters[:40] + "..."
    examples = ", ".join(
        f"{problems[i].place or whose}: {lost[i][:20]!r} in {problems[i].question[:40]!r}"
        for i in list(lost)[:SHOWN_PROBLEMS]
    )
    line = (
        f"{whose}: the model's tokenizer cannot say {shown!r}, which {len(lost):,} of {len(problems):,} "
        f"problems have in question or answer ({examples})"
    )
    if kept and others != "refuse":
        return (kept, [f"{line}; they are left out"]) if others == "drop" else (list(problems), [line])
    raise ConfigError(
        f"{line}; use a model whose tokenizer can{remedy if kept else ''}, or make a small one for these "
        "problems with python -m fr3e_jax.sft"
    )


def require_template(problem: Problem, text: Text) -> None:
    """Refuse a template with characters that the model's tokenizer cannot say.

    Args:
      problem: any of the run's.
      text: the tokenizer and the template.

    Raises:
      ConfigError: it has such characters.
    """
    shown = text.rendered(problem.question, problem.before)
    lost = text.lost([text.control.sub("", shown) if text.control else shown]).get(0, "")
    asked = "".join([*(turn for _, turn in problem.before), problem.question])
    if around := "".join(character for character in lost if character not in asked):
        raise ConfigError(
            f"data.template {text.template!r}: the model's tokenizer cannot say {around!r}, which it puts "
            "around a question; use --data.template plain, or a text of your own with {question} in it"
        )


def unwritable(problems: Sequence[Problem], text: Text, whose: str) -> list[str]:
    """A line for people on answers of a user's own task that the tokenizer cannot say, if there are any.

    They are not refused: what `score` makes of the answer is its own affair.
    """
    lost = text.lost(problem.answer for problem in problems)
    if not lost:
        return []
    i = min(lost)
    return [
        f"{whose}: {len(lost):,} of {len(problems):,} answers have characters that the model's tokenizer "
        f"cannot say, such as {lost[i][:20]!r} in {problems[i].answer[:40]!r}; no response can have them"
    ]
