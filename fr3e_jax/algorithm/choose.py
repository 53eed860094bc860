"""Which tokens of a response become positions, given a score of each: T_k of arXiv 2507.07017.

A position t counts the tokens of the response, from 0; its state is the query and the response
tokens *before* t, so the token itself is drawn again.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32

from fr3e_jax.types import AnyArray


def choose_positions(
    score: Float32[AnyArray, "N S"],
    length: Int[AnyArray, " N"],
    count: int,
    min_gap: int = 0,
    wanted: Int[AnyArray, " N"] | None = None,
) -> tuple[Int32[Array, "N {count}"], Bool[Array, "N {count}"]]:
    """Choose the `count` highest-scoring positions of each trajectory, in ascending order.

    Paper: score = token entropy. The released code scores by surprisal. Position 0 is
    never chosen, because its state would repeat the root; a trajectory with fewer eligible positions
    than `count` gets fewer, and the rest are marked invalid. Ties go to the earlier position.

    Args:
      score: one per response token; -inf is never chosen.
      length: tokens of the response.
      count: K.
      min_gap: positions are at least this far apart; 0 and 1 both mean "any two differ".
      wanted: how many positions each trajectory gets at most, if fewer than `count`: those with the highest
        scores.

    Returns:
      (position, whether it is valid); invalid positions come last and read 0.
    """
    n, s = score.shape
    index = jnp.arange(s)[None, :]
    eligible = (index >= 1) & (index < length[:, None])

    def pick(eligible: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        position = jnp.argmax(jnp.where(eligible, score, -jnp.inf), axis=1)
        valid = jnp.take_along_axis(eligible, position[:, None], axis=1)[:, 0]
        near = jnp.abs(index - position[:, None]) < max(min_gap, 1)
        return eligible & ~near, (position, valid)

    if count == 0:
        return jnp.zeros((n, 0), jnp.int32), jnp.zeros((n, 0), bool)
    _, (position, valid) = jax.lax.scan(pick, eligible, None, length=count)
    if wanted is not None:
        valid &= jnp.arange(count)[:, None] < wanted[None, :]
    ordered = jnp.sort(jnp.where(valid, position, s), axis=0).T
    valid = ordered < s
    return jnp.where(valid, ordered, 0).astype(jnp.int32), valid


def uniform_positions(
    length: Int[AnyArray, " N"],
    count: int,
    min_gap: int = 0,
    wanted: Int[AnyArray, " N"] | None = None,
) -> tuple[Int32[Array, "N {count}"], Bool[Array, "N {count}"]]:
    """Choose evenly spaced positions, the middles of `count` equal parts.

    This is the ablation that ignores the model.

    Args:
      length: tokens of the response.
      count: K.
      min_gap: as in `choose_positions`; a short response may get fewer positions than would fit.
      wanted: the number of equal parts of each response, if fewer than `count`.

    Returns:
      (position, whether it is valid), as `choose_positions` does.
    """
    candidates = jnp.maximum(length - 1, 0)[:, None]
    fitting = jnp.maximum(candidates // max(min_gap, 1), jnp.minimum(candidates, 1))
    parts = jnp.minimum(count if wanted is None else wanted[:, None], fitting)
    k = jnp.arange(count)[None, :]
    position = 1 + ((2 * k + 1) * candidates) // jnp.maximum(2 * parts, 1)
    valid = k < parts
    return jnp.where(valid, position, 0).astype(jnp.int32), valid
