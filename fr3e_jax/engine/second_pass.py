"""What sampling does not record of kept trajectories: one forward pass over them, on their KV caches.

A token's keys and values are in the caches that first return made, so that blocks of tokens run through the
layers by themselves: what is in memory at a time is the scores and the logits of one block.
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
from fr3e_jax.engine.caches import Caches, take_queries, take_trajectories
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.models.attention import Part, attend_part, join, mean_weights
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
    caches: Caches,
    states: States,
    length: Int32[AnyArray, " N"],
) -> Measures:
    """Measure N kept trajectories, each in the mesh's part of its query.

    Args:
      engine: with the model and the mesh.
      needs: `gradient`, `attention` or both; other names are passed over.
      params: merged into the model.
      queries, caches: as given to and returned by `Engine.first_return`; the caches can be used again.
      states: of the trajectories, of which query, base and response are read.
      length: tokens of each response, 0 where a row is only padding.

    Returns:
      The measures that are needed, the others None.
    """
    model, placement = nnx.merge(engine.graph, params), engine.placement
    parts, (count, size) = row_parts(placement.mesh), states.response.shape
    query_length = queries.length[states.query]
    held = [
        take_queries(caches.query.key, states, parts),
        take_queries(caches.query.value, states, parts),
        take_trajectories(caches.base.key, caches, states),
        take_trajectories(caches.base.value, caches, states),
    ]
    # A response has no token beyond the slots: rows of the cache grow with the answers.
    width = min(size, held[2].shape[3])
    block = block_size(count // parts, width)
    blocks = ceil_divide(width, block)
    last = jnp.take_along_axis(queries.token[states.query], query_length[:, None] - 1, axis=1)
    padded = jnp.pad(states.response, ((0, 0), (0, max(blocks * block - size, 0))))[:, : blocks * block]
    token = jnp.concatenate([last, padded[:, :-1]], axis=1)  # that runs in each slot

    def divided(x: Int32[Array, "N total"]) -> Int32[Array, "blocks N block"]:
        return jnp.moveaxis(x.reshape(count, blocks, block), 1, 0)

    run = jax.vmap(
        functools.partial(run_block, model, placement.shard, needs),
        in_axes=(0, 0, None, 0, 0, 1, 1, 1, 1),
        spmd_axis_name=BATCH_AXES,
    )

    def step(sums: tuple[Any, Any], inputs: Any) -> tuple[tuple[Any, Any], Any]:
        *tokens, first = inputs
        norm, received, at = run(*tokens, first, query_length, length, *held)
        return jax.tree.map(jnp.add, sums, (received, at)), norm

    nothing = jnp.zeros((count, held[2].shape[3]), jnp.float32) if "attention" in needs else None
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
    token: Int32[Array, " T"],
    target: Int32[Array, " T"],
    first: Int32[Array, ""],
    query_length: Int32[Array, ""],
    length: Int32[Array, ""],
    *held: Float[Array, "L K _ D"],
) -> tuple[
    Float32[Array, " T"] | None,
    Float32[Array, " S"] | None,
    Float32[Array, " S"] | None,
]:
    """Run T consecutive tokens of one trajectory.

    Args:
      model, shard: the decoder, and what places activations on the mesh.
      needs: see `second_pass`.
      token: that run; the first of all is the query's last, the others are the response's.
      target: the response's tokens that were drawn after them.
      first: slot of the first of them.
      query_length, length: tokens of the query and of the response.
      held: keys and values of the query, keys and values of the S slots of the response.

    Returns:
      (norm of the gradient of each target's log-probability, the attention that each slot receives from these
      tokens, and the same by distance; None of what is not needed).
    """
    graph, stacked = nnx.split(model.layers)
    slot, layers = first + jnp.arange(token.shape[0]), held[0].shape[0]
    index = jnp.arange(held[2].shape[2])
    before = jnp.arange(held[0].shape[2])[None] < query_length - 1  # its last token is in the first slot
    causal = index[None] <= slot[:, None]

    def layer(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], None]:
        (x, weight), (params, query_key, query_value, key, value) = carry, inputs
        block = nnx.merge(graph, params)
        query, _, _ = block.project(x, query_length - 1 + slot, shard)
        seen = [Part(query_key, query_value, before), Part(key, value, causal)]
        partials = [attend_part(query, part) for part in seen]
        if weight is not None:
            weight = weight + mean_weights(query, seen[1], partials) / layers
        return (block.finish(x, join(partials).astype(x.dtype), shard), weight), None

    weight = jnp.zeros(causal.shape, jnp.float32) if "attention" in needs else None
    (x, weight), _ = jax.lax.scan(layer, (model.embed(token, shard), weight), (stacked, *held))
    norm = received = at = None
    if "gradient" in needs:
        norm = gradient_norm(model, shard, model.norm(x), target)
    if weight is not None:
        # Among tokens of the response: the query's last one is in slot 0, and padding from the length on.
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
    itemsize: int,
    heads: int,
    tensor: int = 1,
) -> int:
    """Estimate the memory that the pass takes on a device, beside parameters and the caches of first return.

    Args:
      config: the architecture.
      needs: what the rule needs.
      rows: kept trajectories of a part of the mesh.
      prompt, response: slots of the caches.
      itemsize: bytes of a number of the caches.
      heads: query heads.
      tensor: size of the mesh's tensor axis.

    Returns:
      Bytes: the kept trajectories' caches, which are taken out, and one block's scores and logits in float32,
      of which XLA holds two and three arrays at a time.
    """
    if not needs_pass(needs):
        return 0
    shared = tensor if config.num_key_value_heads % tensor == 0 else 1
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    held = 2 * rows * (prompt + response) * numbers * itemsize // shared
    tokens = rows * block_size(rows, response)
    scored = 2 * 4 * tokens * (heads // tensor) * (prompt + response)
    logits = 3 * 4 * tokens * config.vocab_size // tensor if "gradient" in needs else 0
    return held + max(scored, logits)
