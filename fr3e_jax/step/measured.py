"""A round whose rewards are known, and the numbers of it that take more than a line."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from fr3e_jax.algorithm.success import solved
from fr3e_jax.types import Rollouts, StateGroups, States


@dataclasses.dataclass(frozen=True)
class Measured:
    """A round whose rewards are known, on the host, the same on every process."""

    base: Rollouts
    """Answers sampled from the query alone, leaves [B, R, S]."""
    base_reward: Float32[np.ndarray, "B R"]
    states: States
    rollouts: Rollouts
    """Partial rollouts, leaves [N, J x M, S], state by state."""
    reward: Float32[np.ndarray, "N J M"]
    value: Float32[np.ndarray, "N J"]
    alpha: Float32[np.ndarray, "N J"]
    advantage: Float32[np.ndarray, "N J rows"]
    """Of the rollouts, and with the estimator `edge` of the segment in the last row."""
    accepted: Bool[np.ndarray, "N J"]
    """The states that are trained on."""
    restarts: bool
    """Whether there are positions; without, the base answers are the rollouts."""
    success_at: float = 1.0
    """Least reward of an answer that is right."""
    counted: Bool[np.ndarray, "N J M"] | None = None
    """Which rollouts count; None: all."""
    base_counted: Bool[np.ndarray, "B R"] | None = None
    """Which base trajectories count; None: all."""
    trained: Bool[np.ndarray, "N J rows"] | None = None
    """What of the accepted states is trained on; None: all."""
    gathered: StateGroups | None = None
    """The accepted states, where one asks for what is trained on."""

    @property
    def counts(self) -> Bool[np.ndarray, "N J M"]:
        """Tell which partial rollouts count for values, credit and metrics: all, where there is no mask."""
        return np.ones(self.reward.shape, bool) if self.counted is None else self.counted

    @property
    def segments(self) -> bool:
        """Whether segments of base trajectories are trained on."""
        return self.advantage.shape[2] > self.reward.shape[2]

    @property
    def accepted_advantages(self) -> Float32[np.ndarray, " rollouts"]:
        """The advantages of the rollouts that are trained on."""
        m = self.reward.shape[2]
        trained = self.counts if self.trained is None else self.trained[..., :m]
        return self.advantage[..., :m][self.accepted[:, :, None] & trained]

    @property
    def right(self) -> Bool[np.ndarray, "N J M"]:
        """Which rollouts have a right answer."""
        return solved(self.reward, self.success_at)

    @property
    def valid(self) -> Bool[np.ndarray, "N J"]:
        """Which states there are."""
        return self.states.valid


def root_mean(states: States, value: Float32[np.ndarray, "N J"]) -> float | None:
    """Mean of V(S_0) over queries, however many trajectories of each were kept; None where none was."""
    kept = states.valid[:, 0]
    if not kept.any():
        return None
    count, total = (np.bincount(states.query[kept], weights=w) for w in (None, value[kept, 0]))
    return float((total[count > 0] / count[count > 0]).mean())


def success_rates(m: Measured) -> Float32[np.ndarray, " B"]:
    """Share of right answers from the bare query: of the base trajectories and of the rollouts of S_0.

    Those that do not count are left out; nan where none is left.
    """
    right = solved(m.base_reward, m.success_at)
    counts = np.ones(right.shape, bool) if m.base_counted is None else m.base_counted
    total, count = (x.sum(axis=1, dtype=np.float32) for x in (right & counts, counts))
    if m.restarts:
        roots = m.counts[:, 0] & m.valid[:, :1]
        for sums, x in ((total, m.right[:, 0] & roots), (count, roots)):
            np.add.at(sums, m.states.query, x.sum(axis=1, dtype=np.float32))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def of_some(x: Shaped[np.ndarray, "..."], reduce: Callable[[np.ndarray], Any]) -> Any:
    """A statistic of what some states have; None where there are none."""
    return reduce(x) if x.size else None


def identical(m: Measured) -> int:
    """States whose rollouts are the same, token by token."""
    token = m.rollouts.token.reshape(*m.reward.shape, -1)
    first = np.argmax(m.counts, axis=2)[:, :, None, None]
    same = (token == np.take_along_axis(token, first, axis=2)).all(axis=3)
    return int((m.valid & (same | ~m.counts).all(axis=2)).sum())


def position_entropy(m: Measured) -> float | None:
    """Mean entropy at the positions, nats; 0 where no trajectory has one."""
    if not m.restarts:
        return None
    entropy = m.base.entropy[m.states.query, m.states.base]
    at = np.take_along_axis(entropy, m.states.prefix_length[:, 1:], axis=1)[m.valid[:, 1:]]
    return float(at.mean()) if at.size else 0.0


def segment_share(m: Measured) -> float | None:
    """Share of the trained tokens that lie in segments of base trajectories; None where segments are not."""
    if not m.segments or m.gathered is None or not m.gathered.length.size:
        return None
    return float(m.gathered.length[:, -1].sum() / m.gathered.length.sum())


def segment_size(m: Measured) -> float | None:
    """Mean absolute advantage of the segments that are trained on; None without any."""
    if not m.segments or m.trained is None or not m.trained[..., -1].any():
        return None
    return float(np.abs(m.advantage[..., -1][m.trained[..., -1]]).mean())


def continuations(m: Measured, x: Int[np.ndarray, "N C"] | Bool[np.ndarray, "N C"]) -> Any:
    """Mean of x over the partial rollouts that there are; None where there are none, or no positions."""
    return of_some(x[m.rollouts.length > 0], np.mean) if m.restarts else None


def entropy_elsewhere(m: Measured) -> Any:
    """Mean entropy at the tokens of kept trajectories that are no positions, nats; None without any."""
    kept = m.valid[:, 0]
    if not m.restarts or not kept.any():
        return None
    entropy = m.base.entropy[m.states.query, m.states.base][kept]
    length = m.base.length[m.states.query, m.states.base][kept]
    elsewhere = np.arange(entropy.shape[1]) < length[:, None]
    n, j = np.nonzero(m.valid[kept, 1:])
    elsewhere[n, m.states.prefix_length[kept][n, j + 1]] = False
    return of_some(entropy[elsewhere], np.mean)


def fork_disagreement(m: Measured) -> Any:
    """Share of the states at positions whose continuations are right and wrong; None where there are none."""
    if not m.restarts:
        return None
    some_right = (m.right & m.counts).any(axis=2)
    some_wrong = (~m.right & m.counts).any(axis=2)
    return of_some((some_right & some_wrong)[:, 1:][m.valid[:, 1:]], np.mean)


def position_distance(m: Measured) -> Any:
    """Mean distance between neighbouring positions of a trajectory, tokens; None where there are no two."""
    if not m.restarts:
        return None
    return of_some(np.diff(m.states.prefix_length[:, 1:], axis=1)[m.valid[:, 2:]], np.mean)


def accepted_depth(m: Measured) -> Any:
    """Mean share of the base trajectory that accepted states keep; None where there are none."""
    if not m.restarts:
        return None
    length = m.base.length[m.states.query, m.states.base]
    return of_some((m.states.prefix_length / np.maximum(length, 1)[:, None])[m.accepted], np.mean)
