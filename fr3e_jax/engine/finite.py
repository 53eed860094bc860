"""The check that logits were finite while rollouts were sampled."""

import numpy as np

from fr3e_jax.types import Rollouts


class NotFiniteError(RuntimeError):
    """Tokens were drawn from logits that are nan or infinite; the message says how many, and what to try."""


def require_finite(rollouts: Rollouts, where: str) -> None:
    """Refuse rollouts in which the log-probability or entropy of a token is not finite.

    Args:
      rollouts: on the host, [N, C, S] leaves.
      where: the stage that sampled them, for the message.

    Raises:
      NotFiniteError: with the share of such tokens.
    """
    drawn = np.arange(rollouts.token.shape[-1]) < rollouts.length[..., None]
    bad = drawn & ~(np.isfinite(rollouts.logprob) & np.isfinite(rollouts.entropy))
    if bad.any():
        raise NotFiniteError(
            f"{where}: {bad.sum() / drawn.sum():.1%} of {drawn.sum():,} tokens were drawn from logits that "
            "are not finite. Compute in float32 (compute_dtype), or take other weights: an earlier "
            "checkpoint, or a run with a lower optimizer.learning_rate"
        )
