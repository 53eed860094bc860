"""Queries whose base trajectories are judged, and which answers of theirs count."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from fr3e_jax.config import Config
from fr3e_jax.types import Queries, Rollouts


@dataclasses.dataclass(frozen=True)
class Judged:
    """Queries whose base trajectories are judged.

    queries, problems, base, reward: on the host. counted: which trajectories count, and may be explored;
    None: all. placed, sampled: queries and base trajectories as they lie on the devices.
    """

    queries: Queries
    problems: Any
    base: Rollouts
    reward: Float32[np.ndarray, "B R"]
    counted: Bool[np.ndarray, "B R"] | None
    placed: Queries
    sampled: Rollouts


def root_value(config: Config, judged: Judged) -> Float32[np.ndarray, " B"] | None:
    """V(root) of each query: the mean reward of its base trajectories that count. None if not adaptive."""
    if not config.explore.adaptive:
        return None
    reward, counted = judged.reward, judged.counted
    if counted is None:
        return reward.mean(axis=1)
    total = np.where(counted, reward, 0).sum(axis=1)
    return np.asarray(total / np.maximum(counted.sum(axis=1), 1), np.float32)


def uncut(config: Config, rollouts: Rollouts) -> Bool[np.ndarray, "N C"] | None:
    """Mask of the answers that the length limit did not cut off, where reward.cut is `masked`; None: all."""
    return rollouts.stopped if config.reward.cut == "masked" else None
