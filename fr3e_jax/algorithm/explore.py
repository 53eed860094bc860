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

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape

REWARD_ROUNDING = 1e-6  # by which a weighted mean of parts may miss the number that it should be


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N base trajectories as a position rule sees them.

    entropy: float32 [N, S], nats, 0 behind the length. logprob: float32 [N, S], of the drawn tokens.
    length: int32 [N], response tokens that are real. key: PRNG keys [N]. count: K, positions that are wanted.
    min_gap: least distance of two.
    """

    entropy: Array
    logprob: Array
    length: Array
    key: Array
    count: int
    min_gap: int


PositionFunction = Callable[[Trajectories], Array]
"""Scores float32 [N, S]: the highest become positions, and -inf never does."""

KeepFunction = Callable[[Array, Array, Array], Array]
"""Of rewards float32 [B, R], which of them are solved, bool [B, R], and PRNG keys [B]: the trajectories to
explore, bool [B, R]."""

PositionRule = Chosen[PositionFunction]
KeepRule = Chosen[KeepFunction]


def token_entropy(total: Array, moment: Array) -> Array:
    """H = -sum_v pi(v) log pi(v), in nats, of the distribution at temperature 1.

    Paper (first return). From two sums over the vocabulary, which the sampler has of the logits x less the
    largest one: H = log Z - (sum_v x e^x) / Z.

    Args:
      total: float32 [...], Z, the sum of e^x.
      moment: float32 [...], the sum of x e^x; a token of probability 0 adds 0.

    Returns:
      float32 [...].
    """
    return jnp.log(total) - moment / total


def solved(reward: Any, success_at: float) -> Any:
    """Whether an answer of this reward counts as correct: whether the reward is at least `success_at`.

    Args:
      reward: a number, or an array of any shape.
      success_at: reward.success_at, in (0, 1].

    Returns:
      bool, of the shape of `reward`.
    """
    return reward >= success_at - REWARD_ROUNDING


def keep_first_of_each(reward: Array, correct: Array, key: Array) -> Array:
    """The first correct and the first wrong trajectory of each query."""
    return one_of_each(correct, jnp.arange(reward.shape[1], dtype=jnp.float32))


def keep_random_of_each(reward: Array, correct: Array, key: Array) -> Array:
    """A correct and a wrong trajectory of each query, at random."""
    return one_of_each(correct, jax.vmap(lambda k: jax.random.uniform(k, reward.shape[1:]))(key))


def keep_all(reward: Array, correct: Array, key: Array) -> Array:
    """Keep all R base trajectories of every query, whatever their rewards. bool [B, R]."""
    return jnp.ones(reward.shape, bool)


def one_of_each(correct: Array, order: Array) -> Array:
    """The correct and the wrong trajectory of each query that come first in `order`, [R] or [B, R]."""
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


def keep_trajectories(reward: Array, rule: KeepRule, key: Array, success_at: float = 1.0) -> Array:
    """Choose the base trajectories to explore.

    Args:
      reward: float32 [B, R].
      rule: a name in KEEP_RULES, or a function.
      key: PRNG keys [B].
      success_at: least reward of a correct trajectory.

    Returns:
      bool [B, R].

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    kept = function_of(KEEP_RULES, rule)(reward, solved(reward, success_at), key)
    return of_shape(kept, reward.shape, "kept trajectories [B, R]")


def choose_positions(score: Array, length: Array, count: int, min_gap: int = 0) -> tuple[Array, Array]:
    """The `count` highest-scoring positions of each trajectory, in ascending order.

    Paper: score = token entropy. The released code scores by surprisal. Position 0 is
    never chosen, because its state would repeat the root; a trajectory with fewer eligible positions
    than `count` gets fewer, and the rest are marked invalid. Ties go to the earlier position.

    Args:
      score: float32 [N, S], one per response token; -inf is never chosen.
      length: int32 [N], response tokens that are real.
      count: K.
      min_gap: positions are at least this far apart; 0 and 1 both mean "any two differ".

    Returns:
      (position int32 [N, K], valid bool [N, K]); invalid positions come last and read 0.
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


def uniform_positions(length: Array, count: int, min_gap: int = 0) -> tuple[Array, Array]:
    """Evenly spaced positions, the ablation that ignores the model: the middles of `count` equal parts.

    Args:
      length: int32 [N], response tokens that are real.
      count: K.
      min_gap: as in `choose_positions`; a short response may get fewer positions than would fit.

    Returns:
      (position int32 [N, K], valid bool [N, K]), as `choose_positions` does.
    """
    candidates = jnp.maximum(length - 1, 0)[:, None]
    fitting = jnp.maximum(candidates // max(min_gap, 1), jnp.minimum(candidates, 1))
    parts = jnp.minimum(count, fitting)
    k = jnp.arange(count)[None, :]
    position = 1 + ((2 * k + 1) * candidates) // jnp.maximum(2 * parts, 1)
    valid = k < parts
    return jnp.where(valid, position, 0).astype(jnp.int32), valid


def by_entropy(base: Trajectories) -> Array:
    """Score each token by the entropy before it was drawn, nats: the most uncertain come first. Paper."""
    return base.entropy


def by_surprisal(base: Trajectories) -> Array:
    """Score each token by how unlikely it was when drawn, -log pi, nats. Release."""
    return -base.logprob


def at_random(base: Trajectories) -> Array:
    """Score each token by a random number in [0, 1), so that all positions are as likely."""
    return jax.vmap(lambda k: jax.random.uniform(k, base.entropy.shape[1:]))(base.key)


def evenly(base: Trajectories) -> Array:
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
    rule: PositionRule,
    entropy: Array,
    logprob: Array,
    length: Array,
    count: int,
    min_gap: int,
    key: Array,
) -> tuple[Array, Array]:
    """The positions of each trajectory by the rule of the run.

    Args:
      rule: a name in POSITION_RULES, or a function.
      entropy: float32 [N, S], nats.
      logprob: float32 [N, S], of the drawn tokens.
      length: int32 [N].
      count: K.
      min_gap: as in `choose_positions`.
      key: PRNG keys [N].

    Returns:
      (position int32 [N, K], valid bool [N, K]).

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    base = Trajectories(entropy, logprob, length, key, count, min_gap)
    score = function_of(POSITION_RULES, rule)(base)
    return choose_positions(of_shape(score, entropy.shape, "scores [N, S]"), length, count, min_gap)


def states_of(position: Array, valid: Array) -> tuple[Array, Array]:
    """S_0 = the bare query, S_j = the query and the response before position T_j.

    Args:
      position: int32 [N, K].
      valid: bool [N, K].

    Returns:
      (prefix_length int32 [N, J], valid bool [N, J]) with J = K + 1; prefix_length counts response
      tokens and is 0 for the root.
    """
    n = position.shape[0]
    prefix_length = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), position], axis=1)
    return prefix_length, jnp.concatenate([jnp.ones((n, 1), bool), valid], axis=1)
