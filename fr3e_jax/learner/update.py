"""One optimizer step, with every prefix computed once, forward and backward.

Rows are continuations; what they follow is a trunk, the query and the base response that they branch from.
The trunks of a bundle run, and their keys and values are kept. The rows run against them, chunk by chunk;
what the gradient of the keys and values adds up to over the chunks then goes back through the trunks, which
run once more for it, so that nothing but keys and values is held meanwhile. Equal to the flat form, in which
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

from fr3e_jax.algorithm.loss import POLICY_LOSSES, kl_k3, masked_sum
from fr3e_jax.algorithm.rules import function_of, of_shape
from fr3e_jax.config import LossConfig
from fr3e_jax.learner.state import TrainState, apply_gradient
from fr3e_jax.models.attention import Attend, Prefix, attend_sequence
from fr3e_jax.models.decoder import Decoder, Params, cache_axes, logical_axes, sharded_as_batch
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import Batch, Bundle, Trunks

Caches = tuple[Array, Array]
"""Keys and values of trunks, [L, P, n, K, S, D]."""

TRUNK_AXES = cache_axes("batch", None)

Metrics = dict[str, Any]

LARGEST = ("ratio_max", "abs_log_ratio_max")
SMALLEST = ("ratio_min",)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Learner:
    """The update of one model on one mesh."""

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    optimizer: optax.GradientTransformation
    loss: LossConfig
    compute_dtype: Any
    logit_chunk: int  # most tokens of a part of the mesh whose logits exist at a time
    remat: bool  # recompute each layer in the backward pass
    attend: Attend = attend_sequence

    def update(
        self, state: TrainState, bundles: Sequence[Bundle], reference: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        """Take one optimizer step, or none where loss or gradient are not finite.

        Args:
          state: donated.
          bundles: the minibatch, host arrays, the same on every process.
          reference: parameters of the reference policy, where `loss.kl_coefficient` is above 0.

        Returns:
          (the new state, metrics float32 []): those of the policy loss, `loss`, `reference_kl`, `entropy`
          (where its coefficient is above 0), `grad_norm`, `ratio_mean`, `ratio_max`, `ratio_min`,
          `abs_log_ratio` and `abs_log_ratio_max`, the mean and largest |logprob - old_logprob|, and those of
          `apply_gradient`.
        """
        gradient, metrics = self.gradient(state.params, bundles, reference)
        state, applied = self.apply(state, gradient, self.placement.place(metrics["loss"]))
        return state, metrics | applied

    def gradient(
        self, params: Params, bundles: Sequence[Bundle], reference: Params | None = None
    ) -> tuple[Params, Metrics]:
        """Gradient of the loss, float32, and its metrics, added up over bundles and chunks."""
        # An empty batch has loss 0, not 0 / 0.
        trained_tokens = sum(int((c.length - c.start).sum()) for bundle in bundles for c in bundle.chunks)
        denominator = self.placement.place(np.float32(max(trained_tokens, 1)))
        compute, gradient = self.begin(params)
        base = None if reference is None else self.cast(reference)
        found: list[Metrics] = []
        for bundle in bundles:
            trunks = caches = base_caches = slope = None
            if bundle.trunks is not None:
                trunks = self.placement.place_rows(bundle.trunks)
                caches, slope = self.open(compute, trunks)
                base_caches = None if base is None else self.read(base, trunks)
            for chunk, window in zip(bundle.chunks, bundle.window, strict=True):
                rows = self.placement.place_rows(chunk)
                gradient, slope, metrics = self.add_chunk(
                    gradient, slope, compute, caches, base, base_caches, rows, denominator, window
                )
                found.append(metrics)
            if trunks is not None:
                gradient = self.close(gradient, slope, compute, trunks)
        return gradient, self.summarize(found, gradient)

    @functools.partial(jax.jit, static_argnames=("self",))
    def begin(self, params: Params) -> tuple[Params, Params]:
        """(Parameters in the compute dtype, a gradient of zeros)."""
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return self.cast(params), self.placed_as_params(zeros)

    @functools.partial(jax.jit, static_argnames=("self",))
    def cast(self, params: Params) -> Params:
        """Parameters in the compute dtype."""
        return self.placed_as_params(jax.tree.map(lambda x: x.astype(self.compute_dtype), params))

    def placed_as_params(self, tree: Params) -> Params:
        """Constrain a tree of the parameters' form to lie as they do.

        Without it XLA would hold a whole gradient on every device, and since what goes in would not lie as
        what comes out, compile every program twice.
        """
        axes = logical_axes(nnx.merge(self.graph, tree).config)
        return jax.tree.map(lambda x, names: self.placement.shard(x, *names), tree, axes)

    @functools.partial(jax.jit, static_argnames=("self",))
    def read(self, compute: Params, trunks: Trunks) -> Caches:
        """Keys and values of the trunks."""
        return trunk_caches(self, nnx.merge(self.graph, compute), trunks)

    @functools.partial(jax.jit, static_argnames=("self",))
    def open(self, compute: Params, trunks: Trunks) -> tuple[Caches, Caches]:
        """(Keys and values of the trunks, float32 zeros for their gradient)."""
        caches = self.read(compute, trunks)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), caches)
        return caches, self.placed_as_caches(zeros)

    def placed_as_caches(self, caches: Caches) -> Caches:
        """Constrain keys and values, or their gradients, to lie with the rows of their part."""
        return jax.tree.map(lambda x: self.placement.shard(x, *TRUNK_AXES), caches)

    @functools.partial(jax.jit, static_argnames=("self", "window"), donate_argnames=("gradient", "slope"))
    def add_chunk(
        self,
        gradient: Params,
        slope: Caches | None,
        compute: Params,
        caches: Caches | None,
        reference: Params | None,
        reference_caches: Caches | None,
        rows: Batch,
        denominator: Array,
        window: int,
    ) -> tuple[Params, Caches | None, Metrics]:
        """Add what a chunk contributes to the gradient of the parameters and of the trunks' caches."""

        def seen(caches: Caches | None) -> Caches | None:
            return None if caches is None else (caches[0][..., :window, :], caches[1][..., :window, :])

        told = (reference, seen(reference_caches), rows, denominator)
        differentiate = jax.grad(chunk_loss, argnums=(1, 2), has_aux=True)
        (change, cache_change), metrics = differentiate(self, compute, seen(caches), *told)
        gradient = self.placed_as_params(added(gradient, change))
        if slope is not None:
            slope = jax.tree.map(
                lambda total, x: total.at[..., :window, :].add(x.astype(jnp.float32)), slope, cache_change
            )
            slope = self.placed_as_caches(slope)
        return gradient, slope, metrics

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("gradient",))
    def close(self, gradient: Params, slope: Caches, compute: Params, trunks: Trunks) -> Params:
        """Add what the trunks contribute, once their caches' gradient is complete."""
        _, pullback = jax.vjp(lambda compute: self.read(compute, trunks), compute)
        (change,) = pullback(jax.tree.map(lambda x: x.astype(self.compute_dtype), slope))
        return self.placed_as_params(added(gradient, change))

    @functools.partial(jax.jit, static_argnames=("self",))
    def norm(self, gradient: Params) -> Array:
        """Its global norm."""
        return optax.tree.norm(gradient)

    def summarize(self, found: list[Metrics], gradient: Params) -> Metrics:
        """Metrics of the minibatch from those of its chunks, on the host: no number of them compiles."""
        reduced: Metrics = {"grad_norm": self.norm(gradient)}
        told = jax.device_get(found)
        for name in told[0] if told else ():
            reduce = np.max if name in LARGEST else np.min if name in SMALLEST else np.sum
            reduced[name] = reduce(np.stack([metrics[name] for metrics in told]))
        return reduced

    def apply(self, state: TrainState, gradient: Params, loss: Array) -> tuple[TrainState, Metrics]:
        """The optimizer's step; the state stays where it lies, or all programs would be compiled again."""
        leaves, tree = jax.tree.flatten(state)
        return applying(self.optimizer, tree, tuple(x.sharding for x in leaves))(state, gradient, loss)


