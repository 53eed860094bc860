"""Drawing tokens, with randomness that depends on who draws and not on where the row lies.

One uniform number a token, looked up in the inverse CDF: first the block of the vocabulary, then the token
within it. Over a sharded vocabulary only block sums, and the one block, leave a device. Filters look at the
few blocks of the most likely tokens, and at the rest only where these do not decide what is kept.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fr3e_jax.algorithm.explore import token_entropy
from fr3e_jax.models.decoder import Shard, unsharded
from fr3e_jax.types import Leaf

BLOCK = 256  # tokens of a block, where none divides the vocabulary
NARROW = 16  # tokens of the blocks that the likely blocks are divided into
LIKELY = 128  # blocks of either kind that top_p looks at first
KEY_BITS = 31  # of a float32 without its sign


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: the policy's, changed in the order of the fields.

    temperature: divides the logits; 0 takes the most likely token. top_k: only that many of the most likely
    tokens, 0 for all. top_p: only the fewest most likely tokens that together have this probability. Tokens
    exactly as likely as the last that is kept are kept too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling(temperature=0.0)


class Drawn(NamedTuple):
    """A drawn token, int32 [], and float32 [] in nats.

    logprob: of the token, in the policy as it is (temperature 1, unfiltered). sampled_logprob: of the token,
    in the distribution that it was drawn from. entropy: of the policy as it is, before the draw.
    """

    token: Array
    logprob: Array
    sampled_logprob: Array
    entropy: Array


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


def draw(
    logits: Array, uniform: Array, sampling: Sampling, parts: int = 1, shard: Shard = unsharded
) -> Drawn:
    """Draw a token by inverse CDF.

    Args:
      logits: float32 [V].
      uniform: float32 [], in [0, 1).
      sampling: static.
      parts: that the vocabulary is split into; V divides by it. Blocks do not reach over its borders.
      shard: places the blocks on the mesh.
    """
    greedy, size = sampling.temperature == 0.0, logits.shape[0] // parts
    width = block_width(size)
    top = jnp.max(logits)
    logits = shard(logits.reshape(parts, size), "vocab", None)

    def weigh(logits: Array, kept: Array | None = None) -> Array:
        """In the distribution that is drawn from; of tokens no further than `kept` below the largest."""
        if greedy:
            return (logits == top).astype(jnp.float32)
        below = logits - top
        weight = jnp.exp(below / sampling.temperature)
        return weight if kept is None else jnp.where(jnp.abs(below) <= kept, weight, 0.0)

    def weigh_policy(logits: Array) -> Array:
        return jnp.exp(logits - top)

    def weigh_moment(logits: Array) -> Array:
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
    # Not logits[part]: only one device has that block, and the others nothing to add. The last block of a
    # part may be a short one, and then begins within the block before it.
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


def filtered(
    logits: Array, top: Array, weigh: Callable[..., Array], sampling: Sampling, width: int
) -> tuple[Array, Array]:
    """What `keep` keeps, and the sums of its weights over blocks.

    Tokens are looked for where the largest are: in the blocks with the largest maxima, and within these in
    the narrow ones with the largest. If all that is kept is larger than whatever was left out, that changes
    nothing, and both are exact; else all tokens are looked at. No row of a batch pays for that if none needs
    it.

    Args:
      logits: float32 [parts, n]. top: float32 [], the largest of them. weigh: of logits, of any shape, and
        how far below `top` they are kept. width: of a block.

    Returns:
      float32 [] and [parts, blocks].
    """

    def of_all(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
        # Tied to what the loop carries; what is not, XLA does in advance, and then also for loops of no step.
        here, _ = jax.lax.optimization_barrier((logits, found))
        kept = keep(here - top, sampling)
        return kept, block_sums(here, lambda logits: weigh(logits, kept), width)

    parts = logits.shape[0]
    # More than top_k, so that a few that are as likely as the last one are seen.
    count = sampling.top_k + sampling.top_k // 4 + 1 if sampling.top_k else LIKELY
    number, likely, left = largest_blocks(logits, top, width, count)
    likely = likely.reshape(parts, -1)
    _, tokens, left_of_likely = largest_blocks(likely, top, NARROW, count)
    left = jnp.maximum(left, left_of_likely)
    below = tokens.reshape(parts, -1) - top
    total = None if sampling.top_k else jnp.sum(block_sums(logits, weigh, width))
    kept = keep(below, sampling, total)
    # All that top_k keeps is to be larger than what was left out, also where top_p then keeps less of it.
    larger = jnp.sum(jnp.abs(below) < top - left)
    decided = larger >= sampling.top_k if sampling.top_k else kept < top - left
    decided |= jnp.isneginf(left)

    weight = block_sums(likely, lambda logits: weigh(logits, kept), width)
    nothing = jnp.zeros((parts, -(-logits.shape[1] // width)))
    block_weight = jax.vmap(lambda x, number, weight: x.at[number].set(weight))(nothing, number, weight)
    return jax.lax.fori_loop(0, jnp.where(decided, 0, 1), of_all, (kept, block_weight))


def largest_blocks(logits: Array, top: Array, width: int, count: int) -> tuple[Array, Array, Array]:
    """The `count` blocks of each part with the largest maxima, in their order; all if there are no more.

    Not `top_k`, for which XLA would gather all parts and rows.

    Args:
      logits: float32 [parts, n]. top: float32 [], at least the largest of them.

    Returns:
      Their places, int32 [parts, c]. Their logits, float32 [parts, c, width]. The largest logit of the other
      blocks, float32 [], -inf if there is none. Blocks of -inf are not taken: for want of others, a place is
      the number of blocks, and the logits are -inf.
    """
    blocks = in_blocks(logits, width)
    parts, all_blocks, _ = blocks.shape
    if all_blocks <= count:
        number = jnp.broadcast_to(jnp.arange(all_blocks), (parts, all_blocks))
        return number, blocks, jnp.float32(-jnp.inf)

    def choose(largest: Array) -> tuple[Array, Array]:
        distance = jnp.abs(largest - top)
        near = distance <= nearest(distance, jnp.ones_like(distance), jnp.float32(count))
        near &= distance < jnp.inf
        rank = jnp.cumsum(near)
        number = jnp.searchsorted(rank, jnp.arange(1, count + 1))
        return number, jnp.max(jnp.where(near & (rank <= count), -jnp.inf, largest))

    number, left = jax.vmap(choose)(jnp.max(blocks, axis=-1))
    chosen = jnp.take_along_axis(blocks, number[..., None], axis=1, mode="fill", fill_value=-jnp.inf)
    return number, chosen, jnp.max(left)


def in_blocks(logits: Array, width: int) -> Array:
    """Logits [parts, n] as [parts, blocks, width], filled up with -inf."""
    padding = ((0, 0), (0, -logits.shape[1] % width))
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf)
    # Laid out anew once for all that is done with them; XLA would rather do so with the weights of each.
    return jax.lax.optimization_barrier(padded.reshape(logits.shape[0], -1, width))


def block_sums(logits: Array, weigh: Callable[[Array], Array], width: int) -> Array:
    """Sums of `weigh(logits)`, logits float32 [parts, n], over blocks of `width`: [parts, blocks]."""
    # Not by `reduce_window`, which XLA's library for CPUs (jaxlib 0.10) sums wrongly where it is fused with
    # what makes its input and there is one row.
    return jnp.sum(weigh(in_blocks(logits, width)), axis=-1)


def block_width(size: int) -> int:
    """Tokens of a block: of a few hundred, what divides `size` best."""
    if size <= BLOCK:
        return size
    return max((width for width in (512, 384, 256, 128) if size % width == 0), default=BLOCK)


def keep(below: Array, sampling: Sampling, total: Array | None = None) -> Array:
    """How far below the largest logit a token may be to be drawn, float32 [].

    Args:
      below: float32, any shape, logits less the largest one.
      total: float32 [], weight that top_p is a share of, where tokens are missing here; without top_k.
    """
    distance = jnp.abs(below)
    limit = jnp.float32(jnp.inf)
    if sampling.temperature == 0.0:
        return limit
    if sampling.top_k:
        limit = nearest(distance, jnp.ones_like(distance), jnp.float32(sampling.top_k))
    if sampling.top_p < 1.0:
        weight = jnp.where(distance <= limit, jnp.exp(below / sampling.temperature), 0.0)
        total = jnp.sum(weight) if total is None else total
        limit = jnp.minimum(limit, nearest(distance, weight, sampling.top_p * total))
    return limit


def nearest(distance: Array, weight: Array, wanted: Array) -> Array:
    """The smallest distance within which the weights reach `wanted`; inf where they never do.

    A search over the bits of a float32, which are in order where numbers have no sign: exact, without
    sorting the vocabulary.

    Args:
      distance: float32, at least 0. weight: float32 of its shape, at least 0. wanted: float32 [].
    """
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)

    def halve(i: Array, found: Array) -> Array:
        # `found` is the largest number of which it is known that the weights below it do not suffice.
        tried = found + jax.lax.shift_left(jnp.int32(1), KEY_BITS - 1 - i)
        enough = jnp.sum(jnp.where(bits < tried, weight, 0.0)) >= wanted
        return jnp.where(enough, found, tried)

    found = jax.lax.fori_loop(0, KEY_BITS, halve, jnp.int32(0))
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.minimum(found, infinity), jnp.float32)


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
