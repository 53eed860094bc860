"""Attention over a chain of segments, joined by log-sum-exp.

A context is a chain of segments, such as a query with a response, and a branch's own tokens.
Each segment is attended to in place; nothing is concatenated, so nothing is copied per branch.

While tests run, what functions take and return is checked against the annotations. Fields of named tuples are
not: jax makes such tuples of axis numbers, partition specs and shapes as well.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

MASKED = -1e30  # finite, so that a wholly masked part joins with weight 0 instead of nan


class Segment(NamedTuple):
    """Keys (rotated) and values of consecutive tokens, for all layers.

    L layers, K key-value heads, S slots, D per head.
    """

    key: Float[Any, "L *batch K S D"]
    value: Float[Any, "L *batch K S D"]
    length: Int32[Any, "*batch"]
    """Slots that hold tokens; the rest is never read."""


class Part(NamedTuple):
    """Keys and values that one layer attends to in one segment, and which of them each query sees."""

    key: Float[Array, "K S D"]
    value: Float[Array, "K S D"]
    mask: Bool[Array, "#T S"]


class Partial(NamedTuple):
    """Attention to one part, not yet normalised, of G query heads to each key-value head.

    Where nothing is attended to, top is `MASKED`, total and output are any numbers, and another part's
    larger top makes them join with weight 0.
    """

    top: Float32[Array, "T K G"]
    """The largest score."""
    total: Float32[Array, "T K G"]
    """The sum of exp(score - top)."""
    output: Float32[Array, "T K G D"]
    """The sum of the values, weighted by exp(score - top)."""


def scores(query: Float[Array, "T H D"], part: Part) -> Float32[Array, "K G T S"]:
    """Compute the scores of one part's keys, `MASKED` where a query does not see one."""
    length, heads, head_dim = query.shape
    grouped = query.reshape(length, part.key.shape[0], heads // part.key.shape[0], head_dim)
    score = jnp.einsum("tkgd,ksd->kgts", grouped, part.key, preferred_element_type=jnp.float32)
    return jnp.where(part.mask[None, None], score * head_dim**-0.5, MASKED)


def attend_part(query: Float[Array, "T H D"], part: Part) -> Partial:
    """Attend to one part.

    Scores, softmax and accumulation are float32 whatever the inputs are. H is a multiple of the key-value
    heads; the query heads of one are adjacent.
    """
    value, score = part.value, scores(query, part)
    top = jax.lax.stop_gradient(jnp.max(score, axis=-1))
    weight = jnp.exp(score - top[..., None])  # 0 of what is masked, unless everything is: see Partial
    output = jnp.einsum(
        "kgts,ksd->kgtd", weight.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return Partial(*(jnp.moveaxis(x, 2, 0) for x in (top, jnp.sum(weight, axis=-1), output)))


def join(partials: Sequence[Partial]) -> Float32[Array, "*axes H D"]:
    """Compute softmax attention over the union of parts, by log-sum-exp.

    Args:
      partials: of the same queries, with any leading axes; every query sees at least one key over all parts.
    """
    peak = functools.reduce(jnp.maximum, [partial.top for partial in partials])
    scales = [jnp.exp(partial.top - peak) for partial in partials]
    total = functools.reduce(jnp.add, [s * p.total for s, p in zip(scales, partials, strict=True)])
    scaled = [s[..., None] * p.output for s, p in zip(scales, partials, strict=True)]
    joined = functools.reduce(jnp.add, scaled) / total[..., None]
    return joined.reshape(*joined.shape[:-3], -1, joined.shape[-1])


def mean_weights(
    query: Float[Array, "T H D"], part: Part, partials: Sequence[Partial]
) -> Float32[Array, "T S"]:
    """Compute the softmax weights of one part's keys, the mean over query heads.

    Args:
      query: of T tokens.
      part: whose keys they are of.
      partials: attention of these queries to all parts, this one included.
    """
    peak = functools.reduce(jnp.maximum, [partial.top for partial in partials])
    total = functools.reduce(jnp.add, [jnp.exp(partial.top - peak) * partial.total for partial in partials])
    spread = jnp.moveaxis(peak + jnp.log(total), 0, 2)[..., None]  # log of the softmax's denominator
    weight = jnp.exp(scores(query, part) - spread)
    return jnp.mean(jnp.where(part.mask[None, None], weight, 0.0), axis=(0, 1))


def attend(query: Float[Array, "T H D"], parts: Sequence[Part]) -> Float[Array, "T H D"]:
    """Attend to the union of `parts`; the result has the dtype of `query`."""
    return join([attend_part(query, part) for part in parts]).astype(query.dtype)


class Prefix(NamedTuple):
    """The KV cache that a sequence follows: one of n segments that several sequences share, or its beginning.

    The axis L is there for all layers, and gone for one.
    """

    key: Float[Any, "L *batch n K S D"]
    value: Float[Any, "L *batch n K S D"]
    which: Int32[Any, "*batch"]
    """Index of the segment."""
    length: Int32[Any, "*batch"]
    """Slots of the segment that the sequence sees."""


Attend = Callable[
    [
        Float[Array, "*batch T H D"],
        Float[Array, "*batch K T D"],
        Float[Array, "*batch K T D"],
        Bool[Array, "*batch T"],
        Prefix | None,
    ],
    Float[Array, "*batch T H D"],
]
"""`attend_sequence`, or a function that computes the same in another way, or for a batch of sequences."""

QUERY_BLOCK = 256  # tokens whose scores exist at a time
LOOPED_BLOCKS = 4  # of a long sequence, that one loop computes; each computes scores with all their keys


def attend_sequence(
    query: Float[Array, "T H D"],
    key: Float[Array, "K T D"],
    value: Float[Array, "K T D"],
    real: Bool[Array, " T"],
    prefix: Prefix | None,
) -> Float[Array, "T H D"]:
    """Attend causally, a sequence to its prefix and to itself; the result has the dtype of `query`.

    Scores exist for `QUERY_BLOCK` tokens at a time, also in the backward pass, which computes them again.
    Scores of a block with later tokens are not computed, and where the sequence is long only few: there
    `LOOPED_BLOCKS` blocks are one loop, which is compiled once.

    Args:
      query, key, value: of the sequence.
      real: False where there is only padding, which is seen by itself alone.
      prefix: of one layer, or None.
    """
    length = query.shape[0]
    before: list[Part] = []
    if prefix is not None:
        held = jnp.arange(prefix.key.shape[2]) < prefix.length
        before = [Part(prefix.key[prefix.which], prefix.value[prefix.which], held[None])]

    @jax.checkpoint
    def block(first: Int32[Array, ""], query: Array, key: Array, value: Array, before: list[Part]) -> Array:
        index, seen = first + jnp.arange(query.shape[0])[:, None], jnp.arange(key.shape[1])[None]
        mask = ((seen <= index) & real[None, : key.shape[1]]) | (seen == index)
        return attend(query, [*before, Part(key, value, mask)])

    together, blocks = QUERY_BLOCK * LOOPED_BLOCKS, []
    looped = length // together * together if length > together else 0
    for first in range(0, looped, together):
        end = first + together
        queries = query[first:end].reshape(LOOPED_BLOCKS, QUERY_BLOCK, *query.shape[1:])
        see = key[:, :end], value[:, :end], before
        attended = jax.lax.map(
            lambda x, see=see: block(*x, *see), (jnp.arange(first, end, QUERY_BLOCK), queries)
        )
        blocks.append(attended.reshape(query[first:end].shape))
    for first in range(looped, length, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, length)
        blocks.append(block(jnp.int32(first), query[first:end], key[:, :end], value[:, :end], before))
    return jnp.concatenate(blocks)
