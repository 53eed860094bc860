"""Decoding many branches of many trajectories, in lockstep, against shared segments.

A branch starts from a state. Its chain is [query] + [base response up to the state] + [its own
tokens]. The first input of its own segment is the *last token of the state*, so that the first draw
needs no logits from elsewhere: a segment is read one token short, and nothing is prefilled twice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fr3e_jax.algorithm.explore import token_entropy
from fr3e_jax.engine.sampler import draw, draw_uniform
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.qwen2 import Qwen2
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import Rollouts

# A branch cache is [L, N, S, K, C, D]: layer, trajectory, slot, key-value head, branch, head dim. With
# the branch axis next to D, and carried whole through the loops over tokens and layers, it is updated
# in place. Only what one layer does with one branch is mapped: mapping a loop would move these axes.
LAYER_OWN_AXES = Segment(2, 2, None)  # of [S, K, C, D], over branches


def decode_token(
    model: Qwen2,
    placement: Placement,
    token: Array,
    position: Array,
    context: tuple[Segment, ...],
    own: Segment,
) -> tuple[Array, Segment]:
    """Run one token of every branch against its chain of segments.

    Args:
      token, position: int32 [N, C].
      context: segments that the branches of a trajectory share: key, value [L, N, S, K, D], length
        int32 [N, C].
      own: the branches' own segment: key, value [L, N, S, K, C, D], length int32 [], the slot to fill.

    Returns:
      (hidden [N, C, E] after the final norm, `own` with one token more).
    """
    graph, stacked = nnx.split(model.layers)
    shared = Segment(None, None, 0)

    def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, own_key, own_value = carry
        number, params, keys, values = inputs

        block = nnx.merge(graph, params)

        def project(x: Array, position: Array) -> tuple[Array, Array, Array]:
            return block.project(x, position[None], placement.shard)

        def finish(x: Array, query: Array, chain: tuple[Segment, ...], own: Segment) -> Array:
            return block.attend_chain(x, query, (*chain, own), placement.shard)

        def store(cache: Array, new: Array) -> Array:
            new = jnp.einsum("nctkd->ntkcd", new)[None]
            return jax.lax.dynamic_update_slice(cache, new, (number, 0, own.length, 0, 0, 0))

        query, key, value = jax.vmap(jax.vmap(project), spmd_axis_name=BATCH_AXES)(x, position)
        # Stored before it is read: a read of what is about to change would make XLA copy the cache.
        own_key, own_value = store(own_key, key), store(own_value, value)
        chain = tuple(
            Segment(key, value, segment.length)
            for key, value, segment in zip(keys, values, context, strict=True)
        )
        branches = jax.vmap(finish, (0, 0, (shared,) * len(context), LAYER_OWN_AXES))
        trajectories = jax.vmap(branches, (0, 0, 0, Segment(0, 0, None)), spmd_axis_name=BATCH_AXES)
        held = Segment(own_key[number], own_value[number], own.length + 1)
        return (trajectories(x, query, chain, held), own_key, own_value), None

    embed = jax.vmap(jax.vmap(lambda t: model.embed(t[None], placement.shard)), spmd_axis_name=BATCH_AXES)
    inputs = (
        jnp.arange(model.config.num_hidden_layers),
        stacked,
        tuple(segment.key for segment in context),
        tuple(segment.value for segment in context),
    )
    (x, key, value), _ = jax.lax.scan(layer, (embed(token), own.key, own.value), inputs)
    return model.norm(x)[:, :, 0], Segment(key, value, own.length + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """What is fixed for C branches of each of N trajectories while they are decoded in lockstep.

    token: int32 [N, C], last token of each branch's state. position: int32 [N, C], its place in the whole
    sequence. context: segments shared by the branches of a trajectory: key, value [L, N, S, K, D], length
    int32 [N, C]. limit: int32 [N, C], most tokens that a branch may draw; 0 leaves it empty. key: PRNG
    keys [N, C].
    """

    token: Array
    position: Array
    context: tuple[Segment, ...]
    limit: Array
    key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """How far the branches have come.

    rollouts: what they have generated. running: bool [N, C], not stopped yet. last: int32 [N, C], the
    token to run next. own: the branches' own segment, key, value [L, N, S, K, C, D], slot i holding the
    token before generated token i; length a scalar.
    """

    rollouts: Rollouts
    running: Array
    last: Array
    own: Segment


def start_branches(model: Qwen2, placement: Placement, branches: Branches, max_new: int) -> Decoding:
    """Branches that have generated nothing, with room for `max_new` tokens, the largest limit."""
    n, count = branches.token.shape
    config = model.config
    cache_shape = (
        config.num_hidden_layers,
        n,
        max_new,
        config.num_key_value_heads,
        count,
        config.head_dim,
    )
    cache_axes = ("layer", "batch", "length", "kv_heads", None, "head_dim")

    def cache() -> Array:
        return placement.shard(jnp.zeros(cache_shape, model.embedding[...].dtype), *cache_axes)

    empty = Rollouts(
        token=jnp.zeros((n, count, max_new), jnp.int32),
        logprob=jnp.zeros((n, count, max_new), jnp.float32),
        entropy=jnp.zeros((n, count, max_new), jnp.float32),
        length=jnp.zeros((n, count), jnp.int32),
        stopped=jnp.zeros((n, count), bool),
    )
    own = Segment(cache(), cache(), jnp.int32(0))
    return Decoding(by_row(placement, empty), branches.limit > 0, branches.token, own)


def advance_branches(
    model: Qwen2,
    placement: Placement,
    branches: Branches,
    decoding: Decoding,
    until: Array | int,
    end_tokens: tuple[int, ...],
    temperature: float,
) -> Decoding:
    """Generate until every branch has stopped or reached its limit, or `until` tokens are generated.

    Args:
      model: merged with parameters in the compute dtype.
      placement: mesh and table for sampling; trajectories are rows.
      branches: as given to `start_branches`.
      decoding: what `start_branches` or a call before this one returned.
      until: int32 [], at most the slots of the branch cache.
      end_tokens: a branch stops after drawing one of these; it belongs to the answer.
      temperature: 0 is greedy.
    """
    ends = jnp.asarray(end_tokens, jnp.int32)

    def draw_one(hidden: Array, position: Array, key: Array) -> tuple[Array, Array, Array]:
        logits = model.logits(hidden[None], placement.shard)[0]
        drawn = draw(logits, draw_uniform(key, position), temperature)
        return drawn, logits[drawn] - jax.nn.logsumexp(logits), token_entropy(logits)

    draw_all = jax.vmap(jax.vmap(draw_one), spmd_axis_name=BATCH_AXES)

    def step(before: Decoding) -> Decoding:
        rollouts, running, slot = before.rollouts, before.running, before.own.length
        position = branches.position + slot
        hidden, own = decode_token(model, placement, before.last, position, branches.context, before.own)
        drawn, logprob, entropy = draw_all(hidden, position, branches.key)

        def write(buffer: Array, value: Array) -> Array:
            value = jnp.where(running, value, 0)[..., None]
            return jax.lax.dynamic_update_slice(buffer, value, (0, 0, slot))

        ended = running & jnp.any(drawn[..., None] == ends, axis=-1)
        rollouts = Rollouts(
            token=write(rollouts.token, drawn),
            logprob=write(rollouts.logprob, logprob),
            entropy=write(rollouts.entropy, entropy),
            length=rollouts.length + running,
            stopped=rollouts.stopped | ended,
        )
        running = running & ~ended & (rollouts.length < branches.limit)
        return Decoding(by_row(placement, rollouts), running, drawn, own)

    def unfinished(decoding: Decoding) -> Array:
        return jnp.any(decoding.running) & (decoding.own.length < until)

    return jax.lax.while_loop(unfinished, step, decoding)


def by_row(placement: Placement, tree: Rollouts) -> Rollouts:
    """Constrain arrays whose first axis is trajectories."""
    return jax.tree.map(lambda x: placement.shard(x, "batch"), tree)


def prefill(model: Qwen2, placement: Placement, token: Array, length: Array) -> Segment:
    """Keys and values of B queries, each computed once.

    Args:
      token: int32 [B, P], right-padded. length: int32 [B].

    Returns:
      Segment with key, value [L, B, P, K, D], length int32 [B].
    """
    position = jnp.arange(token.shape[1])

    def one(token: Array, length: Array) -> Segment:
        return model(token, position, length, placement.shard)[1]

    rows = jax.vmap(
        one,
        out_axes=Segment(1, 1, 0),
        spmd_axis_name=BATCH_AXES,
    )
    return rows(token, length)
