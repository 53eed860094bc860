"""Attention over a chain of segments, joined by log-sum-exp.

A context is a chain: the query, then the shared part of a response, then a branch's own tokens.
Each link is attended to where it lies; nothing is concatenated, so nothing is copied per branch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a wholly masked part joins with weight 0 instead of nan


class Segment(NamedTuple):
    """Keys (rotated) and values of consecutive tokens, for all layers.

    key, value: [L, S, K, D] for L layers, S slots, K key-value heads, D per head; the engine adds
    batch axes. length: int32 [], slots that hold tokens; the rest is never read.
    (Any, since trees of axis numbers and of shapes have this form too.)
    """

    key: Any
    value: Any
    length: Any


class Part(NamedTuple):
    """What one layer attends to in one link: key, value [S, K, D]; mask bool [T, S] or [1, S]."""

    key: Array
    value: Array
    mask: Array


def attend(query: Array, parts: Sequence[Part]) -> Array:
    """Softmax attention over the union of `parts`, each computed where it lies.

    Scores, softmax and accumulation are float32 whatever the inputs are.

    Args:
      query: [T, H, D], H a multiple of the key-value heads; the heads of a group are adjacent.
      parts: at least one part; every query row sees at least one key over all parts.

    Returns:
      [T, H, D], dtype of `query`.
    """
    length, heads, head_dim = query.shape
    kv_heads = parts[0].key.shape[1]
    grouped = query.reshape(length, kv_heads, heads // kv_heads, head_dim)
    tops, totals, outputs = [], [], []
    for key, value, mask in parts:
        score = jnp.einsum("tkgd,skd->kgts", grouped, key, preferred_element_type=jnp.float32)
        score = jnp.where(mask, score * head_dim**-0.5, MASKED)
        top = jax.lax.stop_gradient(jnp.max(score, axis=-1))
        weight = jnp.where(mask, jnp.exp(score - top[..., None]), 0.0)
        tops.append(top)
        totals.append(jnp.sum(weight, axis=-1))
        outputs.append(
            jnp.einsum(
                "kgts,skd->kgtd",
                weight.astype(value.dtype),
                value,
                preferred_element_type=jnp.float32,
            )
        )
    peak = functools.reduce(jnp.maximum, tops)
    scales = [jnp.exp(top - peak) for top in tops]
    total = functools.reduce(jnp.add, [s * t for s, t in zip(scales, totals, strict=True)])
    scaled = [s[..., None] * o for s, o in zip(scales, outputs, strict=True)]
    joined = functools.reduce(jnp.add, scaled) / total[..., None]
    return jnp.einsum("kgtd->tkgd", joined).reshape(length, heads, head_dim).astype(query.dtype)
