"""How many positions and rollouts a query gets, by how often it is solved: `explore.adaptive`."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from fr3e_jax.algorithm.success import REWARD_ROUNDING
from fr3e_jax.types import AnyArray

LEAST_POSITIONS = 1  # without one, a trajectory has no state but the query
LEAST_ROLLOUTS = 2  # a single rollout has no other to be compared with


def adapted_amount(most: int, value: Float32[AnyArray, " N"], least: int) -> Int32[Array, " N"]:
    """Compute ceil(most (1 - V(root))): as many where a query is never solved, few where it nearly always is.

    K = ceil(K_max (1 - V(root))), and M likewise (ours). At V(root) = 0 it is `most`, and so queries that are
    never solved cost what they cost without it.

    Args:
      most: K_max or M_max.
      value: V(root), the mean reward of a query's base trajectories, in [0, 1].
      least: the smallest amount.

    Returns:
      A number in [least, most].
    """
    # A mean that is a little too small by rounding must not give one more.
    share = 1.0 - value - REWARD_ROUNDING
    return jnp.clip(jnp.ceil(most * share), min(least, most), most).astype(jnp.int32)
