"""Which base trajectories are explored: the rules of `explore.keep`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32, Key

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.algorithm.success import solved
from fr3e_jax.types import AnyArray

KeepFunction = Callable[[Float32[Array, "B R"], Bool[Array, "B R"], Key[Array, " B"]], Bool[Array, "B R"]]
"""(Rewards, which of them are solved, PRNG keys) -> which trajectories to explore."""
KeepRule = Chosen[KeepFunction]


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


def keep_first_wrong(
    reward: Float32[AnyArray, "B R"], correct: Bool[AnyArray, "B R"], key: Key[Array, " B"]
) -> Bool[Array, "B R"]:
    """Keep the first wrong trajectory of each query, and no correct one (DEEP-GRPO, arXiv 2602.14169).

    One and not all of them: exploration costs at most half of what it does with one of each, however weak the
    model is. A query whose trajectories are all correct is not explored.
    """
    return one_of_each(correct, jnp.arange(reward.shape[1], dtype=jnp.float32)) & ~correct


def keep_of_hardest(
    reward: Float32[AnyArray, "B R"], correct: Bool[AnyArray, "B R"], key: Key[Array, " B"]
) -> Bool[Array, "B R"]:
    """Keep the first correct and the first wrong trajectory of the hardest half of the queries.

    The hardest are those with the lowest mean reward above 0, so that some answer to them is known; those of
    equal rewards in their order. Of B queries, B / 2 are explored, rounded up, or as many as have a reward
    above 0, if these are fewer.
    """
    mean = jnp.mean(reward, axis=1)
    hardness = jnp.where(mean > 0, mean, jnp.inf)
    rank = jnp.argsort(jnp.argsort(hardness, stable=True), stable=True)
    hardest = (mean > 0) & (rank < (reward.shape[0] + 1) // 2)
    return one_of_each(correct, jnp.arange(reward.shape[1], dtype=jnp.float32)) & hardest[:, None]


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
    "wrong": Rule(keep_first_wrong, "the first wrong of a query, no correct one (arXiv 2602.14169)"),
    "hardest": Rule(
        keep_of_hardest, "first_of_each of the half of the queries with the lowest rewards above 0 (ours)"
    ),
}


def keep_trajectories(
    reward: Float32[AnyArray, "B R"],
    rule: str | KeepFunction,
    key: Key[Array, " B"],
    success_at: float = 1.0,
    counted: Bool[AnyArray, "B R"] | None = None,
) -> Bool[AnyArray, "B R"]:
    """Choose the base trajectories to explore.

    Args:
      reward: of each base trajectory.
      rule: a name in KEEP_RULES, or a function.
      key: PRNG keys.
      success_at: least reward of a correct trajectory.
      counted: which trajectories count; None: all. The others are not kept: to the rule each is one more of
        the trajectory that counts before it, or after it where none is before.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    if counted is not None:
        stands_for = nearest_counted(counted)
        reward = jnp.take_along_axis(reward, stands_for, axis=1)
    kept = function_of(KEEP_RULES, rule)(reward, solved(reward, success_at), key)
    kept = of_shape(kept, reward.shape, "kept trajectories [B, R]")
    if counted is None:
        return kept
    rows = jnp.arange(reward.shape[0])[:, None]
    return jnp.zeros(kept.shape, bool).at[rows, stands_for].max(kept) & counted


def nearest_counted(counted: Bool[AnyArray, "B R"]) -> Int32[Array, "B R"]:
    """Find, for each trajectory, itself if it counts, else the last before it that does, else the first."""
    index = jnp.arange(counted.shape[1], dtype=jnp.int32)[None, :]
    last = jax.lax.cummax(jnp.where(counted, index, -1), axis=1)
    return jnp.where(last < 0, jnp.argmax(counted, axis=1)[:, None].astype(jnp.int32), last)
