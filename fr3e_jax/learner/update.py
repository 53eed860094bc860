"""One optimizer step, with every prefix computed once, forward and backward.

Rows are continuations. What they follow is a trunk: the query and the base response that they branch from.
The trunks of a bundle are prefilled, and their KV cache is kept. The rows run against it, chunk by chunk, and
each chunk adds to the gradient of the cache. That gradient then goes back through the trunks. For this they
run once more, so that nothing but the KV cache is held meanwhile. The result equals the flat form, in which
every row has its whole prefix and there are no trunks.

All chunks share one denominator, the trained tokens of the whole minibatch over all devices, so their number
and size do not change the gradient. Memory is bounded by the largest chunk and a bundle's trunks.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float32

from fr3e_jax.algorithm.loss import kl_k3, masked_sum
from fr3e_jax.algorithm.objectives import OBJECTIVES, gspo_loss
from fr3e_jax.algorithm.rules import function_of, of_shape, pair_of
from fr3e_jax.config import LossConfig
from fr3e_jax.learner.forward import (
    Forward,
    Prefilled,
    TrunkCaches,
    placed_as_caches,
    row_statistics,
    trained,
    trunk_caches,
    within_window,
)
from fr3e_jax.learner.state import TrainState, apply_gradient
from fr3e_jax.models.decoder import Params, logical_axes
from fr3e_jax.types import AnyArray, Batch, Bundle, Trunks

UpdateMetrics = dict[str, Float32[AnyArray, ""]]

MAXIMA = ("ratio_max", "abs_log_ratio_max")  # metrics of chunks are added up, but for these
MINIMA = ("ratio_min",)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Learner(Forward):
    """The update of one model on one mesh."""

    optimizer: optax.GradientTransformation
    loss: LossConfig

    def update(
        self,
        state: TrainState,
        bundles: Sequence[Bundle],
        reference: Params | None = None,
        entropy_coefficient: float | None = None,
    ) -> tuple[TrainState, UpdateMetrics]:
        """Take one optimizer step, or none where loss or gradient are not finite.

        Args:
          state: donated.
          bundles: the minibatch, host arrays, the same on every process.
          reference: parameters of the reference policy, where `loss.kl_coefficient` is above 0.
          entropy_coefficient: weight of the entropy where it is adapted; by default that of `loss`.

        Returns:
          (the new state, metrics): those of the policy loss, `loss`, `reference_kl`, `entropy` (where its
          coefficient is above 0, or adapted), `grad_norm`, `ratio_mean`, `ratio_max`, `ratio_min`,
          `abs_log_ratio` and `abs_log_ratio_max`, the mean and largest |logprob - old_logprob|, and those of
          `apply_gradient`.
        """
        gradient, metrics = self.gradient(state.params, bundles, reference, entropy_coefficient)
        state, applied = self.apply(state, gradient, self.placement.place(metrics["loss"]))
        return state, metrics | applied

    def gradient(
        self,
        params: Params,
        bundles: Sequence[Bundle],
        reference: Params | None = None,
        entropy_coefficient: float | None = None,
    ) -> tuple[Params, UpdateMetrics]:
        """Compute the gradient of the loss, float32, and metrics, over all bundles and chunks."""
        # An empty batch has loss 0, not 0 / 0.
        trained_tokens = sum(int((c.length - c.start).sum()) for bundle in bundles for c in bundle.chunks)
        denominator = self.placement.place(np.float32(max(trained_tokens, 1)))
        bonus = None if entropy_coefficient is None else self.placement.place(np.float32(entropy_coefficient))
        compute, gradient = self.cast_and_zero_gradient(params)
        reference_compute = None if reference is None else self.cast(reference)
        chunk_metrics: list[UpdateMetrics] = []
        for bundle in bundles:
            trunks = caches = reference_caches = cache_gradient = None
            if bundle.trunks is not None:
                trunks = self.placement.place_rows(bundle.trunks)
                caches, cache_gradient = self.prefill_and_zero_gradient(compute, trunks)
                if reference_compute is not None:
                    reference_caches = self.prefill(reference_compute, trunks)
            policy = Prefilled(compute, caches)
            other = None if reference_compute is None else Prefilled(reference_compute, reference_caches)
            for chunk, window in zip(bundle.chunks, bundle.window, strict=True):
                rows = self.placement.place_rows(chunk)
                gradient, cache_gradient, metrics = self.add_chunk(
                    gradient, cache_gradient, policy, other, rows, denominator, bonus, window=window
                )
                chunk_metrics.append(metrics)
            if trunks is not None:
                gradient = self.add_trunks(gradient, cache_gradient, compute, trunks)
        return gradient, self.summarize(chunk_metrics, gradient)

    @functools.partial(jax.jit, static_argnames=("self",))
    def cast_and_zero_gradient(self, params: Params) -> tuple[Params, Params]:
        """Make the parameters in the compute dtype, and a gradient of zeros, float32."""
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return self.cast(params), self.placed_as_params(zeros)

    @functools.partial(jax.jit, static_argnames=("self",))
    def cast(self, params: Params) -> Params:
        """Cast parameters to the compute dtype."""
        return self.placed_as_params(jax.tree.map(lambda x: x.astype(self.compute_dtype), params))

    def placed_as_params(self, tree: Params) -> Params:
        """Constrain a tree of the parameters' form to lie as they do.

        Without it XLA would hold a whole gradient on every device. And since arguments would not lie as
        results do, it would compile every program twice.
        """
        axes = logical_axes(nnx.merge(self.graph, tree).config)
        return jax.tree.map(lambda x, names: self.placement.shard(x, *names), tree, axes)

    @functools.partial(jax.jit, static_argnames=("self",))
    def prefill(self, compute: Params, trunks: Trunks) -> TrunkCaches:
        """Compute keys and values of the trunks, each once."""
        return trunk_caches(self, compute, trunks)

    @functools.partial(jax.jit, static_argnames=("self",))
    def prefill_and_zero_gradient(self, compute: Params, trunks: Trunks) -> tuple[TrunkCaches, TrunkCaches]:
        """Compute keys and values of the trunks, and make a gradient of zeros for them, float32."""
        caches = self.prefill(compute, trunks)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), caches)
        return caches, placed_as_caches(self, zeros)

    @functools.partial(jax.jit, static_argnames=("self", "window"))
    def logprobs(self, policy: Prefilled, rows: Batch, *, window: int) -> Float32[Array, "rows T"]:
        """Compute the log-probabilities of a chunk's tokens, without a gradient; others as in `add_chunk`."""
        return row_statistics(self, within_window(policy, window), rows, False)[0]

    @functools.partial(
        jax.jit, static_argnames=("self", "window"), donate_argnames=("gradient", "cache_gradient")
    )
    def add_chunk(
        self,
        gradient: Params,
        cache_gradient: TrunkCaches | None,
        policy: Prefilled,
        reference: Prefilled | None,
        rows: Batch,
        denominator: Float32[Array, ""],
        entropy_coefficient: Float32[Array, ""] | None = None,
        *,
        window: int,
    ) -> tuple[Params, TrunkCaches | None, UpdateMetrics]:
        """Add the share of a chunk to the gradients of the parameters and of the trunks' KV cache.

        Args:
          gradient: of the parameters so far; donated.
          cache_gradient: of the KV cache so far, None in the flat form; donated.
          policy: what the gradient is taken at.
          reference: of the reference policy, or None.
          rows: the chunk.
          denominator: trained tokens of the minibatch.
          entropy_coefficient: weight of the entropy where it is adapted, else None.
          window: slots of the trunks that the rows see.

        Returns:
          (gradient, cache_gradient, the chunk's share of the metrics).
        """
        seen = functools.partial(within_window, window=window)
        differentiate = jax.grad(chunk_loss, argnums=1, has_aux=True)
        other = None if reference is None else seen(reference)
        change, metrics = differentiate(self, seen(policy), other, rows, denominator, entropy_coefficient)
        gradient = self.placed_as_params(added(gradient, change.params))
        if cache_gradient is not None:
            cache_gradient = jax.tree.map(
                lambda total, x: total.at[..., :window, :].add(x.astype(jnp.float32)),
                cache_gradient,
                change.caches,
            )
            cache_gradient = placed_as_caches(self, cache_gradient)
        return gradient, cache_gradient, metrics

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("gradient",))
    def add_trunks(
        self, gradient: Params, cache_gradient: TrunkCaches, compute: Params, trunks: Trunks
    ) -> Params:
        """Add the share of the trunks to the gradient, once that of their KV cache is complete."""
        _, pullback = jax.vjp(lambda compute: self.prefill(compute, trunks), compute)
        (change,) = pullback(jax.tree.map(lambda x: x.astype(self.compute_dtype), cache_gradient))
        return self.placed_as_params(added(gradient, change))

    @functools.partial(jax.jit, static_argnames=("self",))
    def norm(self, gradient: Params) -> Float32[Array, ""]:
        """Compute the global norm of a gradient."""
        return optax.tree.norm(gradient)

    def summarize(self, chunks: list[UpdateMetrics], gradient: Params) -> UpdateMetrics:
        """Reduce the metrics of chunks to those of the minibatch.

        It happens on the host, since a program would be compiled anew for every number of chunks.
        """
        reduced: UpdateMetrics = {"grad_norm": self.norm(gradient)}
        chunks = jax.device_get(chunks)
        for name in chunks[0] if chunks else ():
            reduce = np.max if name in MAXIMA else np.min if name in MINIMA else np.sum
            reduced[name] = reduce(np.stack([metrics[name] for metrics in chunks]))
        return reduced

    def apply(
        self, state: TrainState, gradient: Params, loss: Float32[Array, ""]
    ) -> tuple[TrainState, UpdateMetrics]:
        """Take the optimizer's step; the state keeps its shardings, or programs would be compiled again."""
        leaves, tree = jax.tree.flatten(state)
        return applying(self.optimizer, tree, tuple(x.sharding for x in leaves))(state, gradient, loss)


