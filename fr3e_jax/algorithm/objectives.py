"""What an update minimises, by name: clipped ratios of tokens, clipped weights, one ratio a sequence.

Each takes what `policy_loss` takes. The last axis is that of the tokens of one sequence, which here is a
partial rollout's own tokens. Weights of tokens and of sequences come in through the advantage: every
objective here is proportional to it for factors that are not negative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.loss import Scalar, clipped_surrogate, masked_sum, policy_loss
from fr3e_jax.algorithm.rules import Chosen, Rule
from fr3e_jax.types import AnyArray

ObjectiveFunction = Callable[..., tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]]
"""Takes and returns what `policy_loss` does; metrics are sums over tokens, divided by the denominator."""

Objective = Chosen[ObjectiveFunction]


def cispo_loss(
    logprob: Float32[AnyArray, "*axes"],
    old_logprob: Float32[AnyArray, "*axes"],
    advantage: Float32[AnyArray, "*#axes"],
    mask: Bool[AnyArray, "*axes"],
    denominator: Scalar,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Compute CISPO: -sum sg(clip(rho, 1 - low, 1 + high)) A log pi / denominator.

    MiniMax-M1 (arXiv 2506.13585), where sg stops the gradient. The importance weight is clipped, and no token
    loses its gradient, as rare tokens do under `policy_loss`. Its authors have no lower bound (clip_low 1)
    and tune the upper one alone. The arguments and metrics are those of `policy_loss`; `dual_clip` is not
    read, and the clip fractions are of tokens whose weight a bound decided, whatever their advantage's sign.
    """
    log_ratio = jnp.where(mask, logprob - old_logprob, 0.0)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantage * jnp.where(mask, logprob, 0.0)
    counts = mask & (advantage != 0)
    metrics = {
        "clip_low": masked_sum(weight > ratio, counts) / denominator,
        "clip_high": masked_sum(weight < ratio, counts) / denominator,
        "approx_kl": masked_sum(-log_ratio, mask) / denominator,
    }
    return masked_sum(loss, mask) / denominator, metrics


def gspo_loss(
    logprob: Float32[AnyArray, "*rows T"],
    old_logprob: Float32[AnyArray, "*rows T"],
    advantage: Float32[AnyArray, "*#rows #T"],
    mask: Bool[AnyArray, "*rows T"],
    denominator: Scalar,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Compute GSPO: `policy_loss` with s_i = exp(mean over t of log rho_it) in place of every token's rho.

    arXiv 2507.18071 (there with sequence mean, and bounds of 3e-4 and 4e-4). The gradient is that of
    GSPO-token in the same paper: each token's share of the gradient of s_i stays with that token, so that one
    that a weight of 0 leaves out has none. Where all tokens of a sequence count alike, it is that of s_i. The
    arguments and metrics are those of `policy_loss`.
    """
    log_ratio = jnp.where(mask, logprob - old_logprob, 0.0)
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / length
    # The value is the mean, exactly, and the gradient that of the token's own ratio.
    token = jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))
    token = jnp.where(mask, token, 0.0)
    return clipped_surrogate(token, advantage, mask, denominator, clip_low, clip_high, dual_clip)


OBJECTIVES: dict[str, Rule[ObjectiveFunction]] = {
    "clip": Rule(policy_loss, "PPO with its own lower and upper clip (paper)"),
    "cispo": Rule(cispo_loss, "clipped importance weights without a gradient (MiniMax-M1, 2506.13585)"),
    "gspo": Rule(gspo_loss, "one ratio a sequence, with bounds of its own (2507.18071)"),
}
