"""Attention of a sequence to its prefix and to itself by the splash kernel of jax, for TPUs.

No score leaves the chip's own memory, forward or backward.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Bool, Float

from fr3e_jax.models.attention import Prefix

SPLASH_LANES = 128  # the kernel's blocks are multiples of it
SPLASH_BLOCK = 512  # the most tokens in a block; a block of scores is this square, float32
PADDING, REAL, HIDDEN = 0, 1, 2  # who sees whom: a token sees those of its own kind


def splash_sequence(
    query: Float[Array, "T H D"],
    key: Float[Array, "K T D"],
    value: Float[Array, "K T D"],
    real: Bool[Array, " T"],
    prefix: Prefix | None,
    interpret: bool = False,
) -> Float[Array, "T H D"]:
    """Compute `attend_sequence` by one kernel, on one device.

    One call attends to prefix and sequence, not two that are joined: the kernel's derivative is of its output
    alone, and joining needs that of the log-sum-exp. So the prefix is copied to every sequence. Slots of it
    that are not seen cost what seen ones do.

    Args:
      query: any T. Multiplied by D**-0.5 before the kernel, so rounded once more than in `attend_sequence`
        unless D is a power of 4.
      key, value: dtype of `query`; K divides H.
      real: False where there is only padding, which sees padding alone.
      prefix: of one layer, or None.
      interpret: run the kernel as ordinary operations, which any backend can.

    Returns:
      The attention, dtype of `query`. Differentiable once, in query, key, value and the prefix's key and
      value.
    """
    length, heads, head_dim = query.shape
    kind = jnp.where(real, REAL, PADDING)
    seen = kind
    before = 0
    if prefix is not None:
        before = prefix.key.shape[2]
        key = jnp.concatenate([prefix.key[prefix.which].astype(key.dtype), key], axis=1)
        value = jnp.concatenate([prefix.value[prefix.which].astype(value.dtype), value], axis=1)
        seen = jnp.concatenate([jnp.where(jnp.arange(before) < prefix.length, REAL, HIDDEN), kind])

    rows = block_of(length)
    padded = round_up(length, rows)
    columns = block_of(before + padded)
    slots = round_up(before + padded, columns)
    # What fills up the last blocks is padding of the sequence: an added query sees at least itself, and
    # an added key lies behind all real queries.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    attend = make_splash_mha(
        MultiHeadMask([CausalMask((padded, slots), before)] * heads),
        block_sizes=block_sizes(rows, columns),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    attended = attend(
        fill(jnp.swapaxes(scaled, 0, 1), 1, padded),
        fill(key, 1, slots),
        fill(value, 1, slots),
        SegmentIds(fill(kind, 0, padded), fill(seen, 0, slots)),
    )
    return jnp.swapaxes(attended[:, :length], 0, 1)


def block_of(size: int) -> int:
    """Compute the tokens of a block when `size` tokens are split into as few equal blocks as possible."""
    blocks = pallas.cdiv(size, SPLASH_BLOCK)
    return round_up(pallas.cdiv(size, blocks), SPLASH_LANES)


def round_up(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return pallas.cdiv(size, multiple) * multiple


def fill(x: Array, axis: int, size: int) -> Array:
    """Pad x with zeros at the end of one axis, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def block_sizes(rows: int, columns: int) -> Any:
    """Choose the same blocks forward and backward.

    The backward pass is two kernels: the one that does both holds a gradient of the queries for every block
    of keys.
    """
    return BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
