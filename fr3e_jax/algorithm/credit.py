"""What the restarts show: state values, group advantage, modulation, rejection.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
Everything is computed over all states of a trajectory, degenerate ones included, before any is
rejected: a value that comes from "the previous survivor" is a value of another state.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape

AdvantageFunction = Callable[[Array, Array], Array]
"""Of rewards float32 [N, J, M] and which states are valid, bool [N, J], the advantage of each rollout,
float32 [N, J, M]. Rollouts have one advantage each, for all of their tokens."""

ModulationFunction = Callable[[Array], Array]
"""Of value changes delta_j, float32 [N, J], the factors alpha_j, float32 [N, J]."""

RejectFunction = Callable[[Array, Array, Array], Array]
"""Of rewards float32 [N, J, M], which states are valid, bool [N, J], and the query of each trajectory, int32
[N], the states that are accepted, bool [N, J]. States that are not valid are rejected in any case."""

AdvantageRule = Chosen[AdvantageFunction]
Modulation = Chosen[ModulationFunction]
RejectRule = Chosen[RejectFunction]
FirstState = Literal["neutral", "released"]

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


def group_advantage(reward: Array, valid: Array) -> Array:
    """A(S_j, i) = r_ij - V(S_j). Paper (group advantage).

    Args:
      reward: float32 [N, J, M].
      valid: bool [N, J], not read.

    Returns:
      float32 [N, J, M].
    """
    alike = jnp.max(reward, axis=-1, keepdims=True) == jnp.min(reward, axis=-1, keepdims=True)
    # The mean of equal rewards is theirs only up to rounding, and the deviation would blow that up.
    return jnp.where(alike, 0.0, reward - state_values(reward)[..., None])


ADVANTAGES: dict[str, Rule[AdvantageFunction]] = {
    "group": Rule(group_advantage, "r - V(S_j), the reward less the state's mean (paper)"),
}


def divided_by_std(advantage: Array, reward: Array) -> Array:
    """Advantages over the unbiased standard deviation of their state's rewards, plus 1e-6 (release).

    Args:
      advantage: float32 [N, J, M].
      reward: float32 [N, J, M]; M is at least 2.
    """
    return advantage / (jnp.std(reward, axis=-1, keepdims=True, ddof=1) + STD_EPSILON)


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


def inverse_exponential(change: Array) -> Array:
    """alpha_j = 1 / exp(delta_j): less where the value rose, more where it fell. Paper."""
    return jnp.exp(-change)


MODULATIONS: dict[str, Rule[ModulationFunction]] = {
    "paper": Rule(inverse_exponential, "1 / exp(V(S_j) - V(S_{j-1}))"),
    "none": Rule(jnp.ones_like, "1; grpo and grpo++ set it"),
}


def modulation_factor(
    value: Array,
    valid: Array,
    modulation: Modulation = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> Array:
    """alpha_j, by which the advantages of a state are multiplied. Paper (advantage modulation).

    Args:
      value: float32 [N, J].
      valid: bool [N, J].
      modulation: a name in MODULATIONS, or a function.
      first_state: see `value_change`.
      sharpen: see `value_change`.

    Returns:
      float32 [N, J].

    Raises:
      RuleError: there is no such modulation, or it gives something else.
    """
    change = value_change(value, valid, first_state, sharpen)
    return of_shape(function_of(MODULATIONS, modulation)(change), value.shape, "modulation factors [N, J]")


def mixed_states(reward: Array, valid: Array, query: Array) -> Array:
    """States whose M rewards are not all the same. Paper (rejection sampling)."""
    return jnp.max(reward, axis=-1) > jnp.min(reward, axis=-1)


def mixed_queries(reward: Array, valid: Array, query: Array) -> Array:
    """All states of the queries whose rewards, over all of their states, are not all the same."""
    low = jnp.min(jnp.where(valid, jnp.min(reward, axis=-1), jnp.inf), axis=1)
    high = jnp.max(jnp.where(valid, jnp.max(reward, axis=-1), -jnp.inf), axis=1)
    same = query[:, None] == query[None, :]
    low = jnp.min(jnp.where(same, low[None, :], jnp.inf), axis=1)[:, None]
    high = jnp.max(jnp.where(same, high[None, :], -jnp.inf), axis=1)[:, None]
    return jnp.broadcast_to(high > low, valid.shape)


def every_state(reward: Array, valid: Array, query: Array) -> Array:
    """Keep every valid state, whatever its rewards: none is rejected. bool [N, J]."""
    return valid


REJECT_RULES: dict[str, Rule[RejectFunction]] = {
    "state": Rule(mixed_states, "states whose rewards are all 0 or all 1 are rejected (paper)"),
    "query": Rule(mixed_queries, "queries whose rewards are all equal are rejected (ours)"),
    "none": Rule(every_state, "none is rejected; grpo sets it"),
}


def accept_states(reward: Array, valid: Array, query: Array, rule: RejectRule) -> Array:
    """Which states carry a gradient and go to the learner.

    Args:
      reward: float32 [N, J, M].
      valid: bool [N, J].
      query: int32 [N], the query that each trajectory answers.
      rule: a name in REJECT_RULES, or a function.

    Returns:
      bool [N, J].

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    accepted = function_of(REJECT_RULES, rule)(reward, valid, query)
    return valid & of_shape(accepted, valid.shape, "accepted states [N, J]")


def modulated_advantage(
    reward: Array,
    valid: Array,
    normalize_std: bool = False,
    modulation: Modulation = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
    advantage: AdvantageRule = "group",
) -> tuple[Array, Array, Array]:
    """A'(S_j, i) = alpha_j A(S_j, i). Paper; the options are those of the functions above.

    Args:
      reward: float32 [N, J, M].
      valid: bool [N, J].
      normalize_std: whether A is divided by its state's standard deviation; needs M of at least 2.
      modulation: a name in MODULATIONS, or a function.
      first_state: see `value_change`.
      sharpen: see `value_change`.
      advantage: a name in ADVANTAGES, or a function: A.

    Returns:
      (advantage float32 [N, J, M], value float32 [N, J], alpha float32 [N, J]).

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
