"""Rewards: rollouts decoded to text and judged, a whole answer at a time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fr3e_jax.config import RewardConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import Text
from fr3e_jax.rewards import form
from fr3e_jax.rewards.pool import Asked, ScoringPool
from fr3e_jax.rewards.verdict import Verdict
from fr3e_jax.types import Problem, Rollouts, States

Rewards = Callable[[], np.ndarray]
"""Waits for the verdicts, and says what they come to."""


@dataclasses.dataclass(frozen=True)
class Verifier:
    """Verdicts on token ids, and rewards from them."""

    text: Text
    hosts: Hosts
    pool: ScoringPool
    config: RewardConfig = dataclasses.field(default_factory=RewardConfig)

    def begin(self, responses: Sequence[str], problems: Sequence[Problem]) -> Callable[[], list[Verdict]]:
        """Start to judge whole responses, as text; the result waits for the verdicts."""
        pairs = zip(responses, problems, strict=True)
        return self.pool.begin([Asked(p.scorer, text, p.answer, p.facts) for text, p in pairs]).result

    def rewards(
        self, answers: Sequence[np.ndarray], stopped: Sequence[bool], problems: Sequence[Problem]
    ) -> Rewards:
        """Start to find the rewards of whole answers.

        Args:
          answers: token ids.
          stopped: whether each came to an end.
          problems: which each is an answer to.

        Returns:
          A function that waits for them, float32 [len(answers)], in [0, 1].
        """
        config = self.config
        texts = self.text.answers(answers, stopped)
        counts = np.array(stopped, bool) | (config.cut == "judged")
        counted = np.flatnonzero(counts).tolist()
        responses = [texts[i] for i in counted]
        nothing: Callable[[], list[Verdict]] = list
        answered = formed = nothing
        if config.answer > 0:
            answered = self.begin(responses, [problems[i] for i in counted])
        if config.format > 0:
            asked = [Asked(form.NAME, response, config.pattern, None) for response in responses]
            formed = self.pool.begin(asked).result

        def result() -> np.ndarray:
            total = np.zeros(len(texts), np.float32)
            for weight, verdicts in ((config.answer, answered()), (config.format, formed())):
                if verdicts:
                    total[counted] += weight * np.array([verdict.right for verdict in verdicts], np.float32)
            return total / np.float32(config.answer + config.format)

        return result

    def base(self, rollouts: Rollouts, problems: Sequence[Problem]) -> Rewards:
        """Start to find the rewards of answers that were sampled from the query alone.

        Args:
          rollouts: on the host, [B, R, S] leaves.
          problems: B of them.

        Returns:
          A function that waits for them, float32 [B, R].
        """
        b, r = rollouts.length.shape
        here = np.flatnonzero(self.hosts.rows_here(b)).tolist()
        answers = [rollouts.token[i, j, : rollouts.length[i, j]] for i in here for j in range(r)]
        own = [problem for problem in (problems[i] for i in here) for _ in range(r)]
        wait = self.rewards(answers, rollouts.stopped[here].reshape(-1), own)

        def result() -> np.ndarray:
            reward = np.zeros((b, r), np.float32)
            reward[here] = wait().reshape(-1, r)
            return self.hosts.add_up(reward, "rewards of base trajectories")

        return result

    def whole(self, states: States, rollouts: Rollouts, problems: Sequence[Problem]) -> Rewards:
        """Start to find the rewards of the whole answers that partial rollouts complete, with their prefixes.

        Args:
          states: on the host.
          rollouts: on the host, [N, J x M, S] leaves, state-major.
          problems: of the round's queries.

        Returns:
          A function that waits for them, float32 [N, J, M], 0 where the state is invalid.
        """
        n, j = states.valid.shape
        m = rollouts.length.shape[1] // j
        mine = states.valid & self.hosts.rows_here(n)[:, None]
        where = [(a, b, c) for a, b in np.argwhere(mine).tolist() for c in range(m)]
        answers = [whole_answer(states, rollouts, *place) for place in where]
        stopped = rollouts.stopped.reshape(n, j, m)[mine].reshape(-1)
        own = {query: problems[query] for query in sorted({int(states.query[a]) for a, _, _ in where})}
        wait = self.rewards(answers, stopped, [own[int(states.query[a])] for a, _, _ in where])

        def result() -> np.ndarray:
            reward = np.zeros((n, j, m), np.float32)
            reward[mine] = wait().reshape(-1, m)
            return self.hosts.add_up(reward, "rewards of partial rollouts")

        return result

    def excerpt(
        self,
        accepted: np.ndarray,
        states: States,
        rollouts: Rollouts,
        reward: np.ndarray,
        problems: Sequence[Problem],
    ) -> dict[str, Any] | None:
        """For people to read: the deepest accepted state of the first trajectory that has one.

        Args:
          accepted: bool [N, J].
          states, rollouts, problems: as for `whole`.
          reward: float32 [N, J, M].

        Returns:
          Question, prefix, position with its entropy, one of the best and one of the worst
          continuations with their rewards; None where no state is accepted.
        """
        if not accepted.any():
            return None
        n = int(np.argmax(accepted.any(axis=1)))
        j = int(np.max(np.nonzero(accepted[n])))
        picks = [int(np.argmax(reward[n, j])), int(np.argmin(reward[n, j]))]
        size = int(states.prefix_length[n, j])
        pieces = [states.response[n, :size]]
        pieces += [whole_answer(states, rollouts, n, j, m)[size:] for m in picks]
        prefix, *continuations = self.text.decode(pieces)
        problem = problems[int(states.query[n])]
        return {
            "question": problem.question,
            "answer": problem.answer,
            "prefix": prefix,
            "position": size,
            # The first draw from a state is of the uncertain token itself.
            "entropy": round(float(rollouts.entropy[n, j * reward.shape[2], 0]), 4),
            "continuations": continuations,
            "rewards": [float(reward[n, j, m]) for m in picks],
            "value": float(reward[n, j].mean()),
        }


def whole_answer(states: States, rollouts: Rollouts, n: int, j: int, m: int) -> np.ndarray:
    """Token ids of rollout m of state j of trajectory n, its prefix included."""
    branch = j * (rollouts.length.shape[1] // states.valid.shape[1]) + m
    own = rollouts.token[n, branch, : rollouts.length[n, branch]]
    return np.concatenate([states.response[n, : states.prefix_length[n, j]], own])
