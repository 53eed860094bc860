"""Where to return to: the rules of `explore.rule`, which score the tokens of base trajectories."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32, Key

from fr3e_jax.algorithm.choose import choose_positions, uniform_positions
from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N base trajectories as a position rule sees them."""

    entropy: Float32[AnyArray, "N S"]
    """Entropy of the policy before each token was drawn, nats; 0 from the length on."""
    logprob: Float32[AnyArray, "N S"]
    """Of the drawn tokens, nats; 0 from the length on."""
    length: Int[AnyArray, " N"]
    """How many tokens each response has."""
    key: Key[Array, " N"]
    count: int
    """K, the number of positions that are wanted."""
    min_gap: int
    """Least distance of two positions, tokens."""
    wanted: Int[AnyArray, " N"] | None = None
    """How many positions each trajectory gets at most; None: K."""


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


POSITION_RULES: dict[str, Rule[PositionFunction]] = {
    "entropy": Rule(by_entropy, "the most uncertain tokens (paper)"),
    "surprisal": Rule(by_surprisal, "the least likely drawn tokens (release)"),
    "random": Rule(at_random, "any tokens (ours, an ablation)"),
    "uniform": Rule(evenly, "the middles of equal parts (ours, an ablation)"),
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
