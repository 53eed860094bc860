"""Decoding many branches of many trajectories, in lockstep, against shared segments.

A branch starts from a state. Its chain is [query] + [base response up to the state] + [its own
tokens]. The first input of its own segment is the *last token of the state*, so that the first draw
needs no logits from elsewhere: a segment is read one token short, and nothing is prefilled twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from fr3e_jax.algorithm.explore import token_entropy
from fr3e_jax.engine.sampler import draw, draw_uniform
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.qwen2 import Qwen2
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import Rollouts

# Axes of a branch cache [L, N, S, K, C, D]: with the branch axis next to D, XLA keeps the cache in
# place through the loop (layer, trajectory, slot, kv head, branch, head dim).
TRAJECTORY_AXIS, BRANCH_AXIS = 1, 3  # the branch axis once the trajectory axis is mapped away


def decode_branches(
    model: Qwen2,
    placement: Placement,
    token: Array,
    position: Array,
    context: tuple[Segment, ...],
    limit: Array,
    key: Array,
    max_new: int,
    end_tokens: tuple[int, ...],
    temperature: float,
) -> tuple[Rollouts, Segment]:
    """Generate until every branch has stopped or reached its limit.

    Args:
      model: merged with parameters in the compute dtype.
      placement: mesh and table for sampling; trajectories are rows.
      token: int32 [N, C], last token of each branch's state.
      position: int32 [N, C], place of that token in the whole sequence.
      context: segments shared by the branches of a trajectory: key, value [L, N, S, K, D], length
        int32 [N, C].
      limit: int32 [N, C], most tokens that a branch may draw, at most `max_new`; 0 leaves it empty.
      key: PRNG keys [N, C].
      max_new: slots of the branch cache.
      end_tokens: a branch stops after drawing one of these; it belongs to the answer.
      temperature: 0 is greedy.

    Returns:
      (Rollouts with S = max_new, the branches' own Segment: key, value [L, N, S, K, C, D], slot i
      holding the token before generated token i; length is a scalar).
    """
    n, branches = token.shape
    config = model.config
    cache_shape = (
        config.num_hidden_layers,
        n,
        max_new,
        config.num_key_value_heads,
        branches,
        config.head_dim,
    )
    cache_axes = ("layer", "batch", "length", "kv_heads", None, "head_dim")
    cache = placement.shard(jnp.zeros(cache_shape, model.embedding[...].dtype), *cache_axes)
    own = Segment(cache, cache, jnp.int32(0))
    ends = jnp.asarray(end_tokens, jnp.int32)

    def one_branch(token, position, context, own, key):  # type: ignore[no-untyped-def]
        hidden, own = model.decode(token, position, context, own, placement.shard)
        logits = model.logits(hidden[None], placement.shard)[0]
        drawn = draw(logits, draw_uniform(key, position), temperature)
        logprob = logits[drawn] - jax.nn.logsumexp(logits)
        return drawn, logprob, token_entropy(logits), own

    own_axes = Segment(BRANCH_AXIS, BRANCH_AXIS, None)
    per_branch = jax.vmap(
        one_branch,
        in_axes=(0, 0, (Segment(None, None, 0),) * len(context), own_axes, 0),
        out_axes=(0, 0, 0, own_axes),
    )
    own_axes = Segment(TRAJECTORY_AXIS, TRAJECTORY_AXIS, None)
    decode = jax.vmap(
        per_branch,
        in_axes=(0, 0, (Segment(TRAJECTORY_AXIS, TRAJECTORY_AXIS, 0),) * len(context), own_axes, 0),
        out_axes=(0, 0, 0, own_axes),
        spmd_axis_name=BATCH_AXES,
    )

    empty = Rollouts(
        token=jnp.zeros((n, branches, max_new), jnp.int32),
        logprob=jnp.zeros((n, branches, max_new), jnp.float32),
        entropy=jnp.zeros((n, branches, max_new), jnp.float32),
        length=jnp.zeros((n, branches), jnp.int32),
        stopped=jnp.zeros((n, branches), bool),
    )
    rows = functools.partial(jax.tree.map, lambda x: placement.shard(x, "batch"))

    def step(carry):  # type: ignore[no-untyped-def]
        rollouts, running, last, own = carry
        slot = own.length
        drawn, logprob, entropy, own = decode(last, position + slot, context, own, key)

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
        running = running & ~ended & (rollouts.length < limit)
        return rows(rollouts), running, drawn, own

    def unfinished(carry):  # type: ignore[no-untyped-def]
        _, running, _, own = carry
        return jnp.any(running) & (own.length < max_new)

    rollouts, _, _, own = jax.lax.while_loop(unfinished, step, (rows(empty), limit > 0, token, own))
    return rollouts, own


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
        out_axes=Segment(TRAJECTORY_AXIS, TRAJECTORY_AXIS, 0),
        spmd_axis_name=BATCH_AXES,
    )
    return rows(token, length)
