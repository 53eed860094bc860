"""Where to return to: the rules of `explore.rule`, which score the tokens of base trajectories."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32

from fr3e_jax.algorithm.choose import choose_positions, uniform_positions
from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.algorithm.trajectories import Trajectories
from fr3e_jax.types import AnyArray

PositionFunction = Callable[[Trajectories], Float32[Array, "N S"]]
"""Trajectories -> scores: the tokens with the highest become positions, and one with -inf never does."""

PositionRule = Chosen[PositionFunction]


def by_entropy(base: Trajectories) -> Float32[AnyArray, "N S"]:
    """Score each token by the entropy before it was drawn, nats: the most uncertain come first. Paper."""
    return base.entropy


def by_surprisal(base: Trajectories) -> Float32[AnyArray, "N S"]:
    """Score each token by how unlikely it was when drawn, -log pi, nats. Release."""
    return -base.logprob


def at_random(base: Trajectories) -> Float32[Array, "N S"]:
    """Score each token by a random number in [0, 1), so that all positions are as likely."""
    return jax.vmap(lambda k: jax.random.uniform(k, base.entropy.shape[1:]))(base.key)


def evenly(base: Trajectories) -> Float32[Array, "N S"]:
    """Score the middles of equal parts of a response 0, and all other tokens -inf: never chosen."""
    position, valid = uniform_positions(base.length, base.count, base.min_gap, base.wanted)
    index = jnp.arange(base.entropy.shape[1])[None, None, :]
    chosen = jnp.any((index == position[:, :, None]) & valid[:, :, None], axis=1)
    return jnp.where(chosen, 0.0, -jnp.inf)


def by_gradient(base: Trajectories) -> Float32[AnyArray, "N S"]:
    """Score each token by ||W^T (e_y - p)||, the norm of its log-probability's gradient.

    The gradient is that with respect to the last hidden state: W is the LM head, p the policy before the
    token y was drawn. It is the distance of y's row of W from the mean row under p: unlike surprisal and
    entropy, it is small where the tokens that could have been drawn have similar rows.
    """
    return jnp.asarray(base.measured("gradient"))


def by_attention(base: Trajectories) -> Float32[Array, "N S"]:
    """Score each token by the attention that later tokens pay to it, over what is usual (arXiv 2609.08650).

    Usual is what a token with as many later ones, at the same distances, receives on average in this answer.
    Were all tokens alike, the score would be 1 everywhere. The total alone would be highest at the beginning,
    which most tokens follow. The mean over later tokens would be highest at the end, where all of the few
    later tokens are near.
    """
    received, at = base.measured("attention"), base.measured("attention_at")
    size = received.shape[1]
    index, run = jnp.arange(size)[None, :], base.length[:, None] - 1  # the last token is never run
    pairs = jnp.maximum(run - index, 1)
    usual = jnp.cumsum(jnp.where((index >= 1) & (index < run), at / pairs, 0.0), axis=1)
    later = run - 1 - index  # tokens after each one, so that they are 1 to `later` away
    expected = jnp.take_along_axis(usual, jnp.clip(later, 0, size - 1), axis=1)
    return jnp.where((later > 0) & (expected > 0), received / jnp.where(expected > 0, expected, 1.0), 0.0)


def by_sentence(base: Trajectories) -> Float32[Array, "N S"]:
    """Score the first token of each sentence by the sentence's mean entropy, nats; all others -inf.

    Source: arXiv 2609.08650. A response of fewer sentences than positions gets fewer positions.
    """
    begins, size = base.measured("sentence"), base.entropy.shape[1]
    number = jnp.cumsum(begins, axis=1)  # 0 is what stands before the first
    within = jnp.arange(size)[None, :] < base.length[:, None]

    def total(x: Array, number: Array) -> Array:
        return jax.ops.segment_sum(x, number, num_segments=size + 1)[number]

    entropy = jax.vmap(total)(jnp.where(within, base.entropy, 0.0), number)
    tokens = jax.vmap(total)(within.astype(jnp.float32), number)
    return jnp.where(begins & within, entropy / jnp.maximum(tokens, 1.0), -jnp.inf)


POSITION_RULES: dict[str, Rule[PositionFunction]] = {
    "entropy": Rule(by_entropy, "the most uncertain tokens (paper)"),
    "surprisal": Rule(by_surprisal, "the least likely drawn tokens (release)"),
    "random": Rule(at_random, "any tokens (ours, an ablation)"),
    "uniform": Rule(evenly, "the middles of equal parts (ours, an ablation)"),
    "gradient": Rule(
        by_gradient, "the tokens whose log-probability has the largest gradient (ours)", needs=("gradient",)
    ),
    "attention": Rule(
        by_attention, "the tokens that later ones attend to most (arXiv 2609.08650)", needs=("attention",)
    ),
    "sentence": Rule(
        by_sentence, "beginnings of the most uncertain sentences (arXiv 2609.08650)", needs=("sentence",)
    ),
}


def positions_of(
    rule: str | PositionFunction, base: Trajectories
) -> tuple[Int32[Array, "N K"], Bool[Array, "N K"]]:
    """Find the positions of each trajectory by a rule: K = `base.count`.

    Args:
      rule: a name in POSITION_RULES, or a function.
      base: the trajectories.

    Returns:
      (position, whether it is valid), as `choose_positions` does.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    score = of_shape(function_of(POSITION_RULES, rule)(base), base.entropy.shape, "scores [N, S]")
    return choose_positions(score, base.length, base.count, base.min_gap, base.wanted)
