"""The forward pass of the learner: trunks into a KV cache, and rows into log-probabilities."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Float32

from fr3e_jax.models.attention import Attend, Prefix, attend_sequence
from fr3e_jax.models.decoder import Decoder, Params, cache_axes, sharded_as_batch
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.types import AnyArray, Batch, Trunks, pytree

TrunkCaches = tuple[Float[AnyArray, "L P n K S D"], Float[AnyArray, "L P n K S D"]]
"""Keys and values of trunks."""

TRUNK_AXES = cache_axes("batch", None)


@pytree
class Prefilled:
    """Parameters in the compute dtype, and the KV cache that they give the trunks of a bundle."""

    params: Params
    caches: TrunkCaches | None
    """None in the flat form."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Forward:
    """How one model is run on one mesh."""

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    _: dataclasses.KW_ONLY
    compute_dtype: Any
    logit_chunk: int
    """Most tokens of a part of the mesh whose logits exist at a time."""
    remat: bool
    """Whether the backward pass computes each layer again."""
    attend: Attend = attend_sequence


def attend_rows(attend: Attend) -> Attend:
    """Map `attend` over [parts, rows] sequences; the prefixes that rows share are those of their part."""

    def attend_all(query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None) -> Array:
        shared = None if prefix is None else Prefix(None, None, 0, 0)
        rows = jax.vmap(attend, (0, 0, 0, 0, shared))
        parts = jax.vmap(rows, (0, 0, 0, 0, 0), spmd_axis_name=BATCH_AXES)
        return parts(query, key, value, real, prefix)

    return attend_all


def trunk_caches(forward: Forward, params: Params, trunks: Trunks) -> TrunkCaches:
    """Compute keys and values of the trunks, each once."""
    shard, attend = forward.placement.shard, attend_rows(forward.attend)
    position = jnp.broadcast_to(jnp.arange(trunks.token.shape[2]), trunks.token.shape)
    model = nnx.merge(forward.graph, params)
    _, segment = model(trunks.token, position, trunks.length, shard, forward.remat, attend=attend)
    return placed_as_caches(forward, (segment.key, segment.value))


def placed_as_caches(forward: Forward, caches: TrunkCaches) -> TrunkCaches:
    """Constrain keys and values, or their gradients, to lie with the rows of their part."""
    return jax.tree.map(lambda x: forward.placement.shard(x, *TRUNK_AXES), caches)


def within_window(prefilled: Prefilled, window: int) -> Prefilled:
    """Cut the KV cache down to the first `window` slots of each trunk."""
    if prefilled.caches is None:
        return prefilled
    key, value = prefilled.caches
    return Prefilled(prefilled.params, (key[..., :window, :], value[..., :window, :]))


def row_statistics(
    forward: Forward, policy: Prefilled, rows: Batch, entropy: bool
) -> tuple[Float32[Array, "rows T"], Float32[Array, "rows T"]]:
    """Compute the log-probability of every token of every row, without logits of all of them at once.

    Args:
      forward: how they are computed.
      policy: the parameters, and the KV cache of what rows follow.
      rows: of T tokens, of which all but the last run through the model.
      entropy: whether to compute it.

    Returns:
      (log pi(token_t | token_<t), entropy of that distribution), both in nats, 0 at t = 0 and meaningless
      from a row's length on; entropy is 0 everywhere where it is not computed.
    """
    shard, parts = forward.placement.shard, row_parts(forward.placement.mesh)
    model = nnx.merge(forward.graph, policy.params)
    row = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    token, target = row.token[..., :-1], row.token[..., 1:]  # nothing follows the last one
    prefix = None if policy.caches is None else Prefix(*policy.caches, row.trunk, row.prefix)
    position = row.prefix[..., None] + jnp.arange(token.shape[2])[None, None]
    attend = attend_rows(forward.attend)
    hidden, _ = model(token, position, row.length, shard, forward.remat, prefix=prefix, attend=attend)
    pieces = ceil_divide(token[0].size, forward.logit_chunk)
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
