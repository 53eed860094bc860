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
from jaxtyping import Bool, Float, Float32

from fr3e_jax.algorithm.loss import POLICY_LOSSES, kl_k3, masked_sum
from fr3e_jax.algorithm.rules import function_of, of_shape
from fr3e_jax.config import LossConfig
from fr3e_jax.learner.state import TrainState, apply_gradient
from fr3e_jax.models.attention import Attend, Prefix, attend_sequence
from fr3e_jax.models.decoder import Decoder, Params, cache_axes, logical_axes, sharded_as_batch
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.types import AnyArray, Batch, Bundle, Trunks, pytree

TrunkCaches = tuple[Float[AnyArray, "L P n K S D"], Float[AnyArray, "L P n K S D"]]
"""Keys and values of trunks."""

TRUNK_AXES = cache_axes("batch", None)

UpdateMetrics = dict[str, Float32[AnyArray, ""]]

MAXIMA = ("ratio_max", "abs_log_ratio_max")  # metrics of chunks are added up, but for these
MINIMA = ("ratio_min",)


@pytree
class Prefilled:
    """Parameters in the compute dtype, and the KV cache that they give the trunks of a bundle."""

    params: Params
    caches: TrunkCaches | None
    """None in the flat form."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Learner:
    """The update of one model on one mesh."""

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    optimizer: optax.GradientTransformation
    loss: LossConfig
    _: dataclasses.KW_ONLY
    compute_dtype: Any
    logit_chunk: int
    """Most tokens of a part of the mesh whose logits exist at a time."""
    remat: bool
    """Whether the backward pass computes each layer again."""
    attend: Attend = attend_sequence

    def update(
        self, state: TrainState, bundles: Sequence[Bundle], reference: Params | None = None
    ) -> tuple[TrainState, UpdateMetrics]:
        """Take one optimizer step, or none where loss or gradient are not finite.

        Args:
          state: donated.
          bundles: the minibatch, host arrays, the same on every process.
          reference: parameters of the reference policy, where `loss.kl_coefficient` is above 0.

        Returns:
          (the new state, metrics): those of the policy loss, `loss`, `reference_kl`, `entropy` (where its
          coefficient is above 0), `grad_norm`, `ratio_mean`, `ratio_max`, `ratio_min`, `abs_log_ratio` and
          `abs_log_ratio_max`, the mean and largest |logprob - old_logprob|, and those of `apply_gradient`.
        """
        gradient, metrics = self.gradient(state.params, bundles, reference)
        state, applied = self.apply(state, gradient, self.placement.place(metrics["loss"]))
        return state, metrics | applied

    def gradient(
        self, params: Params, bundles: Sequence[Bundle], reference: Params | None = None
    ) -> tuple[Params, UpdateMetrics]:
        """Compute the gradient of the loss, float32, and metrics, over all bundles and chunks."""
        # An empty batch has loss 0, not 0 / 0.
        trained_tokens = sum(int((c.length - c.start).sum()) for bundle in bundles for c in bundle.chunks)
        denominator = self.placement.place(np.float32(max(trained_tokens, 1)))
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
                    gradient, cache_gradient, policy, other, rows, denominator, window=window
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
        shard, attend = self.placement.shard, attend_rows(self.attend)
        model = nnx.merge(self.graph, compute)
        position = jnp.broadcast_to(jnp.arange(trunks.token.shape[2]), trunks.token.shape)
        _, segment = model(trunks.token, position, trunks.length, shard, self.remat, attend=attend)
        return self.placed_as_caches((segment.key, segment.value))

    @functools.partial(jax.jit, static_argnames=("self",))
    def prefill_and_zero_gradient(self, compute: Params, trunks: Trunks) -> tuple[TrunkCaches, TrunkCaches]:
        """Compute keys and values of the trunks, and make a gradient of zeros for them, float32."""
        caches = self.prefill(compute, trunks)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), caches)
        return caches, self.placed_as_caches(zeros)

    def placed_as_caches(self, caches: TrunkCaches) -> TrunkCaches:
        """Constrain keys and values, or their gradients, to lie with the rows of their part."""
        return jax.tree.map(lambda x: self.placement.shard(x, *TRUNK_AXES), caches)

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
          window: slots of the trunks that the rows see.

        Returns:
          (gradient, cache_gradient, the chunk's share of the metrics).
        """
        seen = functools.partial(within_window, window=window)
        differentiate = jax.grad(chunk_loss, argnums=1, has_aux=True)
        change, metrics = differentiate(
            self, seen(policy), None if reference is None else seen(reference), rows, denominator
        )
        gradient = self.placed_as_params(added(gradient, change.params))
        if cache_gradient is not None:
            cache_gradient = jax.tree.map(
                lambda total, x: total.at[..., :window, :].add(x.astype(jnp.float32)),
                cache_gradient,
                change.caches,
            )
            cache_gradient = self.placed_as_caches(cache_gradient)
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


def within_window(prefilled: Prefilled, window: int) -> Prefilled:
    """Cut the KV cache down to the first `window` slots of each trunk."""
    if prefilled.caches is None:
        return prefilled
    key, value = prefilled.caches
    return Prefilled(prefilled.params, (key[..., :window, :], value[..., :window, :]))


