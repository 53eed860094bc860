"""What a scorer says of an answer."""

from typing import Any, NamedTuple, Protocol


class Verdict(NamedTuple):
    """right: whether the answer is. extracted: the part of the response that was judged, or nothing."""

    right: bool
    extracted: str


WRONG = Verdict(False, "")


class ScorerError(RuntimeError):
    """A scorer failed, which is nobody's answer's fault; the message says which and how."""


class Scorer(Protocol):
    """Judges whole answers, the same at every call."""

    def __call__(self, response: str, answer: str, facts: Any) -> Verdict:
        """The verdict on a response.

        Args:
          response: what the model wrote, without the question.
          answer: the problem's answer.
          facts: what else the problem has for its scorer.
        """
