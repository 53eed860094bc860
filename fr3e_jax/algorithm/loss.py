"""The paper's objective, the clip-higher surrogate with optional dual clip, and KL to a reference.

Every mean is a sum divided by a denominator that the caller hands in, so that micro-batches and
hosts share one: the number of trained tokens in the whole global batch.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Real

from fr3e_jax.types import AnyArray

Scalar = float | Real[AnyArray, ""]


def masked_sum(
    x: Float[AnyArray, "*axes"] | Bool[AnyArray, "*axes"], mask: Bool[AnyArray, "*axes"]
) -> Float32[Array, ""]:
    """Sum x where mask holds; a masked-out inf or nan does not count."""
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))


def policy_loss(
    logprob: Float32[AnyArray, "*axes"],
    old_logprob: Float32[AnyArray, "*axes"],
    advantage: Float32[AnyArray, "*#axes"],
    mask: Bool[AnyArray, "*axes"],
    denominator: Scalar,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Compute clip-higher PPO, token mean: -sum min(rho A, clip(rho, 1 - low, 1 + high) A) / denominator.

    Paper (0.22 and 0.28); the released script has 0.2 and 0.3. With `dual_clip` c the
    loss of a token with negative advantage is at most -c A (release: c = 10).

    Args:
      logprob: of the trained tokens under the policy, nats.
      old_logprob: as recorded while sampling, nats.
      advantage: one for each token, or one for all of a row.
      mask: the tokens that are trained.
      denominator: trained tokens of the whole batch.
      clip_low: the ratio's lower bound is 1 - clip_low.
      clip_high: the ratio's upper bound is 1 + clip_high.
      dual_clip: bound c > 1, or None.

    Returns:
      (loss, metrics): `clip_low`, `clip_high`, `clip_dual` are the fractions of tokens
      whose loss the bound decided, `approx_kl` is the mean of -log ratio, all over `denominator`.
    """
    log_ratio = jnp.where(mask, logprob - old_logprob, 0.0)
    return clipped_surrogate(log_ratio, advantage, mask, denominator, clip_low, clip_high, dual_clip)


def clipped_surrogate(
    log_ratio: Float32[AnyArray, "*axes"],
    advantage: Float32[AnyArray, "*#axes"],
    mask: Bool[AnyArray, "*axes"],
    denominator: Scalar,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Compute `policy_loss` from log rho, which is 0 outside of the mask; the other arguments are its."""
    ratio = jnp.exp(log_ratio)
    free = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(free, clipped)
    bound = mask & (clipped > free)
    dual = jnp.zeros_like(mask)
    if dual_clip is not None:
        ceiling = -advantage * dual_clip
        dual = mask & (advantage < 0) & (loss > ceiling)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, ceiling), loss)
    metrics = {
        "clip_low": masked_sum(bound & (advantage < 0), mask) / denominator,
        "clip_high": masked_sum(bound & (advantage >= 0), mask) / denominator,
        "clip_dual": masked_sum(dual, mask) / denominator,
        "approx_kl": masked_sum(-log_ratio, mask) / denominator,
    }
    return masked_sum(loss, mask) / denominator, metrics


def kl_k3(
    logprob: Float32[AnyArray, "*axes"], reference_logprob: Float32[AnyArray, "*axes"]
) -> Float32[Array, "*axes"]:
    """Estimate KL(pi, pi_ref) of each token, in nats, by exp(d) - d - 1 with d = log pi_ref - log pi.

    The estimate is unbiased and not negative.
    """
    difference = reference_logprob - logprob
    return jnp.expm1(difference) - difference
