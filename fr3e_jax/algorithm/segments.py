"""Segments of base trajectories: what each is worth, and how much it counts.

Segment j is the base trajectory from S_j to the next state, the last one to its end. N trajectories, J states
each (state 0 is the bare query), M rollouts per state. States that are not valid are passed over.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32

from fr3e_jax.types import AnyArray

StateWeight = Literal["rollout", "trajectory"]

VALUE_ROUNDING = 1e-6  # by which means of equal rewards may differ


def following_state(valid: Bool[AnyArray, "N J"]) -> Int32[Array, "N J"]:
    """Find the next valid state behind each state; J where there is none."""
    n, j = valid.shape
    index = jnp.where(valid, jnp.arange(j, dtype=jnp.int32)[None, :], j)
    first = jax.lax.cummin(index, axis=1, reverse=True)  # from each state on
    return jnp.concatenate([first[:, 1:], jnp.full((n, 1), j, jnp.int32)], axis=1)


def segment_advantage(
    value: Float32[AnyArray, "N J"],
    valid: Bool[AnyArray, "N J"],
    base_reward: Float32[AnyArray, " N"],
    base_counted: Bool[AnyArray, " N"] | None = None,
) -> Float32[Array, "N J"]:
    """Compute V(S_{j+1}) - V(S_j) of each segment, and r - V(S_j) of the last: what its tokens changed.

    An estimate of their advantage whose baseline and whose value are means of rollouts that its tokens had no
    part in (VinePPO, arXiv 2410.01679; SPO, 2505.23564). The advantages of a trajectory add up to r - V(S_0).

    Args:
      value: V(S_j).
      valid: which states there are.
      base_reward: r, of the base trajectories.
      base_counted: where False, r does not count, and the last segment gets 0.
    """
    ends = jnp.concatenate([value, base_reward[:, None]], axis=1)
    after = following_state(valid)
    change = jnp.take_along_axis(ends, after, axis=1) - value
    known = valid & (jnp.abs(change) > VALUE_ROUNDING)
    if base_counted is not None:
        known = known & (base_counted[:, None] | (after < valid.shape[1]))
    return jnp.where(known, change, 0.0)


def state_weights(count: Float32[AnyArray, "N J"], rollouts: int) -> Float32[Array, "N J"]:
    """Compute the weight of each state's rollouts under `trajectory`, where rollouts alone are trained on.

    The K states behind the root together count as much as the root: w_0 = J / 2 and w_j = J / (2 K), times
    M / n_j. So every trajectory counts J M, whatever number of states and rollouts it has. Where there is no
    state behind the root, w_0 = J. A token behind the last state is reached from all J states. So it counts
    twice as much as the first one, and J times as much where every rollout counts the same.

    Args:
      count: n_j, the number of rollouts of each state that count; a state without any is no state.
      rollouts: M, the most rollouts of a state.
    """
    there, states = count > 0, float(count.shape[1])
    deep = jnp.sum(there[:, 1:], axis=1, keepdims=True).astype(jnp.float32)
    root = jnp.where(deep > 0, states / 2, states)
    others = jnp.broadcast_to(states / (2 * jnp.maximum(deep, 1.0)), count[:, 1:].shape)
    weight = jnp.concatenate([root, others], axis=1) * rollouts / jnp.maximum(count, 1.0)
    return jnp.where(there, weight, 0.0)


def tree_weights(
    count: Float32[AnyArray, "N J"], rollouts: int
) -> tuple[Float32[Array, "N J"], Float32[Array, "N J"]]:
    """Compute the weights of rollouts and of segments under `trajectory`, where both are trained on.

    Every leaf of the tree, a rollout or the end of the base trajectory, ends a whole trajectory. All count
    the same: a segment counts 1 + n_{j+1} + ... + n_K times, once for each leaf behind it (TreeRL, arXiv
    2506.11902, takes the square root). So a token counts the same at every depth. With unbiased advantages
    the sum of the gradients is an unbiased estimate of (1 + J M) grad V(S_0).

    Args:
      count: n_j, the number of rollouts of each state that count.
      rollouts: M, the most rollouts of a state.

    Returns:
      (weight of each state's rollouts, 1 where all count; weight of each segment).
    """
    n, j = count.shape
    total = jnp.sum(count, axis=1, keepdims=True)
    behind = total - jnp.cumsum(count, axis=1)
    scale = (1.0 + j * rollouts) / (1.0 + total)
    return jnp.broadcast_to(scale, (n, j)), scale * (1.0 + behind)
