"""Values of states, the rollouts that they are taken from, and how they change along a trajectory.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
Everything is computed over all states of a trajectory, degenerate ones included, before any is
rejected: a value that comes from "the previous survivor" is a value of another state.

A mask `counted` [N, J, M] says which rollouts count: others were never drawn, or their rewards are not known.
A state with none that counts has no value; it is no valid state. Without a mask, None, all count.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32

from fr3e_jax.types import AnyArray

FirstState = Literal["neutral", "released"]

SHARPEN_EXPONENT = 1.5  # release


def counted_states(valid: Any, counted: Any) -> Any:
    """Find the states that are there and have a rollout that counts.

    Args:
      valid: bool [N, J], which states there are.
      counted: bool [N, J, M], which rollouts count, or None.
    """
    return valid if counted is None else valid & counted.any(axis=2)


def rollout_counts(
    reward: Float[AnyArray, "N J M"], counted: Bool[AnyArray, "N J M"] | None = None
) -> Float32[Array, "N J"]:
    """Count the rollouts of each state that count: M without a mask."""
    if counted is None:
        return jnp.full(reward.shape[:2], reward.shape[2], jnp.float32)
    return jnp.sum(counted, axis=-1).astype(jnp.float32)


def state_values(
    reward: Float[AnyArray, "N J M"], counted: Bool[AnyArray, "N J M"] | None = None
) -> Float32[Array, "N J"]:
    """Compute V(S_j), the mean of the rewards of S_j that count. Paper (state value).

    A state with none that counts gets 0.
    """
    if counted is None:
        return jnp.mean(reward.astype(jnp.float32), axis=-1)
    total = jnp.sum(jnp.where(counted, reward.astype(jnp.float32), 0.0), axis=-1)
    return total / jnp.maximum(rollout_counts(reward, counted), 1.0)


def filled_rewards(
    reward: Float32[AnyArray, "N J M"], counted: Bool[AnyArray, "N J M"] | None
) -> Float32[AnyArray, "N J M"]:
    """Put a state's value where a rollout does not count.

    The mean of all M is then that of the rollouts that count, and they differ if and only if those do. So a
    rule that looks at means, or at whether rewards differ, needs no mask.
    """
    if counted is None:
        return reward
    low = jnp.min(jnp.where(counted, reward, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(counted, reward, -jnp.inf), axis=-1)
    # The mean of equal rewards is theirs only up to rounding, and would differ from them.
    mean = jnp.clip(state_values(reward, counted), low, high)
    mean = jnp.where(jnp.any(counted, axis=-1), mean, 0.0)
    return jnp.where(counted, reward, mean[..., None])


def values_before(value: Float32[AnyArray, "N J"], valid: Bool[AnyArray, "N J"]) -> Float32[Array, "N J"]:
    """Replace the value of a state that is not valid by that of the last valid one before it.

    Where there is none before it, the first valid one's is taken.
    """
    index = jnp.arange(valid.shape[1])[None, :]
    last = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)
    last = jnp.where(last < 0, jnp.argmax(valid, axis=1)[:, None], last)
    return jnp.take_along_axis(value, last, axis=1)


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
