"""Values of states, and how they change along a trajectory.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
Everything is computed over all states of a trajectory, degenerate ones included, before any is
rejected: a value that comes from "the previous survivor" is a value of another state.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32

from fr3e_jax.types import AnyArray

FirstState = Literal["neutral", "released"]

SHARPEN_EXPONENT = 1.5  # release


def state_values(reward: Float[AnyArray, "N J M"]) -> Float32[Array, "N J"]:
    """Compute V(S_j), the mean of the M rewards of S_j. Paper (state value)."""
    return jnp.mean(reward.astype(jnp.float32), axis=-1)


def value_change(
    value: Float32[AnyArray, "N J"],
    valid: Bool[AnyArray, "N J"],
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> Float32[Array, "N J"]:
    """Compute delta_j = V(S_j) - V(S_{j-1}), where j-1 is the previous state of the same trajectory.

    Args:
      value: V(S_j).
      valid: invalid states come last and get 0.
      first_state: `neutral` sets delta_0 = 0; `released` sets delta_0 = 1 - V(S_0).
      sharpen: replace delta_j by sign(delta_j) |delta_j|^1.5 / sum_k |delta_k|^1.5, the sum over the
        trajectory's states (release).
    """
    first = 1.0 - value[:, :1] if first_state == "released" else jnp.zeros_like(value[:, :1])
    delta = jnp.concatenate([first, value[:, 1:] - value[:, :-1]], axis=1)
    delta = jnp.where(valid, delta, 0.0)
    if sharpen:
        magnitude = jnp.abs(delta) ** SHARPEN_EXPONENT
        total = jnp.sum(magnitude, axis=1, keepdims=True)
        delta = jnp.sign(delta) * magnitude / jnp.where(total > 0, total, 1.0)
    return delta
