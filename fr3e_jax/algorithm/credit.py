"""Credit of partial rollouts: state values, group advantage, modulation, rejection.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
Everything is computed over all states of a trajectory, degenerate ones included, before any is
rejected: a value that comes from "the previous survivor" is a value of another state.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int32

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.types import AnyArray

AdvantageFunction = Callable[[Float32[Array, "N J M"], Bool[Array, "N J"]], Float32[Array, "N J M"]]
"""(Rewards, which states are valid) -> the advantage of each rollout, one for all of its tokens."""

ModulationFunction = Callable[[Float32[Array, "N J"]], Float32[Array, "N J"]]
"""Value changes delta_j -> the factors alpha_j."""

RejectFunction = Callable[
    [Float32[Array, "N J M"], Bool[Array, "N J"], Int32[Array, " N"]], Bool[Array, "N J"]
]
"""(Rewards, which states are valid, the query of each trajectory) -> which states are accepted. States that
are not valid are rejected in any case."""

AdvantageRule = Chosen[AdvantageFunction]
Modulation = Chosen[ModulationFunction]
RejectRule = Chosen[RejectFunction]
FirstState = Literal["neutral", "released"]

SHARPEN_EXPONENT = 1.5  # release
STD_EPSILON = 1e-6  # release


def state_values(reward: Float[AnyArray, "N J M"]) -> Float32[Array, "N J"]:
    """Compute V(S_j), the mean of the M rewards of S_j. Paper (state value)."""
    return jnp.mean(reward.astype(jnp.float32), axis=-1)


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
    advantage: Float32[AnyArray, "N J M"], reward: Float32[AnyArray, "N J M"]
) -> Float32[Array, "N J M"]:
    """Divide advantages by the unbiased standard deviation of their state's rewards, plus 1e-6 (release).

    M is at least 2.
    """
    return advantage / (jnp.std(reward, axis=-1, keepdims=True, ddof=1) + STD_EPSILON)


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


def inverse_exponential(change: Float32[AnyArray, "N J"]) -> Float32[Array, "N J"]:
    """Compute alpha_j = 1 / exp(delta_j): less where the value rose, more where it fell. Paper."""
    return jnp.exp(-change)


MODULATIONS: dict[str, Rule[ModulationFunction]] = {
    "paper": Rule(inverse_exponential, "1 / exp(V(S_j) - V(S_{j-1}))"),
    "none": Rule(jnp.ones_like, "1; grpo and grpo++ set it"),
}


def modulation_factor(
    value: Float32[AnyArray, "N J"],
    valid: Bool[AnyArray, "N J"],
    modulation: str | ModulationFunction = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> Float32[Array, "N J"]:
    """Compute alpha_j, by which the advantages of a state are multiplied. Paper (advantage modulation).

    Args:
      value: V(S_j).
      valid: which states there are.
      modulation: a name in MODULATIONS, or a function.
      first_state: see `value_change`.
      sharpen: see `value_change`.

    Raises:
      RuleError: there is no such modulation, or it gives something else.
    """
    change = value_change(value, valid, first_state, sharpen)
    return of_shape(function_of(MODULATIONS, modulation)(change), value.shape, "modulation factors [N, J]")


def mixed_states(
    reward: Float32[AnyArray, "N J M"], valid: Bool[AnyArray, "N J"], query: Int[AnyArray, " N"]
) -> Bool[Array, "N J"]:
    """Accept the states whose M rewards are not all the same. Paper (rejection sampling)."""
    return jnp.max(reward, axis=-1) > jnp.min(reward, axis=-1)


def mixed_queries(
    reward: Float32[AnyArray, "N J M"], valid: Bool[AnyArray, "N J"], query: Int[AnyArray, " N"]
) -> Bool[Array, "N J"]:
    """Accept all states of the queries whose rewards, over all of their states, are not all the same."""
    low = jnp.min(jnp.where(valid, jnp.min(reward, axis=-1), jnp.inf), axis=1)
    high = jnp.max(jnp.where(valid, jnp.max(reward, axis=-1), -jnp.inf), axis=1)
    same = query[:, None] == query[None, :]
    low = jnp.min(jnp.where(same, low[None, :], jnp.inf), axis=1)[:, None]
    high = jnp.max(jnp.where(same, high[None, :], -jnp.inf), axis=1)[:, None]
    return jnp.broadcast_to(high > low, valid.shape)


def every_state(
    reward: Float32[AnyArray, "N J M"], valid: Bool[AnyArray, "N J"], query: Int[AnyArray, " N"]
) -> Bool[AnyArray, "N J"]:
    """Accept every valid state, whatever its rewards."""
    return valid


REJECT_RULES: dict[str, Rule[RejectFunction]] = {
    "state": Rule(mixed_states, "states whose rewards are all 0 or all 1 are rejected (paper)"),
    "query": Rule(mixed_queries, "queries whose rewards are all equal are rejected (ours)"),
    "none": Rule(every_state, "none is rejected; grpo sets it"),
}


def accept_states(
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    query: Int[AnyArray, " N"],
    rule: str | RejectFunction,
) -> Bool[AnyArray, "N J"]:
    """Decide which states carry a gradient and go to the learner.

    Args:
      reward: of the rollouts.
      valid: which states there are.
      query: the query that each trajectory answers.
      rule: a name in REJECT_RULES, or a function.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    accepted = function_of(REJECT_RULES, rule)(reward, valid, query)
    return valid & of_shape(accepted, valid.shape, "accepted states [N, J]")


def modulated_advantage(
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    normalize_std: bool = False,
    modulation: str | ModulationFunction = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
    advantage: str | AdvantageFunction = "group",
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

    Returns:
      (advantage A', value V, alpha).

    Raises:
      RuleError: there is no such rule, or it gives something else, such as an advantage for each token.
    """
    value = state_values(reward)
    alpha = modulation_factor(value, valid, modulation, first_state, sharpen)
    estimate = function_of(ADVANTAGES, advantage)(reward, valid)
    estimate = of_shape(estimate, reward.shape, "advantages [N, J, M], one for each rollout,")
    if normalize_std:
        estimate = divided_by_std(estimate, reward)
    return alpha[..., None] * estimate, value, alpha
