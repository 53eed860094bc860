"""The states that rollouts restart from: S_j of arXiv 2507.07017, a base trajectory before position T_j."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Int32

from fr3e_jax.types import AnyArray


def states_of(
    position: Int[AnyArray, "N K"], valid: Bool[AnyArray, "N K"]
) -> tuple[Int32[Array, "N K+1"], Bool[Array, "N K+1"]]:
    """Add the root to the positions: S_0 = the bare query, S_j = the query and the response before T_j.

    Returns:
      (prefix_length, whether the state is valid) of J = K + 1 states; prefix_length counts response tokens
      and is 0 for the root.
    """
    n = position.shape[0]
    prefix_length = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), position], axis=1)
    return prefix_length, jnp.concatenate([jnp.ones((n, 1), bool), valid], axis=1)
