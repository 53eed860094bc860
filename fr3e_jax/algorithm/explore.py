"""Where to return to: token entropy, positions, states.

Symbols (arXiv 2507.07017): H_t is the entropy of the policy before token t is drawn, T_k the
position of the k-th most uncertain token, S_j the state that a rollout restarts from.
A position t counts the tokens of the response, from 0; its state is the query and the response
tokens *before* t, so the uncertain token itself is drawn again.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

PositionRule = Literal["entropy", "surprisal", "random", "uniform"]
KeepRule = Literal["first_of_each", "random_of_each", "all"]


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


def keep_trajectories(reward: Array, rule: KeepRule, key: Array) -> Array:
    """Choose the base trajectories to explore.

    Args:
      reward: float32 [B, R]; a trajectory is correct where its reward is 1.
      rule: `first_of_each` keeps the first correct and the first wrong trajectory of a query (the
        release), `random_of_each` one of each at random, `all` every trajectory.
      key: PRNG keys [B], read by `random_of_each` only.

    Returns:
      bool [B, R].
    """
    if rule == "all":
        return jnp.ones(reward.shape, bool)
    correct = reward >= 1.0
    if rule == "random_of_each":
        order = jax.vmap(lambda k: jax.random.uniform(k, reward.shape[1:]))(key)
    else:
        order = jnp.broadcast_to(jnp.arange(reward.shape[1], dtype=jnp.float32), reward.shape)

    def first(eligible: Array) -> Array:
        best = jnp.argmin(jnp.where(eligible, order, jnp.inf), axis=1)
        chosen = jnp.arange(reward.shape[1])[None, :] == best[:, None]
        return chosen & eligible

    return first(correct) | first(~correct)


def choose_positions(score: Array, length: Array, count: int, min_gap: int = 0) -> tuple[Array, Array]:
    """The `count` highest-scoring positions of each trajectory, in ascending order.

    Paper: score = token entropy. The released code scores by surprisal. Position 0 is
    never chosen, because its state would repeat the root; a trajectory with fewer eligible positions
    than `count` gets fewer, and the rest are marked invalid. Ties go to the earlier position.

    Args:
      score: float32 [N, S], one per response token.
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
      rule: `entropy` (paper), `surprisal` (release: the lowest log-probability of the drawn token),
        `random`, `uniform`.
      entropy: float32 [N, S], nats.
      logprob: float32 [N, S], of the drawn tokens.
      length: int32 [N].
      count: K.
      min_gap: as in `choose_positions`.
      key: PRNG keys [N], read by `random` only.

    Returns:
      (position int32 [N, K], valid bool [N, K]).
    """
    if rule == "uniform":
        return uniform_positions(length, count, min_gap)
    if rule == "random":
        score = jax.vmap(lambda k: jax.random.uniform(k, entropy.shape[1:]))(key)
    else:
        score = entropy if rule == "entropy" else -logprob
    return choose_positions(score, length, count, min_gap)


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
