"""Credit of partial rollouts: values, advantages and modulation, put together.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.advantage import ADVANTAGES, AdvantageFunction, divided_by_std
from fr3e_jax.algorithm.modulation import ModulationFunction, modulation_factor
from fr3e_jax.algorithm.rules import function_of, of_shape
from fr3e_jax.algorithm.values import (
    FirstState,
    counted_states,
    filled_rewards,
    state_values,
    values_before,
)
from fr3e_jax.types import AnyArray


def modulated_advantage(
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    normalize_std: bool = False,
    modulation: str | ModulationFunction = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
    advantage: str | AdvantageFunction = "group",
    counted: Bool[AnyArray, "N J M"] | None = None,
) -> tuple[Float32[Array, "N J M"], Float32[Array, "N J"], Float32[Array, "N J"]]:
    """Compute A'(S_j, i) = alpha_j A(S_j, i). Paper; the options are those of the functions above.

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

    Returns:
      (advantage A', value V, alpha).

    Raises:
      RuleError: there is no such rule, or it gives something else, such as an advantage for each token.
    """
    valid = counted_states(valid, counted)
    value = state_values(reward, counted)
    known = value if counted is None else values_before(value, valid)
    alpha = modulation_factor(known, valid, modulation, first_state, sharpen)
    estimate = function_of(ADVANTAGES, advantage)(filled_rewards(reward, counted), valid)
    estimate = of_shape(estimate, reward.shape, "advantages [N, J, M], one for each rollout,")
    if counted is not None:
        estimate = jnp.where(counted, estimate, 0.0)
    if normalize_std:
        estimate = divided_by_std(estimate, reward, counted)
    return alpha[..., None] * estimate, value, alpha
