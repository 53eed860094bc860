"""Which tokens an update is taken on, and how much each counts, beside its advantage.

The functions here run on the host over the whole batch of a step, so that there is one threshold for all
minibatches, micro-batches and hosts. Tokens [G, M, new] are those of G states with M rollouts; `real` says
which are there.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32

Mismatch = Literal["none", "truncate", "mask"]


def highest(
    score: Float[np.ndarray, "*axes"], real: Bool[np.ndarray, "*axes"], share: float
) -> Bool[np.ndarray, "*axes"]:
    """Choose the tokens with the highest scores, a share of those that are there, one at least.

    The number is rounded to the nearest. Of equal scores, the ones that come first in the arrays are chosen.
    """
    count = min(max(round(share * int(real.sum())), 1), int(real.sum()))
    order = np.argsort(np.where(real, -score, np.inf), axis=None, kind="stable")
    chosen = np.zeros(score.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(score.shape)


def uncertain_tokens(
    entropy: Float32[np.ndarray, "G M new"], real: Bool[np.ndarray, "G M new"], share: float
) -> Bool[np.ndarray, "G M new"]:
    """Choose the tokens of highest entropy H_t, the `share` rho of all, which alone are trained.

    Beyond the 80/20 Rule (arXiv 2506.01939): rho = 0.2. Entropies are those recorded while sampling.
    """
    return highest(entropy, real, share)


def covariant_tokens(
    logprob: Float32[np.ndarray, "G M new"],
    advantage: Float32[np.ndarray, "G M"],
    real: Bool[np.ndarray, "G M new"],
    share: float,
) -> Bool[np.ndarray, "G M new"]:
    """Choose the tokens with the highest (log pi_t - mean)(A_t - mean), which are not trained.

    Clip-Cov (The Entropy Mechanism, arXiv 2505.22617): the fall of the entropy is the covariance of
    log-probability and advantage, and few tokens make most of it. Its authors draw the share r = 2e-4 at
    random from the tokens between two bounds (1 and 5); here it is those with the highest. Means are over all
    tokens that are there.
    """
    spread = np.broadcast_to(advantage.astype(np.float64)[..., None], real.shape)
    above = [x - x[real].mean() for x in (logprob.astype(np.float64), spread)]
    return highest(above[0] * above[1], real, share)


def mismatch_ratio(
    learner: Float32[np.ndarray, "G M new"],
    sampler: Float32[np.ndarray, "G M new"],
    real: Bool[np.ndarray, "G M new"],
) -> Float[np.ndarray, "G M new"]:
    """Compute pi_learner / pi_sampler of each token, 1 where there is none, both by the same parameters.

    Args:
      learner: log-probability that the learner computes, nats.
      sampler: that of the distribution that the token was drawn from.
      real: which tokens are there.
    """
    return np.exp(np.where(real, learner.astype(np.float64) - sampler, 0.0))


def mismatch_weight(
    ratio: Float[np.ndarray, "G M new"], mismatch: Mismatch, low: float, high: float
) -> Float[np.ndarray, "G M new"]:
    """Weigh tokens by the ratio of the learner's probability to the sampler's, within bounds.

    `truncate`: min(ratio, high), truncated importance sampling (TIS, Yao et al. 2025: 2). `mask`: the ratio
    from `low` to `high`, and 0 outside (IcePop, arXiv 2510.18855: 0.5 and 5).
    """
    if mismatch == "truncate":
        return np.minimum(ratio, high)
    return np.where((ratio >= low) & (ratio <= high), ratio, 0.0)
