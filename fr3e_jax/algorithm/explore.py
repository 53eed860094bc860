"""Where to return to: token entropy, positions, states.

Symbols (arXiv 2507.07017): H_t is the entropy of the policy before token t is drawn, T_k the
position of the k-th most uncertain token, S_j the state that a rollout restarts from.
A position t counts the tokens of the response, from 0; its state is the query and the response
tokens *before* t, so the uncertain token itself is drawn again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32, Key

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.types import AnyArray

REWARD_ROUNDING = 1e-6  # by which a weighted mean of parts may miss the number that it should be


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


PositionFunction = Callable[[Trajectories], Float32[Array, "N S"]]
"""Trajectories -> scores: the tokens with the highest become positions, and one with -inf never does."""

KeepFunction = Callable[[Float32[Array, "B R"], Bool[Array, "B R"], Key[Array, " B"]], Bool[Array, "B R"]]
"""(Rewards, which of them are solved, PRNG keys) -> which trajectories to explore."""

PositionRule = Chosen[PositionFunction]
KeepRule = Chosen[KeepFunction]


def token_entropy(total: Float32[Array, "*axes"], moment: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Compute H = -sum_v pi(v) log pi(v), in nats, of the distribution at temperature 1.

    Paper (first return). The sampler has two sums over the vocabulary, of the logits x less the largest one.
    With them H = log Z - (sum_v x e^x) / Z.

    Args:
      total: Z, the sum of e^x.
      moment: the sum of x e^x; a token of probability 0 adds 0.
    """
    return jnp.log(total) - moment / total


def solved(reward: Any, success_at: float) -> Any:
    """Tell whether an answer of this reward counts as correct: whether the reward is at least `success_at`.

    Args:
      reward: a number, or an array of any shape.
      success_at: reward.success_at, in (0, 1].

    Returns:
      bool, of the shape of `reward`.
    """
    return reward >= success_at - REWARD_ROUNDING


def keep_first_of_each(
    reward: Float32[AnyArray, "B R"], correct: Bool[AnyArray, "B R"], key: Key[Array, " B"]
) -> Bool[Array, "B R"]:
    """Keep the first correct and the first wrong trajectory of each query."""
    return one_of_each(correct, jnp.arange(reward.shape[1], dtype=jnp.float32))


def keep_random_of_each(
    reward: Float32[AnyArray, "B R"], correct: Bool[AnyArray, "B R"], key: Key[Array, " B"]
) -> Bool[Array, "B R"]:
    """Keep a correct and a wrong trajectory of each query, drawn at random."""
    return one_of_each(correct, jax.vmap(lambda k: jax.random.uniform(k, reward.shape[1:]))(key))


def keep_all(
    reward: Float32[AnyArray, "B R"], correct: Bool[AnyArray, "B R"], key: Key[Array, " B"]
) -> Bool[Array, "B R"]:
    """Keep all R base trajectories of every query, whatever their rewards."""
    return jnp.ones(reward.shape, bool)


def one_of_each(correct: Bool[AnyArray, "B R"], order: Float32[Array, "*B R"]) -> Bool[Array, "B R"]:
    """Keep the correct and the wrong trajectory of each query whose `order` is least."""
    order = jnp.broadcast_to(order, correct.shape)

    def first(eligible: Array) -> Array:
        best = jnp.argmin(jnp.where(eligible, order, jnp.inf), axis=1)
        chosen = jnp.arange(correct.shape[1])[None, :] == best[:, None]
        return chosen & eligible

    return first(correct) | first(~correct)


KEEP_RULES: dict[str, Rule[KeepFunction]] = {
    "first_of_each": Rule(keep_first_of_each, "the first correct and the first wrong of a query (release)"),
    "random_of_each": Rule(keep_random_of_each, "one correct and one wrong of a query, at random (ours)"),
    "all": Rule(keep_all, "every one (ours)"),
}


