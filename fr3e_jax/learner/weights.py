"""How much each token of a batch counts: the options of the loss that look at all of it at once.

On the host, from values that are equal on all processes, before the batch is cut into minibatches.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.aggregates import aggregate_shares
from fr3e_jax.algorithm.token_weights import (
    covariant_tokens,
    mismatch_ratio,
    mismatch_weight,
    uncertain_tokens,
)
from fr3e_jax.config import LossConfig, with_functions
from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.types import Bundle, StateGroups

NEAR = (0.9, 1.1)
"""Ratios of the learner's to the sampler's probability that rounding leaves; metrics count those outside."""


def weighed(
    learner: Learner, params: Params, groups: StateGroups, budget: int
) -> tuple[StateGroups, dict[str, float], list[Bundle]]:
    """Weigh the tokens of a batch by loss.mismatch, loss.top_entropy_share and loss.covariance_share.

    Args:
      learner: what will update, with the options of the loss.
      params: as TrainState holds them, before the update.
      groups: the batch.
      budget: optimizer.micro_tokens.

    Returns:
      (the batch, metrics of the mismatch, what ran through the model); the latter two are empty without one.
    """
    loss, metrics, bundles = learner.loss, dict[str, float](), list[Bundle]()
    if loss.mismatch != "none":
        logprob, bundles = learner_logprobs(learner, params, groups, budget)
        groups, metrics = with_mismatch(groups, logprob, loss)
    return with_masks(groups, loss), metrics, bundles


def real_tokens(groups: StateGroups) -> Bool[np.ndarray, "G M new"]:
    """Tell which of the tokens of rollouts are there."""
    return np.arange(groups.token.shape[2]) < groups.length[..., None]


def weighs_tokens(loss: LossConfig) -> bool:
    """Tell whether the options of the loss give weights to tokens."""
    return loss.top_entropy_share < 1 or loss.covariance_share > 0 or loss.mismatch != "none"


def with_masks(groups: StateGroups, loss: LossConfig) -> StateGroups:
    """Leave out tokens of a batch by their entropy and their covariance; as it was where no option asks."""
    real, trained = real_tokens(groups), []
    if not real.any():
        return groups
    if loss.top_entropy_share < 1:
        assert groups.entropy is not None
        trained.append(uncertain_tokens(groups.entropy, real, loss.top_entropy_share))
    if loss.covariance_share > 0:
        trained.append(~covariant_tokens(groups.logprob, groups.advantage, real, loss.covariance_share))
    return groups if not trained else times(groups, np.all(trained, axis=0))


def with_shares(groups: StateGroups, loss: LossConfig) -> StateGroups:
    """Give a minibatch, whole, the shares of `loss.aggregate`; as it was where every token counts alike.

    Raises:
      RuleError: the rule gives something else than it must.
    """
    # Rollouts are held with as many slots as rollout.max_response has tokens.
    aggregate, limit = with_functions(loss).aggregate, groups.token.shape[2]
    shares = aggregate_shares(aggregate, groups.length, groups.source[:, 0], limit)
    return groups if shares is None else dataclasses.replace(groups, share=shares)


def with_mismatch(
    groups: StateGroups, learner_logprob: Float32[np.ndarray, "G M new"], loss: LossConfig
) -> tuple[StateGroups, dict[str, float]]:
    """Weigh a batch by how the learner's log-probabilities differ from the sampler's.

    The policy's ratio is from now on taken to the learner's log-probabilities. The sampler's are those of the
    distribution that tokens were drawn from, with its temperature, top-k and top-p.

    Args:
      groups: the batch.
      learner_logprob: of `learner_logprobs`.
      loss: the options; `mismatch` is not none.

    Returns:
      (the batch, metrics): over its tokens, `mismatch/outside`, the share whose ratio is outside [0.9, 1.1],
      `mismatch/ratio_max`, and `mismatch/bounded`, the share that a bound truncated or masked.
    """
    real = real_tokens(groups)
    sampler = groups.logprob if groups.sampled_logprob is None else groups.sampled_logprob
    ratio = mismatch_ratio(learner_logprob, sampler, real)
    weight = mismatch_weight(ratio, loss.mismatch, loss.mismatch_low, loss.mismatch_high)
    metrics = {
        "mismatch/outside": ((ratio < NEAR[0]) | (ratio > NEAR[1]))[real].mean(),
        "mismatch/ratio_max": ratio[real].max(),
        "mismatch/bounded": (weight != ratio)[real].mean(),
    }
    groups = dataclasses.replace(times(groups, weight), logprob=np.where(real, learner_logprob, 0.0))
    return groups, {name: float(value) for name, value in metrics.items()}


def times(groups: StateGroups, weight: np.ndarray) -> StateGroups:
    """Multiply the weights of tokens."""
    weight = weight.astype(np.float32)
    return dataclasses.replace(groups, weight=weight if groups.weight is None else groups.weight * weight)


def learner_logprobs(
    learner: Learner, params: Params, groups: StateGroups, budget: int
) -> tuple[Float32[np.ndarray, "G M new"], list[Bundle]]:
    """Compute the log-probability of every token of a batch as the learner does, in one forward pass.

    Each prefix is computed once, as in updates.

    Args:
      learner: what will update.
      params: as TrainState holds them.
      groups: the batch, the same on every process.
      budget: optimizer.micro_tokens.

    Returns:
      (log-probabilities in nats, 0 where there is no token, the bundles that were computed).
    """
    placement, compute = learner.placement, learner.cast(params)
    bundles = bundles_of(groups, row_parts(placement.mesh), budget)
    chunks = []
    for bundle in bundles:
        trunks = placement.place_rows(bundle.trunks)
        policy = Prefilled(compute, learner.prefill(compute, trunks))
        for chunk, window in zip(bundle.chunks, bundle.window, strict=True):
            chunks.append(learner.logprobs(policy, placement.place_rows(chunk), window=window))
    logprob = np.zeros(groups.logprob.shape, np.float32)
    laid = [pair for bundle in bundles for pair in zip(bundle.chunks, bundle.origin, strict=True)]
    for computed, (chunk, origin) in zip(gather(chunks), laid, strict=True):
        for i in np.flatnonzero(origin[:, 0] >= 0):
            own = computed[i, chunk.start[i] : chunk.length[i]]
            logprob[origin[i, 0], origin[i, 1], : len(own)] = own
    return logprob, bundles