def attend_rows(attend: Attend) -> Attend:
    """Map `attend` over [parts, rows] sequences; the prefixes that rows share are those of their part."""

    def attend_all(query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None) -> Array:
        shared = None if prefix is None else Prefix(None, None, 0, 0)
        rows = jax.vmap(attend, (0, 0, 0, 0, shared))
        parts = jax.vmap(rows, (0, 0, 0, 0, 0), spmd_axis_name=BATCH_AXES)
        return parts(query, key, value, real, prefix)

    return attend_all


def row_statistics(
    learner: Learner, policy: Prefilled, rows: Batch, entropy: bool
) -> tuple[Float32[Array, "rows T"], Float32[Array, "rows T"]]:
    """Compute the log-probability of every token of every row, without logits of all of them at once.

    Args:
      learner: the learner.
      policy: the parameters, and the KV cache of what rows follow.
      rows: of T tokens, of which all but the last run through the model.
      entropy: whether to compute it.

    Returns:
      (log pi(token_t | token_<t), entropy of that distribution), both in nats, 0 at t = 0 and meaningless
      from a row's length on; entropy is 0 everywhere where it is not computed.
    """
    shard, parts = learner.placement.shard, row_parts(learner.placement.mesh)
    model = nnx.merge(learner.graph, policy.params)
    row = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    token, target = row.token[..., :-1], row.token[..., 1:]  # nothing follows the last one
    prefix = None if policy.caches is None else Prefix(*policy.caches, row.trunk, row.prefix)
    position = row.prefix[..., None] + jnp.arange(token.shape[2])[None, None]
    attend = attend_rows(learner.attend)
    hidden, _ = model(token, position, row.length, shard, learner.remat, prefix=prefix, attend=attend)
    pieces = ceil_divide(token[0].size, learner.logit_chunk)
    size = ceil_divide(token[0].size, pieces)

    @jax.checkpoint
    def statistics(hidden: Array, target: Array) -> tuple[Array, Array]:
        logits = model.logits(hidden.reshape(parts * size, -1), sharded_as_batch(shard))
        drawn = jnp.take_along_axis(logits, target.reshape(-1, 1), axis=1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=1)
        if not entropy:
            return drawn - total, jnp.zeros_like(drawn)
        # A token without probability has a logit of -inf, and adds nothing.
        finite = jnp.where(jnp.isneginf(logits), 0.0, logits)
        return drawn - total, total - jnp.sum(jax.nn.softmax(logits) * finite, axis=1)

    def in_pieces(x: Array) -> Array:
        """[parts, rows, T, ...] -> [pieces, parts, size, ...]"""
        flat = x.reshape(parts, token[0].size, *x.shape[3:])
        padded = jnp.pad(flat, [(0, 0), (0, pieces * size - flat.shape[1])] + [(0, 0)] * (flat.ndim - 2))
        return jnp.moveaxis(padded.reshape(parts, pieces, size, *x.shape[3:]), 1, 0)

    def by_row(x: Array) -> Array:
        """[pieces, parts * size] -> [rows, T + 1]"""
        flat = jnp.moveaxis(x.reshape(pieces, parts, size), 1, 0).reshape(parts, -1)
        return jnp.pad(flat[:, : token[0].size].reshape(-1, token.shape[2]), ((0, 0), (1, 0)))

    _, (logprob, spread) = jax.lax.scan(
        lambda _, piece: (None, statistics(*piece)), None, (in_pieces(hidden), in_pieces(target))
    )
    return by_row(logprob), by_row(spread)


def trained(batch: Batch) -> Bool[Array, "rows T"]:
    """Tell which tokens carry loss: those of the continuation."""
    index = jnp.broadcast_to(jnp.arange(batch.token.shape[-1]), batch.token.shape)
    return (index >= batch.start[..., None]) & (index < batch.length[..., None])


def chunk_loss(
    learner: Learner,
    policy: Prefilled,
    reference: Prefilled | None,
    rows: Batch,
    denominator: Float32[Array, ""],
) -> tuple[Float32[Array, ""], UpdateMetrics]:
    """Compute a chunk's share of the loss and of the metrics; the arguments are those of `add_chunk`."""
    mask, settings = trained(rows), learner.loss
    wants_entropy = settings.entropy_coefficient != 0
    logprob, entropy = row_statistics(learner, policy, rows, wants_entropy)
    loss, loss_metrics = function_of(POLICY_LOSSES, settings.policy)(
        logprob,
        rows.old_logprob,
        rows.advantage[:, None],
        mask,
        denominator,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    loss, metrics = of_shape(loss, (), "a loss, one number,"), dict(loss_metrics)
    if reference is not None:
        reference_logprob = jax.lax.stop_gradient(row_statistics(learner, reference, rows, False)[0])
        metrics["reference_kl"] = masked_sum(kl_k3(logprob, reference_logprob), mask) / denominator
        loss = loss + settings.kl_coefficient * metrics["reference_kl"]
    if wants_entropy:
        metrics["entropy"] = masked_sum(entropy, mask) / denominator
        loss = loss - settings.entropy_coefficient * metrics["entropy"]
    log_ratio = jnp.where(mask, logprob - rows.old_logprob, 0.0)
    metrics["abs_log_ratio"] = masked_sum(jnp.abs(log_ratio), mask) / denominator
    metrics["abs_log_ratio_max"] = jnp.max(jnp.abs(log_ratio))
    metrics["ratio_mean"] = masked_sum(jnp.exp(log_ratio), mask) / denominator
    metrics["ratio_max"] = jnp.exp(jnp.max(log_ratio))
    metrics["ratio_min"] = jnp.exp(jnp.min(log_ratio))
    metrics["loss"] = loss
    return loss, metrics
