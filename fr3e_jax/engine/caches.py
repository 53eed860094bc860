"""The KV caches of the engine: filled by prefill, handed from first return to exploration, and compacted."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from fr3e_jax.engine.seats import Leg
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder, cache_axes
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import AnyArray, States, pytree

CACHE_AXES = cache_axes("batch")


@pytree
class Caches:
    """The KV caches of a round's queries and base trajectories, from which exploration restarts."""

    query: Segment
    """Keys and values [L, B, K, Q, D], length [B]."""
    base: Segment
    """Keys and values [L, P, K, rows x S, D], branch r of the b-th query of a part in row b x count + r."""
    rows: int = dataclasses.field(metadata={"static": True})
    """Rows of a part."""
    count: int = dataclasses.field(metadata={"static": True})
    """Base trajectories of a query."""


def prefill(
    model: Decoder, placement: Placement, token: Int32[Array, "B T"], length: Int32[Array, " B"]
) -> Segment:
    """Compute the keys and values of B right-padded queries, each once: [L, B, K, T, D], length [B]."""
    position = jnp.arange(token.shape[1])

    def one(token: Int32[Array, " T"], length: Int32[Array, ""]) -> Segment:
        return model(token, position, length, placement.shard)[1]

    rows = jax.vmap(one, out_axes=Segment(1, 1, 0), spmd_axis_name=BATCH_AXES)
    return rows(token, length)


def empty_cache(model: Decoder, placement: Placement, size: int) -> Float[Array, "L P K slots D"]:
    """Make zeros for the keys or the values of `size` tokens in each part of the mesh."""
    config = model.config
    heads = (config.num_key_value_heads, size, config.head_dim)
    zeros = jnp.zeros((config.num_hidden_layers, row_parts(placement.mesh), *heads), model.dtype)
    return placement.shard(zeros, *CACHE_AXES)


def reseat(model: Decoder, placement: Placement, own: Segment, leg: Leg) -> Segment:
    """Move the rows of the branch cache to where a leg wants them: within the cache, if its size stays.

    Args:
      own: key, value [L, P, K, R x S, D] of the R rows and S slots before the leg.
      leg: with an origin.
    """
    rows_before, _ = leg.before

    def moved(layer: Float[Array, "P K before D"]) -> Float[Array, "P K after D"]:
        """Move the rows of a layer: R x S slots to rows x slots."""
        parts, heads, size, width = layer.shape
        held = layer.reshape(parts, heads, rows_before, size // rows_before, width)[:, :, :, : leg.slots]
        held = jax.vmap(lambda x, index: x[:, index], spmd_axis_name=BATCH_AXES)(held, leg.origin)
        held = jnp.pad(held, ((0, 0), (0, 0), (0, 0), (0, leg.slots - held.shape[3]), (0, 0)))
        return placement.shard(held.reshape(parts, heads, leg.size, width), *CACHE_AXES[1:])

    def move(cache: Float[Array, "L P K before D"]) -> Float[Array, "L P K after D"]:
        target = cache if cache.shape[3] == leg.size else empty_cache(model, placement, leg.size)

        def one(number: Int32[AnyArray, ""] | int, target: Float[Array, "L P K after D"]) -> Array:
            source = target if target.shape == cache.shape else cache
            layer = jax.lax.dynamic_index_in_dim(source, number, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(target, moved(layer), number, 0)

        return jax.lax.fori_loop(0, cache.shape[0], one, target)

    return own._replace(key=move(own.key), value=move(own.value))


def take_queries(cache: Float[Array, "L B K Q D"], states: States, parts: int) -> Float[Array, "L N K Q D"]:
    """Take the queries of N kept trajectories out of a cache."""
    layers, count, *each = cache.shape
    index = states.query.reshape(parts, -1) % (count // parts)

    def take(cache: Array, index: Array) -> Array:
        return cache[:, index]

    taken = jax.vmap(take, (1, 0), 1, spmd_axis_name=BATCH_AXES)(
        cache.reshape(layers, parts, -1, *each), index
    )
    return taken.reshape(layers, -1, *each)


def take_trajectories(
    cache: Float[Array, "L P K slots D"], caches: Caches, states: States
) -> Float[Array, "L N K S D"]:
    """Take N kept trajectories out of the keys or values of `caches.base`."""
    layers, parts, heads, _, width = cache.shape
    queries = caches.rows // caches.count  # of a part
    row = states.query.reshape(parts, -1) % queries * caches.count + states.base.reshape(parts, -1)

    def take(cache: Array, row: Array) -> Array:
        return jnp.moveaxis(cache[:, :, row], 2, 1)

    divided = cache.reshape(layers, parts, heads, caches.rows, -1, width)
    taken = jax.vmap(take, (1, 0), 1, spmd_axis_name=BATCH_AXES)(divided, row)
    return taken.reshape(layers, -1, heads, divided.shape[4], width)
