"""The KV caches that branches share: of queries, and of kept trajectories that are explored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32, Shaped

from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder, cache_axes
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import AnyArray, Queries

CACHE_AXES = cache_axes("batch")
PREFILL_TOKENS = 4096  # of a part, that run through the layers at a time, or one sequence


def prefilled_together(count: int, width: int) -> int:
    """Count the sequences that run through the layers at a time, of `count` of `width` tokens on a part."""
    return max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * width <= PREFILL_TOKENS))


def prefill(
    model: Decoder,
    placement: Placement,
    token: Int32[Array, "N T"],
    length: Int32[Array, " N"],
    some_empty: bool = False,
) -> Segment:
    """Compute the keys and values of N right-padded sequences: [L, N, K, T, D], length [N].

    Args:
      some_empty: whether many may have length 0; where all that run together do, they are passed over.
    """
    count, width = token.shape
    parts = row_parts(placement.mesh)
    each = count // parts
    together = prefilled_together(each, width)
    position = jnp.arange(width)

    def one(token: Int32[Array, " T"], length: Int32[Array, ""]) -> Segment:
        return model(token, position, length, placement.shard)[1]

    def some(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        """Sequences [together, P, T] -> keys and values [together, P, L, K, T, D]."""
        sequences = jax.vmap(jax.vmap(one, spmd_axis_name=BATCH_AXES))
        segment = sequences(*inputs)
        return segment.key, segment.value

    def turned(x: Int32[Array, " N *rest"]) -> Int32[Array, "turns together P *rest"]:
        by_part = jnp.swapaxes(x.reshape(parts, each, *x.shape[1:]), 0, 1)
        return by_part.reshape(each // together, together, *by_part.shape[1:])

    def whole(x: Shaped[Array, "turns together P L K T D"]) -> Shaped[Array, "L N K T D"]:
        x = x.reshape(each, *x.shape[2:])
        x = jnp.einsum("npl...->lpn...", x)
        return placement.shard(x.reshape(x.shape[0], count, *x.shape[3:]), *CACHE_AXES)

    def some_or_none(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(some, inputs))
        return jax.lax.cond(jnp.any(inputs[1] > 0), some, lambda _: nothing, inputs)

    key, value = jax.lax.map(some_or_none if some_empty else some, (turned(token), turned(length)))
    return Segment(whole(key), whole(value), length)


def take_queries(
    x: Int32[AnyArray, " B *rest"], states: Any, placement: Placement
) -> Int32[Array, " N *rest"]:
    """Give each of N trajectories, those of `States` or of `Starts`, what its query has.

    That is in the same part of the mesh.
    """
    parts = row_parts(placement.mesh)
    index = states.query.reshape(parts, -1) % (x.shape[0] // parts)
    taken = jax.vmap(lambda x, index: x[index], spmd_axis_name=BATCH_AXES)(
        x.reshape(parts, -1, *x.shape[1:]), index
    )
    return placement.shard(taken.reshape(-1, *x.shape[1:]), "batch")


def sequences_of(placement: Placement, queries: Queries, states: Any) -> Int32[Array, "N T"]:
    """Lay out the sequences of N trajectories, those of `States` or of `Starts`: query, then response.

    A response begins where its query ends, not where the longest may. What follows it are any tokens, which
    no state sees.
    """
    query = take_queries(queries.token, states, placement)
    size = take_queries(queries.length, states, placement)[:, None]
    whole = jnp.concatenate([query, states.response], axis=1)
    at = jnp.arange(whole.shape[1])[None]
    source = jnp.where(at < size, at, at - size + query.shape[1])
    return jnp.take_along_axis(whole, jnp.minimum(source, whole.shape[1] - 1), axis=1)
