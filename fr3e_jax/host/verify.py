"""Rewards: rollouts decoded to text and verified, a whole answer at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fr3e_jax.host.tasks import Problem, Task
from fr3e_jax.host.text import Text
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.types import Rollouts, States


@dataclasses.dataclass(frozen=True)
class Verifier:
    """A task's verdict on token ids."""

    task: Task
    text: Text
    hosts: Hosts

    def score(self, answers: Sequence[np.ndarray], problems: Sequence[Problem]) -> np.ndarray:
        """Rewards of whole answers, float32 [len(answers)]."""
        texts = self.text.decode(answers)
        pairs = zip(texts, problems, strict=True)
        return np.array([self.task.reward(text, problem.answer) for text, problem in pairs], np.float32)

    def base(self, rollouts: Rollouts, problems: Sequence[Problem]) -> np.ndarray:
        """Rewards of answers that were sampled from the query alone.

        Args:
          rollouts: on the host, [B, R, S] leaves.
          problems: B of them.

        Returns:
          float32 [B, R].
        """
        b, r = rollouts.length.shape
        reward = np.zeros((b, r), np.float32)
        here = np.flatnonzero(self.hosts.rows_here(b)).tolist()
        answers = [rollouts.token[i, j, : rollouts.length[i, j]] for i in here for j in range(r)]
        own = [problem for problem in (problems[i] for i in here) for _ in range(r)]
        reward[here] = self.score(answers, own).reshape(-1, r)
        return self.hosts.add_up(reward, "rewards of base trajectories")

    def whole(self, states: States, rollouts: Rollouts, problems: Sequence[Problem]) -> np.ndarray:
        """Rewards of the whole answers that partial rollouts complete, prefix and continuation together.

        Args:
          states: on the host.
          rollouts: on the host, [N, J x M, S] leaves, state-major.
          problems: of the round's queries.

        Returns:
          float32 [N, J, M], 0 where the state is invalid.
        """
        n, j = states.valid.shape
        m = rollouts.length.shape[1] // j
        reward = np.zeros((n, j, m), np.float32)
        mine = states.valid & self.hosts.rows_here(n)[:, None]
        where = [(a, b, c) for a, b in np.argwhere(mine).tolist() for c in range(m)]
        answers = [whole_answer(states, rollouts, *place) for place in where]
        own = {query: problems[query] for query in sorted({int(states.query[a]) for a, _, _ in where})}
        scores = self.score(answers, [own[int(states.query[a])] for a, _, _ in where])
        reward[mine] = scores.reshape(-1, m)
        return self.hosts.add_up(reward, "rewards of partial rollouts")

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
