"""What the token at a position tells about the reward: mutual information, from pilot rollouts.

Symbols: y_t is the token at position t, r whether the whole answer is right, v one of the two likeliest
tokens at t, p(v) its probability among these two, H an entropy in nats.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int

from fr3e_jax.types import AnyArray

CANDIDATES = 4  # for each position that is wanted
PILOT_TOKENS = (1, 2)  # the ranks of the two likeliest tokens, which pilots begin with


def binary_entropy(rate: Float32[AnyArray, "*axes"]) -> Float32[Array, "*axes"]:
    """Compute H of a success with this rate, nats: 0 where it is sure or out of reach."""
    rate = jnp.asarray(rate)
    other = 1.0 - rate
    return -rate * jnp.log(jnp.where(rate > 0, rate, 1.0)) - other * jnp.log(jnp.where(other > 0, other, 1.0))


def mutual_information(
    rate: Float32[AnyArray, "*axes 2"], logprob: Float32[AnyArray, "*axes 2"]
) -> Float32[Array, "*axes"]:
    """Compute I(y_t; r) = H(r) - sum_v p(v) H(r | v), nats, over the two likeliest tokens v.

    p(v) is renormalised over the two, and the rate of r is sum_v p(v) rate_v. The entropies are those of the
    rates as they are (plain plug-in). I is 0 where the rates are equal, and at most H(r) and the entropy of
    the token.

    From n pilots of each token I comes out too high on average: by about 1 / (4 n) nats where the token does
    not matter, half of the answers are right, and p = 1/2; by less elsewhere. Rates that are smoothed instead
    (Jeffreys) are never 0 or 1, so that with few pilots a token that decides the answer hardly stands out.

    Args:
      rate: share of right answers among the pilots of each token.
      logprob: of each token in the policy at temperature 1, nats.
    """
    logprob = jnp.asarray(logprob)
    weight = jnp.exp(logprob - jnp.max(logprob, axis=-1, keepdims=True))
    p = weight / jnp.sum(weight, axis=-1, keepdims=True)
    told = binary_entropy(jnp.sum(p * rate, axis=-1)) - jnp.sum(p * binary_entropy(rate), axis=-1)
    # Equal rates say nothing, and rounding must not rank them.
    return jnp.where(rate[..., 0] == rate[..., 1], 0.0, jnp.maximum(told, 0.0))


def spread_scores(
    score: Float32[AnyArray, "N C"],
    position: Int[AnyArray, "N C"],
    valid: Bool[AnyArray, "N C"],
    size: int,
) -> Float32[Array, "N {size}"]:
    """Put scores of candidates at their tokens, and -inf at the `size` tokens of a response that are none.

    Args:
      score: of each candidate.
      position: of each candidate, no two of a trajectory the same where valid.
      valid: which candidates there are.
      size: S.
    """
    at = (position[:, :, None] == jnp.arange(size)[None, None]) & valid[:, :, None]
    return jnp.max(jnp.where(at, score[:, :, None], -jnp.inf), axis=1, initial=-jnp.inf)


def ranked(
    score: Float32[AnyArray, "N S"], between_equals: Float32[AnyArray, "N S"]
) -> Float32[Array, "N S"]:
    """Replace scores by their ranks, from 0 up; equal scores are ranked by a second one; -inf stays."""
    order = jnp.lexsort((between_equals, score), axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.float32)
    return jnp.where(jnp.isneginf(score), -jnp.inf, rank)
