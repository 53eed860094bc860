"""What a scorer says of an answer."""

from typing import Any, NamedTuple, Protocol

Facts = Any
"""What a scorer needs of a problem beside its answer; it is pickled for a worker process."""


class Verdict(NamedTuple):
    """The judgement of one answer.

    score: in [0, 1]; True and False are 1 and 0. extracted: the part of the response that was judged, or an
    empty text. parts: (name, number) of what a user's own scorer reports beside the score. reason: why the
    score is what it is, for people, or an empty text.
    """

    score: float
    extracted: str
    parts: tuple[tuple[str, float], ...] = ()
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer has the full score."""
        return self.score >= 1


WRONG = Verdict(False, "")


class ScorerError(RuntimeError):
    """A scorer failed, which is nobody's answer's fault; the message says which scorer and how."""


class Scorer(Protocol):
    """Judges one whole answer; the verdict on a text is the same at every call."""

    def __call__(self, response: str, answer: str, facts: Facts) -> Verdict:
        """Judge a response.

        Args:
          response: what the model wrote, without the question.
          answer: the problem's answer.
          facts: what else the problem has for its scorer.
        """


class GroupScorer(Protocol):
    """Judges all answers of a group at once, such as the rollouts of one state."""

    def __call__(self, responses: tuple[str, ...], answer: str, facts: Facts) -> tuple[Verdict, ...]:
        """Judge the responses of a group, in their order.

        Args:
          responses: what the model wrote, without the question, each to the same problem.
          answer: the problem's answer.
          facts: what else the problem has for its scorer.
        """
