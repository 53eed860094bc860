"""What sampling does not record of kept trajectories: one forward pass over them, on their KV caches.

A token's keys and values are in the caches that exploration restarts from, so that blocks of tokens run
through the layers by themselves: what is in memory at a time is the scores and the logits of one block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from fr3e_jax.algorithm.trajectories import Measures
from fr3e_jax.engine.caches import take_queries
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.models.attention import Part, Segment, attend_part, join, mean_weights
from fr3e_jax.models.decoder import Decoder, DecoderConfig, Params
from fr3e_jax.parallel.mesh import BATCH_AXES, row_parts
from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.types import AnyArray, Queries, States

PASS_TOKENS = 512  # of a part of the mesh, whose logits and attention scores exist at a time


def needs_pass(needs: Sequence[str]) -> bool:
    """Tell whether what a rule needs takes a forward pass."""
    return not {"gradient", "attention"}.isdisjoint(needs)


def block_size(rows: int, width: int) -> int:
    """Count the tokens of a trajectory that run at a time, where a part has `rows` of `width` tokens."""
    return min(width, max(1, PASS_TOKENS // rows))


@functools.partial(jax.jit, static_argnames=("engine", "needs"))
def second_pass(
    engine: Engine,
    needs: tuple[str, ...],
    params: Params,
    queries: Queries,
    caches: Segment,
    states: States,
    length: Int32[AnyArray, " N"],
) -> Measures:
    """Measure N kept trajectories, each in the mesh's part of its query.

    Args:
      engine: with the model and the mesh.
      needs: `gradient`, `attention` or both; other names are passed over.
      params: merged into the model.
      queries: that the trajectories answer.
      caches: of the trajectories, as `Engine.prefill_trajectories` returns them.
      states: of the trajectories, of which query, base and response are read.
      length: tokens of each response, 0 where a row is only padding.

    Returns:
      The measures that are needed, the others None.
    """
    model, placement = nnx.merge(engine.graph, params), engine.placement
    parts, (count, size) = row_parts(placement.mesh), states.response.shape
    query_length = take_queries(queries.length, states, placement)
    block = block_size(count // parts, size)
    blocks = ceil_divide(size, block)
    query = take_queries(queries.token, states, placement)
    last = jnp.take_along_axis(query, query_length[:, None] - 1, axis=1)
    padded = jnp.pad(states.response, ((0, 0), (0, blocks * block - size)))
    token = jnp.concatenate([last, padded[:, :-1]], axis=1)  # that runs in each slot

    def divided(x: Int32[Array, "N total"]) -> Int32[Array, "blocks N block"]:
        return jnp.moveaxis(x.reshape(count, blocks, block), 1, 0)

    run = jax.vmap(
        functools.partial(run_block, model, placement.shard, needs, size),
        in_axes=(0, 0, None, 0, 0, 1, 1),
        spmd_axis_name=BATCH_AXES,
    )

    def step(sums: tuple[Any, Any], inputs: Any) -> tuple[tuple[Any, Any], Any]:
        token, target, first = inputs
        norm, received, at = run(token, target, first, query_length, length, caches.key, caches.value)
        return jax.tree.map(jnp.add, sums, (received, at)), norm

    nothing = jnp.zeros((count, size), jnp.float32) if "attention" in needs else None
    firsts = block * jnp.arange(blocks)
    (received, at), norm = jax.lax.scan(step, (nothing, nothing), (divided(token), divided(padded), firsts))

    def by_token(x: Float32[Array, "N slots"]) -> Float32[Array, "N S"]:
        fitted = jnp.pad(x, ((0, 0), (0, max(size - x.shape[1], 0))))[:, :size]
        real = jnp.arange(size)[None, :] < length[:, None]
        return placement.shard(jnp.where(real, fitted, 0.0), "batch")

    return Measures(
        gradient=None if norm is None else by_token(jnp.moveaxis(norm, 0, 1).reshape(count, -1)),
        attention=None if received is None else by_token(received[:, 1:]),  # slot t + 1 holds token t
        attention_at=None if at is None else by_token(at),
    )


def run_block(
    model: Decoder,
    shard: Callable[..., Array],
    needs: tuple[str, ...],
    size: int,
    token: Int32[Array, " T"],
    target: Int32[Array, " T"],
    first: Int32[Array, ""],
    query_length: Int32[Array, ""],
    length: Int32[Array, ""],
    key: Float[Array, "L K slots D"],
    value: Float[Array, "L K slots D"],
) -> tuple[
    Float32[Array, " T"] | None,
    Float32[Array, " S"] | None,
    Float32[Array, " S"] | None,
]:
    """Run T consecutive tokens of one trajectory.

    Args:
      model, shard: the decoder, and what places activations on the mesh.
      needs: see `second_pass`.
      size: slots of the response, its first being that of the query's last token.
      token: that run; the first of all is the query's last, the others are the response's.
      target: the response's tokens that were drawn after them.
      first: slot of the first of them.
      query_length, length: tokens of the query and of the response.
      key, value: of the query and of the response behind it.

    Returns:
      (norm of the gradient of each target's log-probability, the attention that each slot receives from these
      tokens, and the same by distance; None of what is not needed).
    """
    graph, stacked = nnx.split(model.layers)
    slot, layers = first + jnp.arange(token.shape[0]), key.shape[0]
    last = query_length - 1  # the query's last token is in slot 0 of the response
    causal = jnp.arange(key.shape[2])[None] <= last + slot[:, None]

    def layer(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], None]:
        (x, weight), (params, key, value) = carry, inputs
        block = nnx.merge(graph, params)
        query, _, _ = block.project(x, last + slot, shard)
        seen = Part(key, value, causal)
        partial = attend_part(query, seen)
        if weight is not None:
            weight = weight + mean_weights(query, seen, [partial]) / layers
        return (block.finish(x, join([partial]).astype(x.dtype), shard), weight), None

    weight = jnp.zeros(causal.shape, jnp.float32) if "attention" in needs else None
    (x, weight), _ = jax.lax.scan(layer, (model.embed(token, shard), weight), (stacked, key, value))
    norm = received = at = None
    if "gradient" in needs:
        norm = gradient_norm(model, shard, model.norm(x), target)
    if weight is not None:
        # Among tokens of the response: the query's last one is in slot 0, and padding from the length on.
        index = jnp.arange(size)
        weight = jax.lax.dynamic_slice_in_dim(weight, last, size, axis=1)
        later = (index[None] >= 1) & (index[None] < slot[:, None]) & (slot[:, None] < length)
        paid = jnp.where(later, weight, 0.0)
        received, at = jnp.sum(paid, axis=0), by_distance(paid, first)
    return norm, received, at


def gradient_norm(
    model: Decoder, shard: Callable[..., Array], hidden: Float[Array, "T E"], target: Int32[Array, " T"]
) -> Float32[Array, " T"]:
    """Compute ||W^T (e_y - p)||, the norm of the gradient of each token's log p(y) by the hidden state."""

    def logprob(hidden: Float[Array, "T E"]) -> Float32[Array, ""]:
        logits = model.logits(hidden, shard)
        drawn = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return jnp.sum(drawn - jax.nn.logsumexp(logits, axis=1))

    # A token's logits depend on its own hidden state alone, so that the sum's gradient is each one's own.
    gradient = jax.grad(logprob)(hidden).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(gradient**2, axis=1))