def added(gradient: Params, change: Params) -> Params:
    """Their sum, float32."""
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), gradient, change)


@functools.cache
def applying(optimizer: optax.GradientTransformation, tree: Any, at: tuple[Any, ...]) -> Any:
    """`apply_gradient` as a program whose state has shardings `at`, leaf by leaf."""

    def apply(state: TrainState, gradient: Params, loss: Array) -> tuple[TrainState, Metrics]:
        return apply_gradient(optimizer, state, gradient, loss)

    return jax.jit(apply, donate_argnums=0, out_shardings=(jax.tree.unflatten(tree, at), None))


def attend_rows(attend: Attend) -> Attend:
    """`attend` for [parts, rows] sequences; the prefixes that rows share are those of their part."""

    def attend_all(query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None) -> Array:
        shared = None if prefix is None else Prefix(None, None, 0, 0)
        rows = jax.vmap(attend, (0, 0, 0, 0, shared))
        parts = jax.vmap(rows, (0, 0, 0, 0, 0), spmd_axis_name=BATCH_AXES)
        return parts(query, key, value, real, prefix)

    return attend_all


def trunk_caches(learner: Learner, model: Decoder, trunks: Trunks) -> Caches:
    """Keys and values of trunks, each computed once."""
    shard, attend = learner.placement.shard, attend_rows(learner.attend)
    position = jnp.broadcast_to(jnp.arange(trunks.token.shape[2]), trunks.token.shape)
    _, segment = model(trunks.token, position, trunks.length, shard, learner.remat, attend=attend)
    return learner.placed_as_caches((segment.key, segment.value))


