"""Attention over a chain of segments, joined by log-sum-exp.

A context is a chain: the query, then the shared part of a response, then a branch's own tokens.
Each link is attended to where it lies; nothing is concatenated, so nothing is copied per branch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a wholly masked part joins with weight 0 instead of nan


class Segment(NamedTuple):
    """Keys (rotated) and values of consecutive tokens, for all layers.

    key, value: [L, K, S, D] for L layers, K key-value heads, S slots, D per head; axes of a batch
    follow L. length: int32 [], slots that hold tokens; the rest is never read.
    (Any, since trees of axis numbers and of shapes have this form too.)
    """

    key: Any
    value: Any
    length: Any


class Part(NamedTuple):
    """What one layer attends to in one link: key, value [K, S, D]; mask bool [T, S] or [1, S]."""

    key: Array
    value: Array
    mask: Array


class Partial(NamedTuple):
    """Attention to one part, not yet normalised, float32.

    top: [T, K, G], the largest score. total: [T, K, G], the sum of exp(score - top). output: [T, K, G, D],
    the values weighted by it. G query heads to a key-value head. Where nothing is attended to, top is
    `MASKED`, total and output are any numbers, and another part's larger top makes them join with weight 0.
    """

    top: Array
    total: Array
    output: Array


def attend_part(query: Array, part: Part) -> Partial:
    """Attention of queries [T, H, D] to one part.

    Scores, softmax and accumulation are float32 whatever the inputs are. H is a multiple of the key-value
    heads; the query heads of one are adjacent.
    """
    key, value, mask = part
    length, heads, head_dim = query.shape
    grouped = query.reshape(length, key.shape[0], heads // key.shape[0], head_dim)
    score = jnp.einsum("tkgd,ksd->kgts", grouped, key, preferred_element_type=jnp.float32)
    score = jnp.where(mask[None, None], score * head_dim**-0.5, MASKED)
    top = jax.lax.stop_gradient(jnp.max(score, axis=-1))
    weight = jnp.exp(score - top[..., None])  # 0 of what is masked, unless everything is: see Partial
    output = jnp.einsum(
        "kgts,ksd->kgtd", weight.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return Partial(*(jnp.moveaxis(x, 2, 0) for x in (top, jnp.sum(weight, axis=-1), output)))


def join(partials: Sequence[Partial]) -> Array:
    """Softmax attention over the union of parts, by log-sum-exp.

    Args:
      partials: of the same queries, with any leading axes; every query sees at least one key over all parts.

    Returns:
      float32 [..., H, D].
    """
    peak = functools.reduce(jnp.maximum, [partial.top for partial in partials])
    scales = [jnp.exp(partial.top - peak) for partial in partials]
    total = functools.reduce(jnp.add, [s * p.total for s, p in zip(scales, partials, strict=True)])
    scaled = [s[..., None] * p.output for s, p in zip(scales, partials, strict=True)]
    joined = functools.reduce(jnp.add, scaled) / total[..., None]
    return joined.reshape(*joined.shape[:-3], -1, joined.shape[-1])


def attend(query: Array, parts: Sequence[Part]) -> Array:
    """Attention of queries [T, H, D] to the union of `parts`: [T, H, D], dtype of `query`."""
    return join([attend_part(query, part) for part in parts]).astype(query.dtype)


class Prefix(NamedTuple):
    """What a sequence follows: one of n segments that several sequences share, or the beginning of one.

    key, value: [L, n, K, S, D], or [n, K, S, D] of a layer. which: int32 [], the segment. length: int32 [],
    slots of it that the sequence sees. Before n and before which and length there may be axes of a batch.
    """

    key: Any
    value: Any
    which: Any
    length: Any


Attend = Callable[[Array, Array, Array, Array, Prefix | None], Array]
"""`attend_sequence`, or what computes the same in another way, or for a batch of sequences."""

QUERY_BLOCK = 256  # tokens whose scores exist at a time


def attend_sequence(query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None) -> Array:
    """Causal attention of a sequence to its prefix and to itself.

    Scores exist for `QUERY_BLOCK` tokens at a time, also in the backward pass, which computes them again;
    what lies behind a block is not computed.

    Args:
      query: [T, H, D].
      key, value: [K, T, D].
      real: bool [T], False where there is only padding, which is seen by itself alone.
      prefix: of one layer, or None.

    Returns:
      [T, H, D], dtype of `query`.
    """
    length = query.shape[0]
    before: list[Part] = []
    if prefix is not None:
        held = jnp.arange(prefix.key.shape[2]) < prefix.length
        before = [Part(prefix.key[prefix.which], prefix.value[prefix.which], held[None])]

    @functools.partial(jax.checkpoint, static_argnums=0)
    def block(first: int, query: Array, key: Array, value: Array, before: list[Part]) -> Array:
        index, seen = first + jnp.arange(query.shape[0])[:, None], jnp.arange(key.shape[1])[None]
        mask = ((seen <= index) & real[None, : key.shape[1]]) | (seen == index)
        return attend(query, [*before, Part(key, value, mask)])

    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, length)
        blocks.append(block(first, query[first:end], key[:, :end], value[:, :end], before))
    return jnp.concatenate(blocks)
