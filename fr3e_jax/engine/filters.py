"""Top-k and top-p: how far below the largest logit a token may be and still be drawn, without sorting.

The vocabulary is divided into blocks. The filters look at the few blocks that hold the most likely tokens,
and at the rest only where these blocks do not decide what is kept.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.types import AnyArray

BLOCK_TOKENS = 256  # tokens of a block, where none divides the vocabulary
NARROW = 16  # tokens of the blocks that the likely blocks are divided into
LIKELY = 128  # blocks of either kind that top_p looks at first
KEY_BITS = 31  # of a float32 without its sign


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: the policy's, changed in the order of the fields.

    temperature: divides the logits; 0 takes the most likely token. top_k: only that many of the most likely
    tokens, 0 for all. top_p: only the fewest most likely tokens that together have this probability. Tokens
    exactly as likely as the last that is kept are kept too. first_temperature: divides the logits of the
    first token after a position of a response instead; None: that one is drawn as all are.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    first_temperature: float | None = None


def cutoff(
    below: Float32[AnyArray, "*axes"], sampling: Sampling, total: Float32[Array, ""] | None = None
) -> Float32[Array, ""]:
    """Find how far below the largest logit a token may be to be drawn.

    Args:
      below: logits less the largest one.
      sampling: static.
      total: the weight of the whole vocabulary, where `below` has only a part of it. Without top_k.
    """
    distance = jnp.abs(below)
    limit = jnp.float32(jnp.inf)
    if sampling.temperature == 0.0:
        return limit
    if sampling.top_k:
        limit = distance_reaching(distance, jnp.ones_like(distance), jnp.float32(sampling.top_k))
    if sampling.top_p < 1.0:
        weight = jnp.where(distance <= limit, jnp.exp(below / sampling.temperature), 0.0)
        total = jnp.sum(weight) if total is None else total
        limit = jnp.minimum(limit, distance_reaching(distance, weight, sampling.top_p * total))
    return limit


def distance_reaching(
    distance: Float32[Array, "*axes"], weight: Float32[Array, "*axes"], wanted: Float32[Array, ""]
) -> Float32[Array, ""]:
    """Find the smallest distance within which the weights add up to `wanted`; inf where they never do.

    A bisection over the bits of a float32, which are in the order of the numbers where these have no sign:
    exact, without sorting the vocabulary.

    Args:
      distance, weight: at least 0.
      wanted: a sum of weights.
    """
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)

    def halve(i: Int32[AnyArray, ""] | int, low: Int32[Array, ""]) -> Int32[Array, ""]:
        # `low` is the largest number of which it is known that the weights below it do not suffice.
        tried = low + jax.lax.shift_left(jnp.int32(1), KEY_BITS - 1 - i)
        enough = jnp.sum(jnp.where(bits < tried, weight, 0.0)) >= wanted
        return jnp.where(enough, low, tried)

    low = jax.lax.fori_loop(0, KEY_BITS, halve, jnp.int32(0))
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.minimum(low, infinity), jnp.float32)


def filtered(
    logits: Float32[AnyArray, "parts n"],
    top: Float32[AnyArray, ""],
    weigh: Callable[..., Array],
    sampling: Sampling,
    width: int,
) -> tuple[Float32[Array, ""], Float32[Array, "parts blocks"]]:
    """Find the cutoff of a filter, and the sums of the weights that it leaves over blocks.

    Only the blocks with the largest maxima are searched, and within these only the narrow blocks with the
    largest maxima. If every kept token is larger than all that were left out, the result is exact. Otherwise
    all tokens are searched. No row of a batch pays for that if none needs it.

    Args:
      logits: of each part of the vocabulary.
      top: the largest of them.
      weigh: (logits of any shape, cutoff) -> the weights of the tokens that the cutoff keeps; without a
        cutoff, of all.
      sampling: static, with top_k or top_p.
      width: tokens of a block.

    Returns:
      (cutoff, sums).
    """

    def search_all(_: Int32[AnyArray, ""] | int, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        # Tied to what the loop carries: XLA computes what is not in advance, also for a loop of no step.
        here, _ = jax.lax.optimization_barrier((logits, carried))
        kept = cutoff(here - top, sampling)
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
    kept = cutoff(below, sampling, total)
    # All that top_k keeps must be larger than what was left out, also where top_p then keeps less of it.
    larger = jnp.sum(jnp.abs(below) < top - left)
    decided = larger >= sampling.top_k if sampling.top_k else kept < top - left
    decided |= jnp.isneginf(left)

    weight = block_sums(likely, lambda logits: weigh(logits, kept), width)
    nothing = jnp.zeros((parts, ceil_divide(logits.shape[1], width)))
    block_weight = jax.vmap(lambda x, number, weight: x.at[number].set(weight))(nothing, number, weight)
    return jax.lax.fori_loop(0, jnp.where(decided, 0, 1), search_all, (kept, block_weight))


def largest_blocks(
    logits: Float32[AnyArray, "parts n"], top: Float32[AnyArray, ""], width: int, count: int
) -> tuple[Int32[Array, "parts c"], Float32[Array, "parts c width"], Float32[Array, ""]]:
    """Take the `count` blocks of each part with the largest maxima, in their order; all if there are no more.

    Without `jax.lax.top_k`, for which XLA would gather all parts and rows.

    Args:
      logits: of each part of the vocabulary.
      top: at least the largest of them.
      width: tokens of a block.
      count: blocks to take.

    Returns:
      (their places, their logits, the largest logit of the other blocks, or -inf if there is none). Blocks of
      -inf are not taken: where there are no others, a place is the number of blocks, and the logits are -inf.
    """
    blocks = in_blocks(logits, width)
    parts, all_blocks, _ = blocks.shape
    if all_blocks <= count:
        number = jnp.broadcast_to(jnp.arange(all_blocks), (parts, all_blocks))
        return number, blocks, jnp.float32(-jnp.inf)

    def choose(largest: Float32[Array, " blocks"]) -> tuple[Int32[Array, " c"], Float32[Array, ""]]:
        distance = jnp.abs(largest - top)
        near = distance <= distance_reaching(distance, jnp.ones_like(distance), jnp.float32(count))
        near &= distance < jnp.inf
        rank = jnp.cumsum(near)
        number = jnp.searchsorted(rank, jnp.arange(1, count + 1))
        return number, jnp.max(jnp.where(near & (rank <= count), -jnp.inf, largest))

    number, left = jax.vmap(choose)(jnp.max(blocks, axis=-1))
    chosen = jnp.take_along_axis(blocks, number[..., None], axis=1, mode="fill", fill_value=-jnp.inf)
    return number, chosen, jnp.max(left)


def in_blocks(logits: Float32[AnyArray, "parts n"], width: int) -> Float32[Array, "parts blocks {width}"]:
    """Divide logits into blocks, filled up with -inf."""
    padding = ((0, 0), (0, -logits.shape[1] % width))
    padded = jnp.pad(logits, padding, constant_values=-jnp.inf)
    # One change of layout for all that follows; without the barrier XLA makes one for every use.
    return jax.lax.optimization_barrier(padded.reshape(logits.shape[0], -1, width))


def block_sums(
    logits: Float32[AnyArray, "parts n"], weigh: Callable[[Array], Array], width: int
) -> Float32[Array, "parts blocks"]:
    """Add up `weigh(logits)` over blocks of `width` tokens."""
    # Not by `reduce_window`, which XLA's library for CPUs (jaxlib 0.10) sums wrongly where it is fused with
    # what makes its input and there is one row.
    return jnp.sum(weigh(in_blocks(logits, width)), axis=-1)


def block_width(size: int) -> int:
    """Choose the tokens of a block: the largest of a few sizes that divides `size`, or `BLOCK_TOKENS`."""
    if size <= BLOCK_TOKENS:
        return size
    return max((width for width in (512, 384, 256, 128) if size % width == 0), default=BLOCK_TOKENS)
