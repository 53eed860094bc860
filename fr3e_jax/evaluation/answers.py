"""Answers of a model to problems, with verdicts: of benchmarks, and of a run's held-out problems."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax import Array

from fr3e_jax.algorithm.success import solved
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather, is_first
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.rewards.verdict import WRONG, ScorerError, Verdict
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.types import Problem, Rollouts

MOST_SAMPLES = 2**12  # of a problem
MOST_PROBLEMS = 2**31 // MOST_SAMPLES  # an answer has a number, of 31 bits


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request for one answer: sample number `sample` to problem number `number` of a benchmark."""

    problem: Problem
    number: int
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer with its verdict.

    right: whether it is right; False where it was cut off by the length limit. extracted: the part that was
    judged. truncated: whether it was cut off. length: tokens. response: the text.
    """

    right: bool
    extracted: str
    truncated: bool
    length: int
    response: str


@dataclasses.dataclass(frozen=True)
class Respondent:
    """A model that answers problems, `rows` of them at a time.

    where: name of what is asked, for messages.
    """

    engine: Engine
    stream: QueryStream
    verifier: Verifier
    rows: int
    where: str = "evaluation"

    def answers(
        self, params: Params, asks: Sequence[Ask], key: Array, sampling: Sampling
    ) -> Iterator[list[Answer]]:
        """Answer requests in batches; while a batch is judged, the next one is sampled.

        The random numbers of an answer are a function of (key, number, sample), whatever it is asked with. In
        float32 so is the answer. In bfloat16 sums are rounded in the order of the program that is compiled
        for the number of rows and the mesh, and a token that is nearly tied with another may fall otherwise.

        Args:
          params: in the layout for sampling.
          asks: requests, in order.
          key: random key of the seed.
          sampling: the distribution that answers are drawn from.

        Yields:
          The answers to the next `rows` of `asks`, the last time to what is left.

        Raises:
          NotFiniteError: tokens were drawn from logits that are not finite.
        """
        before = None
        for start in range(0, len(asks), self.rows):
            batch = asks[start : start + self.rows]
            padded = [*batch, *[batch[0]] * (self.rows - len(batch))]
            queries = self.stream.encode([ask.problem for ask in padded])
            index = np.array([ask.number * MOST_SAMPLES + ask.sample for ask in padded], np.int32)
            placed = self.engine.placement.place_rows(dataclasses.replace(queries, index=index))
            rollouts, _ = self.engine.sample(params, placed, key, 0, 1, sampling)
            rollouts = gather(rollouts)
            require_finite(rollouts, self.where)
            after = self.judge(rollouts, batch)
            if before is not None:
                yield before()
            before = after
        if before is not None:
            yield before()

    def judge(self, rollouts: Rollouts, asks: Sequence[Ask]) -> Callable[[], list[Answer]]:
        """Start to judge the first rows of a batch.

        The first process decodes and judges the texts, and alone has them; all processes learn the verdicts.

        Returns:
          A function that waits for the verdicts.
        """
        count, first = len(asks), is_first()
        lengths = self.stream.text.trimmed(rollouts).length[:count, 0].tolist()
        stopped = rollouts.stopped[:count, 0].tolist()
        texts = [""] * count
        verdicts: Callable[[], list[Verdict]] = lambda: [WRONG] * count  # noqa: E731
        if first:
            rows = [rollouts.token[i, 0, : rollouts.length[i, 0]] for i in range(count)]
            texts = self.verifier.text.answers(rows, stopped)
            verdicts = self.verifier.begin(texts, [ask.problem for ask in asks])

        def result() -> list[Answer]:
            hosts, of = self.verifier.hosts, "verdicts of an evaluation"
            judged, success_at = hosts.all_or_none(verdicts, ScorerError, of), self.verifier.config.success_at
            right = np.array([solved(verdict.score, success_at) for verdict in judged], np.int32)
            right = hosts.add_up(right, of)
            each = zip(right.tolist(), judged, stopped, lengths, texts, strict=True)
            return [Answer(bool(r) and end, v.extracted, not end, n, text) for r, v, end, n, text in each]

        return result