def keep_trajectories(
    reward: Float32[AnyArray, "B R"],
    rule: str | KeepFunction,
    key: Key[Array, " B"],
    success_at: float = 1.0,
) -> Bool[AnyArray, "B R"]:
    """Choose the base trajectories to explore.

    Args:
      reward: of each base trajectory.
      rule: a name in KEEP_RULES, or a function.
      key: PRNG keys.
      success_at: least reward of a correct trajectory.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    kept = function_of(KEEP_RULES, rule)(reward, solved(reward, success_at), key)
    return of_shape(kept, reward.shape, "kept trajectories [B, R]")


def choose_positions(
    score: Float32[AnyArray, "N S"], length: Int[AnyArray, " N"], count: int, min_gap: int = 0
) -> tuple[Int32[Array, "N {count}"], Bool[Array, "N {count}"]]:
    """Choose the `count` highest-scoring positions of each trajectory, in ascending order.

    Paper: score = token entropy. The released code scores by surprisal. Position 0 is
    never chosen, because its state would repeat the root; a trajectory with fewer eligible positions
    than `count` gets fewer, and the rest are marked invalid. Ties go to the earlier position.

    Args:
      score: one per response token; -inf is never chosen.
      length: tokens of the response.
      count: K.
      min_gap: positions are at least this far apart; 0 and 1 both mean "any two differ".

    Returns:
      (position, whether it is valid); invalid positions come last and read 0.
    """
    n, s = score.shape
    index = jnp.arange(s)[None, :]
    eligible = (index >= 1) & (index < length[:, None])

    def pick(eligible: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        position = jnp.argmax(jnp.where(eligible, score, -jnp.inf), axis=1)
        valid = jnp.take_along_axis(eligible, position[:, None], axis=1)[:, 0]
        near = jnp.abs(index - position[:, None]) < max(min_gap, 1)
        return eligible & ~near, (position, valid)

    if count == 0:
        return jnp.zeros((n, 0), jnp.int32), jnp.zeros((n, 0), bool)
    _, (position, valid) = jax.lax.scan(pick, eligible, None, length=count)
    ordered = jnp.sort(jnp.where(valid, position, s), axis=0).T
    valid = ordered < s
    return jnp.where(valid, ordered, 0).astype(jnp.int32), valid


def uniform_positions(
    length: Int[AnyArray, " N"], count: int, min_gap: int = 0
) -> tuple[Int32[Array, "N {count}"], Bool[Array, "N {count}"]]:
    """Choose evenly spaced positions, the middles of `count` equal parts.

    This is the ablation that ignores the model.

    Args:
      length: tokens of the response.
      count: K.
      min_gap: as in `choose_positions`; a short response may get fewer positions than would fit.

    Returns:
      (position, whether it is valid), as `choose_positions` does.
    """
    candidates = jnp.maximum(length - 1, 0)[:, None]
    fitting = jnp.maximum(candidates // max(min_gap, 1), jnp.minimum(candidates, 1))
    parts = jnp.minimum(count, fitting)
    k = jnp.arange(count)[None, :]
    position = 1 + ((2 * k + 1) * candidates) // jnp.maximum(2 * parts, 1)
    valid = k < parts
    return jnp.where(valid, position, 0).astype(jnp.int32), valid


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
    position, valid = uniform_positions(base.length, base.count, base.min_gap)
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
    return choose_positions(score, base.length, base.count, base.min_gap)


def states_of(
    position: Int[AnyArray, "N K"], valid: Bool[AnyArray, "N K"]
) -> tuple[Int32[Array, "N K+1"], Bool[Array, "N K+1"]]:
    """Add the root to the positions: S_0 = the bare query, S_j = the query and the response before T_j.

    Returns:
      (prefix_length, whether the state is valid) of J = K + 1 states; prefix_length counts response tokens
      and is 0 for the root.
    """
    n = position.shape[0]
    prefix_length = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), position], axis=1)
    return prefix_length, jnp.concatenate([jnp.ones((n, 1), bool), valid], axis=1)
