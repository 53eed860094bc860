"""Credit of partial rollouts: values, advantages and modulation, put together.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.advantage import (
    ADVANTAGES,
    AdvantageFunction,
    Baseline,
    divided_by_std,
    leave_one_out,
)
from fr3e_jax.algorithm.modulation import ModulationFunction, modulation_factor
from fr3e_jax.algorithm.rules import RuleError, function_of, of_shape
from fr3e_jax.algorithm.segments import StateWeight, segment_advantage, state_weights, tree_weights
from fr3e_jax.algorithm.values import (
    FirstState,
    counted_states,
    filled_rewards,
    rollout_counts,
    state_values,
    values_before,
)
from fr3e_jax.types import AnyArray

Estimator = Literal["paper", "value", "edge"]


def modulated_advantage(
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    normalize_std: bool = False,
    modulation: str | ModulationFunction = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
    advantage: str | AdvantageFunction = "group",
    counted: Bool[AnyArray, "N J M"] | None = None,
    *,
    estimator: Estimator = "paper",
    baseline: Baseline = "mean",
    state_weight: StateWeight = "rollout",
    base_reward: Float32[AnyArray, " N"] | None = None,
    base_counted: Bool[AnyArray, " N"] | None = None,
) -> tuple[Float32[Array, "N J rows"], Float32[Array, "N J"], Float32[Array, "N J"]]:
    """Compute A'(S_j, i) = alpha_j A(S_j, i), or the advantages of another estimator.

    The options are those of the functions of this folder. Only the estimator `paper` has an alpha_j that is
    not 1. `value` is A(S_j, i) alone. `edge` has one more row for each state, the last: the advantage of its
    segment of the base trajectory (`segment_advantage`). Rollouts are trained on too, as in the trees of SPO
    and TreeRL: each is a segment from S_j to a leaf, worth r - V(S_j), and they are most of what is sampled.

    Args:
      reward: of the rollouts.
      valid: which states there are.
      normalize_std: whether A is divided by its state's standard deviation; needs M of at least 2.
      modulation: a name in MODULATIONS, or a function.
      first_state: see `value_change`.
      sharpen: see `value_change`.
      advantage: a name in ADVANTAGES, or a function: A.
      counted: which rollouts count; None: all. The others have no advantage, and a state with none that
        counts is no state: the change of value is from the state before it to the one after.
      estimator: `paper`, `value` or `edge`.
      baseline: `leave_one_out` takes each rollout out of the mean that A is less (`leave_one_out`).
      state_weight: `trajectory` multiplies by the weights of `state_weights`, of `edge` by `tree_weights`.
      base_reward: of the base trajectories, for `edge`.
      base_counted: which of these count; None: all.

    Returns:
      (advantage A', value V, alpha), rows = M, or M + 1 of `edge`.

    Raises:
      RuleError: there is no such rule, or it gives something else, such as an advantage for each token; or
        `edge` has no base_reward.
    """
    valid = counted_states(valid, counted)
    value = state_values(reward, counted)
    if estimator == "paper":
        known = value if counted is None else values_before(value, valid)
        alpha = modulation_factor(known, valid, modulation, first_state, sharpen)
    else:
        alpha = jnp.ones_like(value)
    estimate = function_of(ADVANTAGES, advantage)(filled_rewards(reward, counted), valid)
    estimate = of_shape(estimate, reward.shape, "advantages [N, J, M], one for each rollout,")
    if counted is not None:
        estimate = jnp.where(counted, estimate, 0.0)
    if normalize_std:
        estimate = divided_by_std(estimate, reward, counted)
    if baseline == "leave_one_out":
        estimate = leave_one_out(estimate, rollout_counts(reward, counted))
    estimate = alpha[..., None] * estimate
    segment = None
    if estimator == "edge":
        if base_reward is None:
            raise RuleError("the estimator edge needs base_reward, the rewards of the base trajectories [N]")
        segment = segment_advantage(value, valid, base_reward, base_counted)
    if state_weight == "trajectory":
        count = jnp.where(valid, rollout_counts(reward, counted), 0.0)
        if segment is None:
            weight = state_weights(count, reward.shape[2])
        else:
            weight, of_segments = tree_weights(count, reward.shape[2])
            segment = of_segments * segment
        estimate = weight[..., None] * estimate
    if segment is not None:
        estimate = jnp.concatenate([estimate, segment[..., None]], axis=-1)
    return estimate, value, alpha
