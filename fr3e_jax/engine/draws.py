"""Drawing the tokens of rows from their hidden states; first tokens also hotter, or given by their rank."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Key

from fr3e_jax.engine.sampler import Drawn, Sampling, draw, draw_uniform
from fr3e_jax.models.decoder import Decoder, Shard, unsharded
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement
from fr3e_jax.types import AnyArray


def draw_rows(
    model: Decoder,
    placement: Placement,
    hidden: Float[Array, "P R E"],
    position: Int32[Array, "P R"],
    key: Key[Array, "P R"],
    sampling: Sampling,
) -> Drawn:
    """Draw a token for every row.

    Args:
      model: merged with parameters.
      placement: mesh and table for sampling.
      hidden: after the final norm.
      position: of the token before, in the whole sequence.
      key: PRNG keys of the branches.
      sampling: static.
    """
    parts = placement.mesh.shape["tensor"]

    def draw_part(hidden: Float[Array, "R E"], position: Int32[Array, " R"], key: Key[Array, " R"]) -> Drawn:
        def draw_row(logits: Float32[Array, " V"], position: Int32[Array, ""], key: Key[Array, ""]) -> Drawn:
            uniform = draw_uniform(key, position)
            return draw(logits, uniform, sampling, parts, placement.shard)

        return jax.vmap(draw_row)(model.logits(hidden, placement.shard), position, key)

    return jax.vmap(draw_part, spmd_axis_name=BATCH_AXES)(hidden, position, key)


def draw_first(
    model: Decoder,
    placement: Placement,
    hidden: Float[Array, "P R E"],
    position: Int32[Array, "P R"],
    key: Key[Array, "P R"],
    sampling: Sampling,
    drawn: Drawn,
    heated: Bool[Array, "P R"] | None,
    rank: Int32[Array, "P R"] | None,
) -> Drawn:
    """Draw the first tokens of rows again, where they are not drawn as others are.

    Args:
      model, placement, hidden, position, key, sampling: as for `draw_rows`.
      drawn: what that function drew.
      heated: which rows draw with `sampling.first_temperature`; None: no row does.
      rank: as of `take_rank`; None: all are drawn.
    """
    if heated is not None and sampling.first_temperature is not None:
        hotter = dataclasses.replace(sampling, temperature=sampling.first_temperature)
        hot = draw_rows(model, placement, hidden, position, key, hotter)
        drawn = Drawn(*(jnp.where(heated, a, b) for a, b in zip(hot, drawn, strict=True)))
    if rank is None:
        return drawn
    parts = placement.mesh.shape["tensor"]

    def take_part(hidden: Float[Array, "R E"], rank: Int32[Array, " R"], drawn: Drawn) -> Drawn:
        def take_row(logits: Float32[Array, " V"], rank: Int32[Array, ""], drawn: Drawn) -> Drawn:
            return take_rank(logits, rank, drawn, parts, placement.shard)

        return jax.vmap(take_row)(model.logits(hidden, placement.shard), rank, drawn)

    return jax.vmap(take_part, spmd_axis_name=BATCH_AXES)(hidden, rank, drawn)


def take_rank(
    logits: Float32[Array, " V"],
    rank: Int32[AnyArray, ""],
    drawn: Drawn,
    parts: int = 1,
    shard: Shard = unsharded,
) -> Drawn:
    """Take the most likely token (rank 1) or the second (rank 2) in place of the one that was drawn (rank 0).

    It is taken with certainty, and so the log-probability that it was drawn with is 0.

    Args:
      logits: of the policy.
      rank: 0, 1 or 2.
      drawn: from the same logits.
      parts: that the vocabulary is split into; they divide V.
      shard: places the parts on the mesh.
    """
    logits = shard(logits.reshape(parts, -1), "vocab", None)
    first, top = likeliest(logits)
    token = jnp.arange(logits.size, dtype=jnp.int32).reshape(logits.shape)
    second, below = likeliest(jnp.where(token == first, -jnp.inf, logits))
    logit = jnp.where(rank == 2, below, top)
    logprob = logit - top - jnp.log(jnp.sum(jnp.exp(logits - top)))
    return Drawn(
        token=jnp.where(rank == 0, drawn.token, jnp.where(rank == 2, second, first)),
        logprob=jnp.where(rank == 0, drawn.logprob, logprob),
        sampled_logprob=jnp.where(rank == 0, drawn.sampled_logprob, 0.0),
        entropy=drawn.entropy,
    )


def likeliest(logits: Float32[Array, "parts n"]) -> tuple[Int32[Array, ""], Float32[Array, ""]]:
    """Find the most likely token, the first of equals, and its logit.

    Of each part only its largest logit and the place of that leave a device.
    """
    parts, size = logits.shape
    place, largest = jnp.argmax(logits, axis=1), jnp.max(logits, axis=1)
    part = jnp.argmax(largest)
    within = jnp.sum(jnp.where(jnp.arange(parts) == part, place, 0))
    return (part * size + within).astype(jnp.int32), jnp.max(largest)
