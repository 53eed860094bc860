"""Drawing one token, with randomness that depends on who draws and not on where the row lies."""

import jax
import jax.numpy as jnp
from jax import Array

from fr3e_jax.types import Leaf

BLOCK = 256  # inverse CDF: first the block, then the token within it


def row_key(seed_key: Array, step: Leaf, query: Leaf, branch: Leaf) -> Array:
    """The key of one branch; `draw_uniform` adds the position.

    Args:
      seed_key: key of the run's seed.
      step: int32 [], query: int32 [], index in the stream; branch: int32 [].
    """
    for number in (step, query, branch):
        seed_key = jax.random.fold_in(seed_key, number)
    return seed_key


def draw_uniform(key: Array, position: Array) -> Array:
    """The one uniform number that the token at `position` of a row is drawn with, float32 []."""
    return jax.random.uniform(jax.random.fold_in(key, position))


def draw(logits: Array, uniform: Array, temperature: float) -> Array:
    """Draw a token by inverse CDF, or take the most likely one at temperature 0.

    Args:
      logits: float32 [V].
      uniform: float32 [], in [0, 1).
      temperature: static.

    Returns:
      int32 [].
    """
    if temperature == 0.0:
        return jnp.argmax(logits).astype(jnp.int32)
    weight = jax.nn.softmax(logits / temperature)
    blocks = -(-weight.shape[0] // BLOCK)
    weight = jnp.pad(weight, (0, blocks * BLOCK - weight.shape[0])).reshape(blocks, BLOCK)
    block_weight = jnp.sum(weight, axis=1)
    block_cdf = jnp.cumsum(block_weight)
    target = uniform * block_cdf[-1]
    block = first_above(block_cdf, block_weight, target)
    before = jnp.where(block > 0, block_cdf[block - 1], 0.0)
    within = weight[block]
    token = block * BLOCK + first_above(jnp.cumsum(within), within, target - before)
    return token.astype(jnp.int32)


def first_above(cdf: Array, weight: Array, target: Array) -> Array:
    """First index of positive weight whose cdf exceeds target; where rounding leaves none, the last.

    A cdf that is summed in parallel can step up by rounding where the weight is 0.

    Args:
      cdf, weight: float32 [n]. target: float32 [].

    Returns:
      int32 [].
    """
    positive = weight > 0
    above = positive & (cdf > target)
    last = weight.shape[0] - 1 - jnp.argmax(positive[::-1])
    return jnp.where(jnp.any(above), jnp.argmax(above), last)
