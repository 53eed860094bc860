"""Rejection: which states carry a gradient.

Shapes: N trajectories, J states each (state 0 is the bare query), M rollouts per state.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.algorithm.values import counted_states, filled_rewards
from fr3e_jax.types import AnyArray

RejectFunction = Callable[
    [Float32[Array, "N J M"], Bool[Array, "N J"], Int32[Array, " N"]], Bool[Array, "N J"]
]
"""(Rewards, which states are valid, the query of each trajectory) -> which states are accepted. States that
are not valid are rejected in any case. The reward of a rollout that does not count is its state's value."""

RejectRule = Chosen[RejectFunction]


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


def trained_rows(
    accepted: Bool[AnyArray, "N J"],
    advantage: Float32[AnyArray, "N J rows"],
    valid: Bool[AnyArray, "N J"],
    counted: Bool[AnyArray, "N J M"],
) -> Bool[Array, "N J rows"]:
    """Find what of each state is trained on, where segments of the base trajectories are (`edge`).

    These are the rollouts that count of the accepted states, their segments, and all segments whose advantage
    is not 0. So a state may be there for its segment alone.

    Args:
      accepted: by the rewards of the rollouts.
      advantage: of the M rollouts, and of the segment in the last row.
      valid: which states there are.
      counted: which rollouts count.
    """
    segment = counted_states(valid, counted) & (accepted | (advantage[..., -1] != 0))
    return jnp.concatenate([accepted[..., None] & counted, segment[..., None]], axis=-1)


def accept_states(
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    query: Int[AnyArray, " N"],
    rule: str | RejectFunction,
    counted: Bool[AnyArray, "N J M"] | None = None,
) -> Bool[AnyArray, "N J"]:
    """Decide which states carry a gradient and go to the learner.

    Args:
      reward: of the rollouts.
      valid: which states there are.
      query: the query that each trajectory answers.
      rule: a name in REJECT_RULES, or a function.
      counted: which rollouts count; None: all. A state with none is rejected.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    valid = counted_states(valid, counted)
    accepted = function_of(REJECT_RULES, rule)(filled_rewards(reward, counted), valid, query)
    return valid & of_shape(accepted, valid.shape, "accepted states [N, J]")
