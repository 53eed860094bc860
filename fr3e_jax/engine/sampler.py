"""Drawing tokens, with randomness that depends on which branch draws and not on its batch row.

Each token takes one uniform number, which is looked up in the inverse CDF: first the block of the vocabulary,
then the token within it. Over a sharded vocabulary only block sums, and the one block, leave a device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int32, Key

from fr3e_jax.algorithm.entropy import token_entropy
from fr3e_jax.engine.filters import Sampling as Sampling  # imported from here by all who draw
from fr3e_jax.engine.filters import block_sums, block_width, filtered
from fr3e_jax.models.decoder import Shard, unsharded
from fr3e_jax.types import AnyArray

GREEDY = Sampling(temperature=0.0)


class Drawn(NamedTuple):
    """Drawn tokens, with log-probabilities and entropies in nats."""

    token: Int32[AnyArray, "*batch"]
    logprob: Float32[AnyArray, "*batch"]
    """Of the token in the policy as it is (temperature 1, unfiltered)."""
    sampled_logprob: Float32[AnyArray, "*batch"]
    """Of the token in the distribution that it was drawn from."""
    entropy: Float32[AnyArray, "*batch"]
    """Of the policy as it is, before the draw."""


def row_key(
    seed_key: Key[AnyArray, ""],
    step: Int[AnyArray, ""] | int,
    query: Int[AnyArray, ""] | int,
    branch: Int[AnyArray, ""] | int,
) -> Key[Array, ""]:
    """Make the PRNG key of one branch; `draw_uniform` adds the position.

    Args:
      seed_key: PRNG key of the run's seed.
      step: of the run.
      query: its index in the stream.
      branch: its number among those of the query.
    """
    for number in (step, query, branch):
        seed_key = jax.random.fold_in(seed_key, number)
    return seed_key


def branch_keys(
    seed_key: Key[AnyArray, ""],
    step: Int[AnyArray, "..."] | int,
    query: Int32[AnyArray, " N"],
    branch: Int32[AnyArray, "N C"],
) -> Key[Array, "N C"]:
    """Make the PRNG keys of branches.

    Args:
      seed_key: PRNG key of the run's seed.
      step: in which the branches were begun, one or of each trajectory.
      query: index in the stream of the query of each trajectory.
      branch: numbers among the branches of the query.
    """
    keys = jax.vmap(row_key, in_axes=(None, None, None, 0))
    return jax.vmap(keys, in_axes=(None, 0, 0, 0))(
        seed_key, jnp.broadcast_to(step, query.shape), query, branch
    )


def draw_uniform(key: Key[AnyArray, ""], position: Int[AnyArray, ""] | int) -> Float32[Array, ""]:
    """Draw the uniform number in [0, 1) for the token at `position` of a branch."""
    return jax.random.uniform(jax.random.fold_in(key, position))


def draw(
    logits: Float32[Array, " V"],
    uniform: Float[Array, ""],
    sampling: Sampling,
    parts: int = 1,
    shard: Shard = unsharded,
) -> Drawn:
    """Draw a token by inverse CDF.

    Args:
      logits: of the policy.
      uniform: in [0, 1).
      sampling: static.
      parts: that the vocabulary is split into; they divide V. No block is in two parts.
      shard: places the blocks on the mesh.
    """
    greedy, size = sampling.temperature == 0.0, logits.shape[0] // parts
    width = block_width(size)
    top = jnp.max(logits)
    logits = shard(logits.reshape(parts, size), "vocab", None)

    def weigh(
        logits: Float32[Array, "*axes"], kept: Float32[Array, ""] | None = None
    ) -> Float32[Array, "*axes"]:
        """Weigh tokens as they are drawn, those further than `kept` below the largest logit with 0."""
        if greedy:
            return (logits == top).astype(jnp.float32)
        below = logits - top
        weight = jnp.exp(below / sampling.temperature)
        return weight if kept is None else jnp.where(jnp.abs(below) <= kept, weight, 0.0)

    def weigh_policy(logits: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
        return jnp.exp(logits - top)

    def weigh_moment(logits: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
        below = logits - top
        return jnp.where(jnp.isneginf(below), 0.0, jnp.exp(below) * below)

    kept = None
    if greedy or (not sampling.top_k and sampling.top_p == 1.0):
        block_weight = block_sums(logits, weigh, width)
    else:
        kept, block_weight = filtered(logits, top, weigh, sampling, width)
    blocks = block_weight.shape[1]
    block_weight = block_weight.reshape(-1)
    block_cdf = jnp.cumsum(block_weight)
    target = block_cdf[-1] * (0.0 if greedy else uniform)
    number = first_above(block_cdf, block_weight, target)
    part, block = number // blocks, number % blocks
    # Not logits[part]: only one device has that block, and the others add 0. The last block of a part may be
    # short, and is then read from within the block before it.
    first = jnp.minimum(block * width, size - width)
    here = jnp.arange(parts)[:, None] == part
    chosen = jax.lax.dynamic_slice(logits, (0, first), (parts, width))
    chosen = jnp.sum(jnp.where(here, chosen, 0.0), axis=0)
    before = jnp.where(number > 0, block_cdf[number - 1], 0.0)
    weight = jnp.where(first + jnp.arange(width) >= block * width, weigh(chosen, kept), 0.0)
    within = first_above(jnp.cumsum(weight), weight, target - before)

    total = jnp.sum(block_sums(logits, weigh_policy, width))
    moment = jnp.sum(block_sums(logits, weigh_moment, width))
    return Drawn(
        token=(part * size + first + within).astype(jnp.int32),
        logprob=chosen[within] - top - jnp.log(total),
        sampled_logprob=jnp.float32(0.0) if greedy else jnp.log(weight[within] / block_cdf[-1]),
        entropy=token_entropy(total, moment),
    )


def first_above(
    cdf: Float32[Array, " n"], weight: Float32[Array, " n"], target: Float32[Array, ""]
) -> Int32[Array, ""]:
    """Find the first index of positive weight whose cdf exceeds target; where rounding leaves none, the last.

    A cdf that is summed in parallel can rise by rounding where the weight is 0.
    """
    positive = weight > 0
    above = positive & (cdf > target)
    last = weight.shape[0] - 1 - jnp.argmax(positive[::-1])
    return jnp.where(jnp.any(above), jnp.argmax(above), last)