def added(gradient: Params, change: Params) -> Params:
    """Add a change of any dtype to a gradient, float32."""
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), gradient, change)


@functools.cache
def applying(optimizer: optax.GradientTransformation, tree: Any, shardings: tuple[Any, ...]) -> Any:
    """Make the program of `apply_gradient` whose state has these shardings, leaf by leaf."""

    def apply(
        state: TrainState, gradient: Params, loss: Float32[Array, ""]
    ) -> tuple[TrainState, UpdateMetrics]:
        return apply_gradient(optimizer, state, gradient, loss)

    return jax.jit(apply, donate_argnums=0, out_shardings=(jax.tree.unflatten(tree, shardings), None))


def chunk_loss(
    learner: Learner,
    policy: Prefilled,
    reference: Prefilled | None,
    rows: Batch,
    denominator: Float32[Array, ""],
    entropy_coefficient: Float32[Array, ""] | None = None,
) -> tuple[Float32[Array, ""], UpdateMetrics]:
    """Compute a chunk's share of the loss and of the metrics; the arguments are those of `add_chunk`."""
    mask, settings = trained(rows), learner.loss
    wants_entropy = settings.entropy_coefficient != 0 or settings.entropy_target is not None
    logprob, entropy = row_statistics(learner, policy, rows, wants_entropy)
    advantage = weighted(rows.advantage[:, None], rows)
    if rows.weight is not None:
        advantage = advantage * rows.weight
    objective = function_of(OBJECTIVES, settings.objective)
    found = objective(logprob, rows.old_logprob, advantage, mask, denominator, **clip_settings(settings))
    loss, loss_metrics = pair_of(found, "an objective gives (loss, metrics)")
    loss, metrics = of_shape(loss, (), "a loss, one number,"), dict(loss_metrics)
    if rows.weight is not None:
        metrics["left_out"] = masked_sum(rows.weight == 0, mask) / denominator
    if reference is not None:
        reference_logprob = jax.lax.stop_gradient(row_statistics(learner, reference, rows, False)[0])
        kl = kl_k3(logprob, reference_logprob)
        metrics["reference_kl"] = masked_sum(kl, mask) / denominator
        loss = loss + settings.kl_coefficient * (masked_sum(weighted(kl, rows), mask) / denominator)
    if wants_entropy:
        metrics["entropy"] = masked_sum(entropy, mask) / denominator
        mean = masked_sum(weighted(entropy, rows), mask) / denominator
        bonus = settings.entropy_coefficient if entropy_coefficient is None else entropy_coefficient
        loss = loss - bonus * mean
    log_ratio = jnp.where(mask, logprob - rows.old_logprob, 0.0)
    metrics["abs_log_ratio"] = masked_sum(jnp.abs(log_ratio), mask) / denominator
    metrics["abs_log_ratio_max"] = jnp.max(jnp.abs(log_ratio))
    metrics["ratio_mean"] = masked_sum(jnp.exp(log_ratio), mask) / denominator
    metrics["ratio_max"] = jnp.exp(jnp.max(log_ratio))
    metrics["ratio_min"] = jnp.exp(jnp.min(log_ratio))
    metrics["loss"] = loss
    return loss, metrics


def weighted(x: Float32[Array, "*axes"], rows: Batch) -> Float32[Array, "*axes"]:
    """Multiply what tokens have by how much each counts in the means of the loss (loss.aggregate)."""
    return x if rows.share is None else x * rows.share[:, None]


def clip_settings(loss: LossConfig) -> dict[str, float | None]:
    """Choose the bounds that an objective is given: those of a sequence's ratio, or those of a token's."""
    low, high = loss.clip_low, loss.clip_high
    if function_of(OBJECTIVES, loss.objective) is gspo_loss:
        low, high = loss.sequence_clip_low, loss.sequence_clip_high
    return {"clip_low": low, "clip_high": high, "dual_clip": loss.dual_clip}
