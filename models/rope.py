"""Rotary position embedding, plain and with YaRN scaling, as Qwen2.5's documentation sets it."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071); names and meaning are those of `rope_scaling` in config.json."""

    factor: float
    """The new context over the old one."""
    original_max_position_embeddings: int
    """The old context, tokens."""
    attention_factor: float
    """Scale of cosine and sine."""
    beta_fast: float = 32.0
    """Turns over the old context from which a frequency is kept."""
    beta_slow: float = 1.0
    """Turns over the old context up to which a frequency is divided by `factor`."""
    truncate: bool = True
    """Whether the bounds of the ramp between the two are rounded to whole dimensions."""


def attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Compute the scale of cosine and sine that YaRN recommends (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(head_dim: int, theta: float, yarn: Yarn | None) -> Float32[np.ndarray, " pairs"]:
    """Compute radians per position of each pair of dimensions."""
    half = head_dim // 2
    kept = theta ** -(np.arange(half) / half)
    if yarn is None:
        return kept.astype(np.float32)

    def dimension(turns: float) -> float:
        """Find the pair that makes `turns` turns over the old context."""
        return (
            half * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return (kept * (1 - ramp) + kept / yarn.factor * ramp).astype(np.float32)


def rotate(
    x: Float[Array, "T heads D"], position: Int[Array, " T"], theta: float, yarn: Yarn | None = None
) -> Float[Array, "T heads D"]:
    """Apply the rotary embedding, the two halves of a head paired; computed in float32, returned as `x` is.

    Args:
      x: queries or keys.
      position: of each token in its sequence.
      theta: base of the frequencies.
      yarn: scaling of the context, or None.
    """
    angle = position.astype(jnp.float32)[:, None, None] * frequencies(x.shape[-1], theta, yarn)[None, None]
    scale = 1.0 if yarn is None else yarn.attention_factor
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