def by_distance(paid: Float32[Array, "T S"], first: Int32[Array, ""]) -> Float32[Array, " S"]:
    """Add attention up by distance.

    Args:
      paid: by the tokens in slots first, first + 1, ..., to those in slots 0, 1, ...

    Returns:
      Entry d is the total to tokens d before; attention to later tokens is left out.
    """
    tokens, slots = paid.shape
    # With a row of one column less, row r is moved r to the right: one diagonal is one column.
    flat = jnp.pad(paid[:, ::-1], ((0, 0), (0, tokens))).reshape(-1)[:-tokens]
    total = jnp.sum(flat.reshape(tokens, slots + tokens - 1), axis=0)  # entry d - first + slots - 1
    return jax.lax.dynamic_slice(jnp.pad(total, (0, slots)), (slots - 1 - first,), (slots,))


def second_pass_bytes(
    config: DecoderConfig,
    needs: Sequence[str],
    *,
    rows: int,
    prompt: int,
    response: int,
    heads: int,
    tensor: int = 1,
) -> int:
    """Estimate the memory that the pass takes on a device, beside parameters and the trajectories' caches.

    Args:
      config: the architecture.
      needs: what the rule needs.
      rows: kept trajectories of a part of the mesh.
      prompt, response: slots of the caches.
      heads: query heads.
      tensor: size of the mesh's tensor axis.

    Returns:
      Bytes of one block's scores and logits in float32, of which XLA holds two and three arrays at a time.
    """
    if not needs_pass(needs):
        return 0
    tokens = rows * block_size(rows, response)
    scored = 2 * 4 * tokens * (heads // tensor) * (prompt + response)
    logits = 3 * 4 * tokens * config.vocab_size // tensor if "gradient" in needs else 0
    return max(scored, logits)