def row_statistics(
    learner: Learner, model: Decoder, caches: Caches | None, rows: Batch, entropy: bool
) -> tuple[Array, Array]:
    """Log-probability of every token of every row, without logits of all of them at once.

    Args:
      caches: of the trunks, or None in the flat form.
      rows: of T + 1 tokens, of which T run through the model.
      entropy: whether to compute it.

    Returns:
      (log pi(token_t | token_<t) float32 [rows, T + 1], entropy of that distribution float32 [rows, T + 1],
      both nats, 0 at t = 0 and meaningless behind a row's length; entropy 0 everywhere where it is not
      computed).
    """
    shard, parts = learner.placement.shard, row_parts(learner.placement.mesh)
    row = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    token, target = row.token[..., :-1], row.token[..., 1:]  # nothing follows the last one
    prefix = None if caches is None else Prefix(*caches, row.trunk, row.prefix)
    position = row.prefix[..., None] + jnp.arange(token.shape[2])[None, None]
    attend = attend_rows(learner.attend)
    hidden, _ = model(token, position, row.length, shard, learner.remat, prefix=prefix, attend=attend)
    pieces = -(-token[0].size // learner.logit_chunk)
    size = -(-token[0].size // pieces)

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

    def joined(x: Array) -> Array:
        """[pieces, parts * size] -> [rows, T + 1]"""
        flat = jnp.moveaxis(x.reshape(pieces, parts, size), 1, 0).reshape(parts, -1)
        return jnp.pad(flat[:, : token[0].size].reshape(-1, token.shape[2]), ((0, 0), (1, 0)))

    _, found = jax.lax.scan(
        lambda _, piece: (None, statistics(*piece)), None, (in_pieces(hidden), in_pieces(target))
    )
    return joined(found[0]), joined(found[1])


def trained(batch: Batch) -> Array:
    """Which tokens carry loss: those of the continuation. bool, shape of `batch.token`."""
    index = jnp.broadcast_to(jnp.arange(batch.token.shape[-1]), batch.token.shape)
    return (index >= batch.start[..., None]) & (index < batch.length[..., None])


def chunk_loss(
    learner: Learner,
    compute: Params,
    caches: Caches | None,
    reference: Params | None,
    reference_caches: Caches | None,
    rows: Batch,
    denominator: Array,
) -> tuple[Array, Metrics]:
    """This chunk's share of the loss, and of the metrics."""
    mask, settings = trained(rows), learner.loss
    wants_entropy = settings.entropy_coefficient != 0
    logprob, entropy = row_statistics(learner, nnx.merge(learner.graph, compute), caches, rows, wants_entropy)
    loss, told = function_of(POLICY_LOSSES, settings.policy)(
        logprob,
        rows.old_logprob,
        rows.advantage[:, None],
        mask,
        denominator,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    loss, metrics = of_shape(loss, (), "a loss, one number,"), dict(told)
    if reference is not None:
        model = nnx.merge(learner.graph, reference)
        other = row_statistics(learner, model, reference_caches, rows, False)[0]
        metrics["reference_kl"] = masked_sum(kl_k3(logprob, jax.lax.stop_gradient(other)), mask) / denominator
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
