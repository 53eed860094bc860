"""Advantages of rollouts, before they are modulated.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.rules import Chosen, Rule
from fr3e_jax.algorithm.values import rollout_counts, state_values
from fr3e_jax.types import AnyArray

AdvantageFunction = Callable[[Float32[Array, "N J M"], Bool[Array, "N J"]], Float32[Array, "N J M"]]
"""(Rewards, which states are valid) -> the advantage of each rollout, one for all of its tokens. A rollout
that does not count comes with its state's value as its reward, and its advantage is not read."""

AdvantageRule = Chosen[AdvantageFunction]
Baseline = Literal["mean", "leave_one_out"]

STD_EPSILON = 1e-6  # release


def group_advantage(
    reward: Float32[AnyArray, "N J M"], valid: Bool[AnyArray, "N J"]
) -> Float32[Array, "N J M"]:
    """Compute A(S_j, i) = r_ij - V(S_j); `valid` is not read. Paper (group advantage)."""
    alike = jnp.max(reward, axis=-1, keepdims=True) == jnp.min(reward, axis=-1, keepdims=True)
    # The mean of equal rewards is theirs only up to rounding, and the deviation would blow that up.
    return jnp.where(alike, 0.0, reward - state_values(reward)[..., None])


ADVANTAGES: dict[str, Rule[AdvantageFunction]] = {
    "group": Rule(group_advantage, "r - V(S_j), the reward less the state's mean (paper)"),
}


def divided_by_std(
    advantage: Float32[AnyArray, "N J M"],
    reward: Float32[AnyArray, "N J M"],
    counted: Bool[AnyArray, "N J M"] | None = None,
) -> Float32[Array, "N J M"]:
    """Divide advantages by the unbiased standard deviation of their state's rewards, plus 1e-6 (release).

    M is at least 2. With one rollout that counts the deviation is 0, as its advantage is.
    """
    if counted is None:
        return advantage / (jnp.std(reward, axis=-1, keepdims=True, ddof=1) + STD_EPSILON)
    deviation = jnp.where(counted, reward - state_values(reward, counted)[..., None], 0.0)
    others = jnp.maximum(rollout_counts(reward, counted) - 1.0, 1.0)
    std = jnp.sqrt(jnp.sum(deviation**2, axis=-1) / others)
    return advantage / (std[..., None] + STD_EPSILON)


def leave_one_out(
    advantage: Float32[AnyArray, "N J M"], count: Float32[AnyArray, "N J"]
) -> Float32[Array, "N J M"]:
    """Take each rollout out of its own baseline: r_i less the mean of the others. RLOO (arXiv 2402.14740).

    That is (r_i - V) n / (n - 1). The mean of all n holds r_i itself, which makes the expected gradient n - 1
    n-ths of what it should be; without it the estimate is unbiased.

    Args:
      advantage: r_i - V(S_j), 0 where a rollout does not count.
      count: n, the number of rollouts of each state that count; with one its advantage stays 0.
    """
    return advantage * (count / jnp.maximum(count - 1.0, 1.0))[..., None]
