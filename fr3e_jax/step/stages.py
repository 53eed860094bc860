"""The stages of a round that choose and reckon, on the devices: kept trajectories, states, credit.

Functions of algorithm/ with the settings of a run, compiled for the mesh. Each can be called alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float32, Int32, Key

from fr3e_jax.algorithm.amounts import LEAST_POSITIONS, LEAST_ROLLOUTS, adapted_amount
from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.keep import keep_trajectories
from fr3e_jax.algorithm.positions import POSITION_RULES, positions_of
from fr3e_jax.algorithm.reject import accept_states, trained_rows
from fr3e_jax.algorithm.rules import function_of
from fr3e_jax.algorithm.states import states_of
from fr3e_jax.algorithm.trajectories import Measures, Trajectories
from fr3e_jax.config import CreditConfig, ExploreConfig, with_functions
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import row_key
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import AnyArray, Queries, Rollouts, States, pytree


@pytree
class Draws:
    """What all randomness of a step is a function of, beside query, branch and position; on all devices."""

    tokens: Key[Array, ""]
    """For the tokens that are drawn."""
    choices: Key[Array, ""]
    """For the trajectories and positions that are chosen."""
    evaluation: Key[Array, ""]
    """For the tokens of answers to held-out problems."""
    step: Int32[Array, ""]


def draws_of(seed: int, step: int, placement: Placement) -> Draws:
    """The randomness of a step of a run with a seed."""
    at = placement.sharding()
    tokens, choices, evaluation = (make_key(seed, purpose, at) for purpose in range(3))
    return Draws(tokens, choices, evaluation, placement.place(np.int32(step)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_key(seed: int, purpose: int, at: NamedSharding) -> Array:
    """A key of a seed, made where it is to lie."""
    return jax.lax.with_sharding_constraint(jax.random.fold_in(jax.random.key(seed), purpose), at)


def keep(
    rules: ExploreConfig,
    draws: Draws,
    query: Int32[Array, " B"],
    base_reward: Float32[Array, "B R"],
    success_at: float = 1.0,
    counted: Bool[AnyArray, "B R"] | None = None,
) -> Bool[Array, "B R"]:
    """Stage 4: which base trajectories are explored.

    Args:
      rules: names or functions.
      query: the queries' places in the stream.
      base_reward: of the base trajectories.
      success_at: least reward of a trajectory that is correct.
      counted: which trajectories count, and may be explored; None: all.
    """
    return compiled_keep(with_functions(rules), draws, query, base_reward, success_at, counted)


@functools.partial(jax.jit, static_argnames=("rules", "success_at"))
def compiled_keep(
    rules: ExploreConfig,
    draws: Draws,
    query: Array,
    base_reward: Array,
    success_at: float,
    counted: Array | None = None,
) -> Array:
    """`keep` of rules that are functions."""
    keys = jax.vmap(row_key, (None, None, 0, None))(draws.choices, draws.step, query, 0)
    return keep_trajectories(base_reward, rules.keep, keys, success_at, counted)


def find_states(
    rules: ExploreConfig,
    engine: Engine,
    draws: Draws,
    queries: Queries,
    base: Rollouts,
    kept: Bool[np.ndarray, "B R"],
    sampled: Rollouts,
    root_value: Float32[np.ndarray, " B"] | None = None,
    measures: Measures | None = None,
) -> tuple[States, States]:
    """Stages 5 and 6: the states of kept trajectories.

    The kept trajectories are padded to a bucket, with some that have no valid state, so that few shapes
    are compiled.

    Args:
      rules: how positions are chosen.
      engine: what samples from the states, and lays trajectories out for its mesh.
      queries, base: of the round, on the host; base trajectories have leaves [B, R, S].
      kept: which are explored.
      sampled: base trajectories as they lie on the devices; longer than `base` where a stop text was cut off.
      root_value: V(root) of the queries, where `rules.adaptive`; the same on every process.
      measures: what the rule needs beyond (`measure_trajectories`).

    Returns:
      (states on the host, the same on the devices).
    """
    query, trajectory, real = engine.arrange(kept)
    place = engine.placement.place_rows
    where = place((queries.index[query], query, trajectory, real))
    value = None if root_value is None else place(root_value[query])
    placed = choose_states(
        rules, engine.placement, draws, sampled, place(base.length), *where, value, measures
    )
    prefix_length, valid, rollouts = gather((placed.prefix_length, placed.valid, placed.rollouts))
    response = base.token[query, trajectory]
    return States(query, trajectory, response, prefix_length, valid, rollouts), placed


def choose_states(rules: ExploreConfig, placement: Placement, draws: Draws, *rest: Any) -> States:
    """`compiled_states` of rules that are names or functions; the arguments are its."""
    return compiled_states(with_functions(rules), placement.mesh, draws, *rest)


@functools.partial(jax.jit, static_argnames=("rules", "mesh"))
def compiled_states(
    rules: ExploreConfig,
    mesh: Mesh,
    draws: Draws,
    base: Rollouts,
    length: Int32[AnyArray, "B R"],
    index: Int32[AnyArray, " N"],
    query: Int32[AnyArray, " N"],
    trajectory: Int32[AnyArray, " N"],
    real: Bool[AnyArray, " N"],
    value: Float32[AnyArray, " N"] | None = None,
    measures: Measures | None = None,
) -> States:
    """Stages 5 and 6 on the devices: the states of N kept trajectories, each in the part of its query.

    Args:
      rules: functions.
      base: leaves [B, R, S].
      length: tokens of each that count.
      index: the queries' places in the stream.
      query, trajectory: row and column of the kept trajectories in `base`.
      real: False where a row is only padding.
      value: V(root) of the query of each kept trajectory, by which positions and rollouts are fewer; None:
        all have as many.
      measures: of the N trajectories, what the rule needs.
    """
    placement = Placement(mesh)
    response, trajectories = trajectories_of(
        rules, mesh, draws, base, length, index, query, trajectory, value, measures
    )
    rollouts = None if value is None else adapted_amount(rules.rollouts, value, LEAST_ROLLOUTS)
    position, valid = positions_of(rules.rule, trajectories)
    prefix_length, valid = states_of(position, valid)
    states = States(query, trajectory, response, prefix_length, valid & real[:, None], rollouts)
    return jax.tree.map(lambda x: placement.shard(x, "batch"), states)


def trajectories_of(
    rules: ExploreConfig,
    mesh: Mesh,
    draws: Draws,
    base: Rollouts,
    length: Array,
    index: Array,
    query: Array,
    trajectory: Array,
    value: Array | None,
    measures: Measures | None,
) -> tuple[Array, Trajectories]:
    """Lay kept trajectories out as a position rule sees them; the arguments are those of `compiled_states`.

    Returns:
      (ids of each, int32 [N, S], what a rule sees of them).
    """
    placement, parts = Placement(mesh), row_parts(mesh)
    per_part = length.shape[0] // parts

    def take(x: Array) -> Array:
        """[B, R, ...] -> [N, ...], each part of the mesh its own rows."""
        rows = jax.vmap(lambda x, n, r: x[n, r], spmd_axis_name=BATCH_AXES)(
            x.reshape(parts, per_part, *x.shape[1:]),
            query.reshape(parts, -1) % per_part,
            trajectory.reshape(parts, -1),
        )
        return placement.shard(rows.reshape(-1, *x.shape[2:]), "batch")

    count = take(length)
    counts = jnp.arange(base.token.shape[2])[None, :] < count[:, None]
    response, entropy, logprob = (
        jnp.where(counts, take(x), 0) for x in (base.token, base.entropy, base.logprob)
    )
    # Branch numbers from 1: 0 chose the trajectories.
    keys = jax.vmap(row_key, (None, None, 0, 0))(draws.choices, draws.step, index, 1 + trajectory)
    wanted = None if value is None else adapted_amount(rules.positions, value, LEAST_POSITIONS)
    trajectories = Trajectories(
        entropy=entropy,
        logprob=logprob,
        length=count,
        key=keys,
        count=rules.positions,
        min_gap=rules.min_gap,
        wanted=wanted,
        measures=measures or Measures(),
    )
    return response, trajectories


@functools.partial(jax.jit, static_argnames=("rules", "mesh"))
def compiled_scores(
    rules: ExploreConfig, mesh: Mesh, position: Int32[AnyArray, "N K"], *arguments: Any
) -> Float32[Array, "N K"]:
    """Score the tokens at positions by the rule that chose them; the others are as for `trajectories_of`."""
    _, trajectories = trajectories_of(rules, mesh, *arguments)
    score = function_of(POSITION_RULES, rules.rule)(trajectories)
    return Placement(mesh).shard(jnp.take_along_axis(score, position, axis=1), "batch")


@pytree
class Credit:
    """The credit of the states of kept trajectories; a state has M rows, and with `edge` one more."""

    advantage: Float32[AnyArray, "N J rows"]
    value: Float32[AnyArray, "N J"]
    alpha: Float32[AnyArray, "N J"]
    accepted: Bool[AnyArray, "N J"]
    """The states that go to the learner."""
    trained: Bool[AnyArray, "N J rows"] | None
    """What of them is trained on; None: all."""


def assign_credit(
    credit: CreditConfig,
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    query: Int32[AnyArray, " N"],
    counted: Bool[AnyArray, "N J M"] | None = None,
    base_reward: Float32[AnyArray, " N"] | None = None,
    base_counted: Bool[AnyArray, " N"] | None = None,
) -> Credit:
    """Stage 9: the credit of the states of kept trajectories.

    Args:
      credit: names or functions.
      reward: of the partial rollouts, whole answers.
      valid: which states there are.
      query: row of the round's queries, of each trajectory.
      counted: which rollouts count; None: all.
      base_reward, base_counted: of the kept trajectories, and which of them count, for the estimator `edge`.
    """
    return compiled_credit(with_functions(credit), reward, valid, query, counted, base_reward, base_counted)


@functools.partial(jax.jit, static_argnames="credit")
def compiled_credit(
    credit: CreditConfig,
    reward: Array,
    valid: Array,
    query: Array,
    counted: Array | None,
    base_reward: Array | None,
    base_counted: Array | None,
) -> Credit:
    """`assign_credit` of rules that are functions."""
    advantage, value, alpha = modulated_advantage(
        reward,
        valid,
        normalize_std=credit.normalize_std,
        modulation=credit.modulation,
        first_state=credit.first_state,
        sharpen=credit.sharpen,
        advantage=credit.advantage,
        counted=counted,
        estimator=credit.estimator,
        baseline=credit.baseline,
        state_weight=credit.state_weight,
        base_reward=base_reward,
        base_counted=base_counted,
    )
    accepted, trained = accept_states(reward, valid, query, credit.reject, counted), counted
    if credit.estimator == "edge":
        every = jnp.ones(reward.shape, bool) if counted is None else counted
        trained = trained_rows(accepted, advantage, valid, every)
        accepted = jnp.any(trained, axis=2)
    return Credit(advantage, value, alpha, accepted, trained)
