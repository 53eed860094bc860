"""When an answer counts as correct."""

from typing import Any

REWARD_ROUNDING = 1e-6  # by which a weighted mean of parts may miss the number that it should be


def solved(reward: Any, success_at: float) -> Any:
    """Tell whether an answer of this reward counts as correct: whether the reward is at least `success_at`.

    Args:
      reward: a number, or an array of any shape.
      success_at: reward.success_at, in (0, 1].

    Returns:
      bool, of the shape of `reward`.
    """
    return reward >= success_at - REWARD_ROUNDING
