"""One optimizer step on rows in the flat form: each continuation with its own prefix.

This form repeats every prefix; it is the slow, obvious reference of what an update computes.
Micro-batches are scanned with one denominator, the trained tokens of the whole minibatch over all
devices, so their number and size do not change the gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from fr3e_jax.algorithm.loss import kl_k3, masked_sum, policy_loss
from fr3e_jax.config import LossConfig
from fr3e_jax.learner.state import TrainState, apply_gradient
from fr3e_jax.models.qwen2 import Params, Qwen2
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import Batch

SUMMED = ("loss", "clip_low", "clip_high", "clip_dual", "approx_kl", "reference_kl", "abs_log_ratio")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Learner:
    """The update of one model on one mesh."""

    graph: nnx.GraphDef[Qwen2]
    placement: Placement
    optimizer: optax.GradientTransformation
    loss: LossConfig
    compute_dtype: Any
    logit_chunk: int  # tokens of a row whose logits exist at a time
    remat: bool  # recompute each layer in the backward pass

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def update(
        self, state: TrainState, batch: Batch, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Take one optimizer step, or none where loss or gradient are not finite.

        Args:
          state: donated.
          batch: leaves [micro-batches, rows, ...], rows dividing by the mesh's row parts.
          reference: parameters of the reference policy, where `loss.kl_coefficient` is above 0.

        Returns:
          (the new state, metrics float32 []): those of `policy_loss`, `loss`, `reference_kl`,
          `grad_norm`, `ratio_max`, `ratio_min`, `abs_log_ratio`, the mean |logprob - old_logprob|, and those
          of `apply_gradient`.
        """
        gradient, metrics = self.gradient(state.params, batch, reference)
        state, applied = apply_gradient(self.optimizer, state, gradient, metrics["loss"])
        return state, metrics | applied

    @functools.partial(jax.jit, static_argnames=("self",))
    def gradient(
        self, params: Params, batch: Batch, reference: Params | None = None
    ) -> tuple[Params, dict[str, Array]]:
        """Gradient of the loss and its metrics, accumulated over the micro-batches of `batch`."""
        # An empty batch has loss 0, not 0 / 0.
        denominator = jnp.maximum(jnp.sum(trained(batch)), 1).astype(jnp.float32)
        differentiate = jax.grad(micro_loss, argnums=1, has_aux=True)

        def accumulate(total: Params, micro: Batch) -> tuple[Params, dict[str, Array]]:
            gradient, metrics = differentiate(self, params, reference, micro, denominator)
            return jax.tree.map(jnp.add, total, gradient), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, metrics = jax.lax.scan(accumulate, zeros, batch)
        reduced = {name: jnp.sum(value) for name, value in metrics.items() if name in SUMMED}
        reduced["ratio_max"] = jnp.max(metrics["ratio_max"])
        reduced["ratio_min"] = jnp.min(metrics["ratio_min"])
        reduced["grad_norm"] = optax.tree.norm(gradient)
        return gradient, reduced


def token_logprob(
    model: Qwen2, placement: Placement, token: Array, length: Array, logit_chunk: int, remat: bool
) -> Array:
    """log pi(token_t | token_<t) of every token of every row, without [T, V] logits.

    Args:
      token: int32 [rows, T]. length: int32 [rows].
      logit_chunk: tokens of a row whose logits exist at a time.
      remat: recompute each layer in the backward pass.

    Returns:
      float32 [rows, T], 0 at t = 0, meaningless from `length` on.
    """
    size = token.shape[1]
    chunk = min(logit_chunk, size)
    chunks = -(-size // chunk)
    padding = chunks * chunk - size

    @jax.checkpoint
    def chunk_logprob(hidden: Array, target: Array) -> Array:
        logits = model.logits(hidden, placement.shard)
        drawn = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return drawn - jax.nn.logsumexp(logits, axis=1)

    def row(token: Array, length: Array) -> Array:
        hidden, _ = model(token, jnp.arange(size), length, placement.shard, remat)
        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
        target = jnp.pad(jnp.roll(token, -1), (0, padding)).reshape(chunks, chunk)
        _, logprob = jax.lax.scan(lambda _, piece: (None, chunk_logprob(*piece)), None, (hidden, target))
        return jnp.roll(logprob.reshape(-1)[:size], 1).at[0].set(0.0)

    return jax.vmap(row, spmd_axis_name=BATCH_AXES)(token, length)


def trained(batch: Batch) -> Array:
    """Which tokens carry loss: those of the continuation. bool, shape of `batch.token`."""
    index = jnp.arange(batch.token.shape[-1])
    return (index >= batch.start[..., None]) & (index < batch.length[..., None])


def micro_loss(
    learner: Learner,
    params: Params,
    reference: Params | None,
    micro: Batch,
    denominator: Array,
) -> tuple[Array, dict[str, Array]]:
    """This micro-batch's share of the loss, and of the metrics."""
    mask = trained(micro)

    def logprob_under(params: Params) -> Array:
        compute = jax.tree.map(lambda x: x.astype(learner.compute_dtype), params)
        model = nnx.merge(learner.graph, compute)
        return token_logprob(
            model, learner.placement, micro.token, micro.length, learner.logit_chunk, learner.remat
        )

    logprob = logprob_under(params)
    advantage = micro.advantage[:, None]
    settings = learner.loss
    loss, metrics = policy_loss(
        logprob,
        micro.old_logprob,
        advantage,
        mask,
        denominator,
        settings.clip_low,
        settings.clip_high,
        settings.dual_clip,
    )
    if reference is not None:
        kl = kl_k3(logprob, jax.lax.stop_gradient(logprob_under(reference)))
        metrics["reference_kl"] = masked_sum(kl, mask) / denominator
        loss = loss + settings.kl_coefficient * metrics["reference_kl"]
    log_ratio = jnp.where(mask, logprob - micro.old_logprob, 0.0)
    metrics["abs_log_ratio"] = masked_sum(jnp.abs(log_ratio), mask) / denominator
    metrics["ratio_max"] = jnp.exp(jnp.max(log_ratio))
    metrics["ratio_min"] = jnp.exp(jnp.min(log_ratio))
    metrics["loss"] = loss
    return loss, metrics
