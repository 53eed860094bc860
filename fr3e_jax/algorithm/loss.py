"""The objective: clip-higher surrogate with optional dual clip, and KL to a reference.

Every mean is a sum divided by a denominator that the caller hands in, so that micro-batches and
hosts share one: the number of trained tokens in the whole global batch.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from fr3e_jax.algorithm.rules import Chosen, Rule

PolicyLossFunction = Callable[..., tuple[Array, dict[str, Array]]]
"""Arguments and result are those of `policy_loss`; metrics are sums over tokens, over the denominator."""

PolicyLoss = Chosen[PolicyLossFunction]


def masked_sum(x: Array, mask: Array) -> Array:
    """Sum of x where mask holds, float32; a masked-out inf or nan does not count.

    Args:
      x: float [...].
      mask: bool [...].

    Returns:
      float32 [].
    """
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))


def policy_loss(
    logprob: Array,
    old_logprob: Array,
    advantage: Array,
    mask: Array,
    denominator: Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Clip-higher PPO, token mean: -sum min(rho A, clip(rho, 1 - low, 1 + high) A) / denominator.

    Paper (0.22 and 0.28); the released script has 0.2 and 0.3. With `dual_clip` c the
    loss of a token with negative advantage is at most -c A (release: c = 10).

    Args:
      logprob: float32 [...], of the trained tokens under the policy.
      old_logprob: float32 [...], as recorded while sampling.
      advantage: float32 [...].
      mask: bool [...], the tokens that are trained.
      denominator: float32 [], trained tokens of the whole batch.
      clip_low: the ratio's lower bound is 1 - clip_low.
      clip_high: the ratio's upper bound is 1 + clip_high.
      dual_clip: bound c > 1, or None.

    Returns:
      (loss float32 [], metrics): `clip_low`, `clip_high`, `clip_dual` are the fractions of tokens
      whose loss the bound decided, `approx_kl` is the mean of -log ratio, all over `denominator`.
    """
    log_ratio = jnp.where(mask, logprob - old_logprob, 0.0)
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


POLICY_LOSSES: dict[str, Rule[PolicyLossFunction]] = {
    "clip": Rule(policy_loss, "PPO with its own lower and upper clip, token mean (paper)"),
}


def kl_k3(logprob: Array, reference_logprob: Array) -> Array:
    """exp(d) - d - 1 with d = log pi_ref - log pi: the unbiased, non-negative estimate of KL(pi, pi_ref).

    Args:
      logprob: float32 [...].
      reference_logprob: float32 [...].

    Returns:
      float32 [...], nats.
    """
    difference = reference_logprob - logprob
    return jnp.expm1(difference) - difference
