"""Advantages of rollouts, before they are modulated.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
"""

from collections.abc import Callable

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
