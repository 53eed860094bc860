"""What the restarts show: state values, group advantage, modulation, rejection.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
Everything is computed over all states of a trajectory, degenerate ones included, before any is
rejected: a value that comes from "the previous survivor" is a value of another state.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

Modulation = Literal["paper", "none"]
FirstState = Literal["neutral", "released"]
RejectRule = Literal["state", "query", "none"]

SHARPEN_EXPONENT = 1.5  # release
STD_EPSILON = 1e-6  # release


def state_values(reward: Array) -> Array:
    """V(S_j) = mean of the M rewards of S_j. Paper (state value).

    Args:
      reward: float32 [N, J, M].

    Returns:
      float32 [N, J].
    """
    return jnp.mean(reward.astype(jnp.float32), axis=-1)


def group_advantage(reward: Array, normalize_std: bool = False) -> Array:
    """A(S_j, i) = r_ij - V(S_j), divided by the group's unbiased standard deviation if asked (release).

    Args:
      reward: float32 [N, J, M].
      normalize_std: divide by (std + 1e-6); needs M of at least 2.

    Returns:
      float32 [N, J, M].
    """
    alike = jnp.max(reward, axis=-1, keepdims=True) == jnp.min(reward, axis=-1, keepdims=True)
    # The mean of equal rewards is theirs only up to rounding, and the deviation would blow that up.
    centred = jnp.where(alike, 0.0, reward - state_values(reward)[..., None])
    if normalize_std:
        centred = centred / (jnp.std(reward, axis=-1, keepdims=True, ddof=1) + STD_EPSILON)
    return centred


def value_change(
    value: Array, valid: Array, first_state: FirstState = "neutral", sharpen: bool = False
) -> Array:
    """delta_j = V(S_j) - V(S_{j-1}), where j-1 is the previous state of the same trajectory.

    Args:
      value: float32 [N, J].
      valid: bool [N, J]; invalid states come last and get 0.
      first_state: `neutral` sets delta_0 = 0; `released` sets delta_0 = 1 - V(S_0).
      sharpen: replace delta_j by sign(delta_j) |delta_j|^1.5 / sum_k |delta_k|^1.5, the sum over the
        trajectory's states (release).

    Returns:
      float32 [N, J].
    """
    first = 1.0 - value[:, :1] if first_state == "released" else jnp.zeros_like(value[:, :1])
    delta = jnp.concatenate([first, value[:, 1:] - value[:, :-1]], axis=1)
    delta = jnp.where(valid, delta, 0.0)
    if sharpen:
        magnitude = jnp.abs(delta) ** SHARPEN_EXPONENT
        total = jnp.sum(magnitude, axis=1, keepdims=True)
        delta = jnp.sign(delta) * magnitude / jnp.where(total > 0, total, 1.0)
    return delta


def modulation_factor(
    value: Array,
    valid: Array,
    modulation: Modulation = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> Array:
    """alpha_j = 1 / exp(V(S_j) - V(S_{j-1})). Paper (advantage modulation).

    Args:
      value: float32 [N, J].
      valid: bool [N, J].
      modulation: `paper`, or `none` for alpha = 1.
      first_state: see `value_change`.
      sharpen: see `value_change`.

    Returns:
      float32 [N, J].
    """
    if modulation == "none":
        return jnp.ones_like(value)
    return jnp.exp(-value_change(value, valid, first_state, sharpen))


def accept_states(reward: Array, valid: Array, query: Array, rule: RejectRule) -> Array:
    """Which states carry a gradient and go to the learner.

    Args:
      reward: float32 [N, J, M].
      valid: bool [N, J].
      query: int32 [N], the query that each trajectory answers.
      rule: `state` rejects a state whose M rewards are all 0 or all 1 (paper); `query` rejects all
        states of a query whose rewards are equal over all of its states; `none` accepts every valid
        state.

    Returns:
      bool [N, J].
    """
    if rule == "none":
        return valid
    low, high = jnp.min(reward, axis=-1), jnp.max(reward, axis=-1)
    if rule == "query":
        low = jnp.min(jnp.where(valid, low, jnp.inf), axis=1)
        high = jnp.max(jnp.where(valid, high, -jnp.inf), axis=1)
        same = query[:, None] == query[None, :]
        low = jnp.min(jnp.where(same, low[None, :], jnp.inf), axis=1)[:, None]
        high = jnp.max(jnp.where(same, high[None, :], -jnp.inf), axis=1)[:, None]
    return valid & (high > low)


def modulated_advantage(
    reward: Array,
    valid: Array,
    normalize_std: bool = False,
    modulation: Modulation = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> tuple[Array, Array, Array]:
    """A'(S_j, i) = alpha_j A(S_j, i). Paper; the options are those of the functions above.

    Args:
      reward: float32 [N, J, M].
      valid: bool [N, J].

    Returns:
      (advantage float32 [N, J, M], value float32 [N, J], alpha float32 [N, J]).
    """
    value = state_values(reward)
    alpha = modulation_factor(value, valid, modulation, first_state, sharpen)
    advantage = alpha[..., None] * group_advantage(reward, normalize_std)
    return advantage, value, alpha
