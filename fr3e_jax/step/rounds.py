"""One step of FR3E: the pipeline of the paper, one line a stage.

A step samples rounds until enough states carry a gradient, then updates the policy. A round is:

  1. queries            B of them from the stream                       problems/stream
  2. base trajectories  R whole answers to each; every token's entropy  engine/rollout.first_return
  3. rewards            of the base trajectories                        rewards/verify
  4. kept trajectories  one correct, one wrong                          algorithm/explore
  5. positions          the K most uncertain tokens                     algorithm/explore
  6. states             S_0 = the query, S_j = before position T_j      algorithm/explore
  7. partial rollouts   M from each state, on the cached prefixes       engine/rollout.explore
  8. rewards            of the whole answers, while the next round that  rewards/verify
                        is surely needed samples
  9. credit             values, modulated advantages, rejection         algorithm/credit
 10. policy update      clip-higher, once enough states are accepted    learner/update

grpo and grpo++ have no positions: a round is M rollouts from S_0, which stages 2 and 7 both are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float32, Int32, Key

from fr3e_jax.algorithm.credit import accept_states, modulated_advantage
from fr3e_jax.algorithm.explore import Trajectories, keep_trajectories, positions_of, states_of
from fr3e_jax.config import Config, CreditConfig, ExploreConfig, with_functions
from fr3e_jax.cost import Cost, rollout_cost
from fr3e_jax.engine.caches import Caches
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import row_key
from fr3e_jax.learner import groups
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.rewards.verify import Rewards
from fr3e_jax.run.build import Parts, sampling_of
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.metrics import Measured, Metrics, cost_metrics, measure
from fr3e_jax.types import AnyArray, Queries, Rollouts, StateGroups, States, pytree


@pytree
class Draws:
    """What all randomness of a step is a function of, beside query, branch and position; on all devices."""

    tokens: Key[Array, ""]
    """For the tokens that are drawn."""
    choices: Key[Array, ""]
    """For the trajectories and positions that are chosen."""
    step: Int32[Array, ""]


def draws_of(seed: int, step: int, placement: Placement) -> Draws:
    """The randomness of a step of a run with a seed."""
    at = placement.sharding()
    return Draws(make_key(seed, 0, at), make_key(seed, 1, at), placement.place(np.int32(step)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_key(seed: int, purpose: int, at: NamedSharding) -> Array:
    """A key of a seed, made where it is to lie."""
    return jax.lax.with_sharding_constraint(jax.random.fold_in(jax.random.key(seed), purpose), at)


@dataclasses.dataclass(frozen=True)
class Round:
    """A round whose last rewards are being found: stages 1 to 7 are done. All arrays are on the host."""

    queries: Queries
    problems: Any
    """The problem of each query by its row, read when it is asked for."""
    base: Rollouts
    base_reward: Float32[np.ndarray, "B R"] | None
    """None where the base trajectories are what is explored, from S_0."""
    states: States
    rollouts: Rollouts
    rewards: Rewards
    costs: dict[str, Cost]

    @property
    def most(self) -> int:
        """States that it can give, whatever the rewards are."""
        return int(self.states.valid.sum())


def open_round(
    config: Config, parts: Parts, params: Params, step: int, position: int, watch: Stopwatch
) -> Round:
    """Stages 1 to 7, and the beginning of 8: answers are judged while the caller goes on.

    Of what has an entry per token, the base trajectories and the partial rollouts come to the host, once
    each; the states stay on the devices.

    Args:
      params: in the layout for sampling.
      step: the training step that samples.
      position: of the round's first query in the stream.
      watch: takes the time of each stage.

    Raises:
      NotFiniteError: tokens were drawn from logits that are not finite.
    """
    engine, verifier, model = parts.engine, parts.verifier, parts.policy.model.config
    draws, place = draws_of(config.seed, step, engine.placement), engine.placement.place_rows
    with watch.stage("tokenize"):
        queries, problems = parts.stream.take(position, config.rollout.queries)
    placed = place(queries)
    with watch.stage("first_return"):
        sampled, caches, row_steps = first_return(config, engine, params, draws, placed)
        base = gather(sampled)
    require_finite(base, f"step {step}, base trajectories")
    costs = {"first_return": rollout_cost(model, queries, base, int(row_steps))}
    with watch.stage("verify"):
        base_rewards = verifier.base(base, problems)
        base = parts.text.trimmed(base)
    if caches is None:
        return Round(queries, problems, base, None, roots(base), base, base_rewards, costs)
    with watch.stage("verify"):
        base_reward = base_rewards()
    index, placed_reward = place((queries.index, base_reward))
    kept = gather(keep(config.explore, draws, index, placed_reward, config.reward.success_at))
    states, placed_states = find_states(config.explore, engine, draws, queries, base, kept, sampled)
    with watch.stage("explore"):
        rollouts, row_steps = explore(config, engine, params, draws, placed, caches, placed_states)
        rollouts = gather(rollouts)
    require_finite(rollouts, f"step {step}, partial rollouts")
    costs["explore"] = rollout_cost(model, queries, rollouts, int(row_steps), states)
    with watch.stage("verify"):
        rewards = verifier.whole(states, rollouts, problems)
        rollouts = parts.text.trimmed(rollouts, states)
    return Round(queries, problems, base, base_reward, states, rollouts, rewards, costs)


def close_round(
    config: Config, parts: Parts, opened: Round, watch: Stopwatch
) -> tuple[StateGroups, Metrics, dict[str, Any] | None]:
    """The end of stage 8, and 9.

    Returns:
      (accepted states, metrics, a state with two of its continuations for people to read).
    """
    queries, states, rollouts, base = opened.queries, opened.states, opened.rollouts, opened.base
    place = parts.engine.placement.place_rows
    with watch.stage("verify"):
        reward = opened.rewards()
    base_reward = opened.base_reward
    if base_reward is None:
        base_reward, reward = reward, reward[:, None]
    advantage, value, alpha, accepted = gather(
        assign_credit(config.credit, *place((reward, states.valid, states.query)))
    )

    credit = (reward, value, alpha, advantage, accepted)
    restarts = opened.base_reward is not None
    success_at = config.reward.success_at
    metrics = measure(Measured(base, base_reward, states, rollouts, *credit, restarts, success_at))
    metrics |= cost_metrics(opened.costs)
    gathered = groups.collect(accepted, queries, states, rollouts, advantage)
    return gathered, metrics, parts.verifier.excerpt(accepted, states, rollouts, reward, opened.problems)


def first_return(
    config: Config, engine: Engine, params: Params, draws: Draws, queries: Queries
) -> tuple[Rollouts, Caches | None, Array]:
    """Stage 2: R whole answers per query, or M where no other are sampled; all on the devices.

    Returns:
      (rollouts, their KV caches if there is to be exploration, rows decoded).
    """
    explore, sampling = config.explore, sampling_of(config.rollout)
    if explore.positions:
        count = config.rollout.base_trajectories
        return engine.first_return(params, queries, draws.tokens, draws.step, count, sampling)
    count = explore.rollouts
    rollouts, row_steps = engine.sample(params, queries, draws.tokens, draws.step, count, sampling)
    return rollouts, None, row_steps


def keep(
    rules: ExploreConfig,
    draws: Draws,
    query: Int32[Array, " B"],
    base_reward: Float32[Array, "B R"],
    success_at: float = 1.0,
) -> Bool[Array, "B R"]:
    """Stage 4: which base trajectories are explored.

    Args:
      rules: names or functions.
      query: the queries' places in the stream.
      base_reward: of the base trajectories.
      success_at: least reward of a trajectory that is correct.
    """
    return compiled_keep(with_functions(rules), draws, query, base_reward, success_at)


@functools.partial(jax.jit, static_argnames=("rules", "success_at"))
def compiled_keep(
    rules: ExploreConfig, draws: Draws, query: Array, base_reward: Array, success_at: float
) -> Array:
    """`keep` of rules that are functions."""
    keys = jax.vmap(row_key, (None, None, 0, None))(draws.choices, draws.step, query, 0)
    return keep_trajectories(base_reward, rules.keep, keys, success_at)


def find_states(
    rules: ExploreConfig,
    engine: Engine,
    draws: Draws,
    queries: Queries,
    base: Rollouts,
    kept: Bool[np.ndarray, "B R"],
    sampled: Rollouts,
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

    Returns:
      (states on the host, the same on the devices).
    """
    query, trajectory, real = engine.arrange(kept)
    place = engine.placement.place_rows
    where = place((queries.index[query], query, trajectory, real))
    placed = choose_states(rules, engine.placement, draws, sampled, place(base.length), *where)
    prefix_length, valid = gather((placed.prefix_length, placed.valid))
    return States(query, trajectory, base.token[query, trajectory], prefix_length, valid), placed


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
) -> States:
    """Stages 5 and 6 on the devices: the states of N kept trajectories, each in the part of its query.

    Args:
      rules: functions.
      base: leaves [B, R, S].
      length: tokens of each that count.
      index: the queries' places in the stream.
      query, trajectory: row and column of the kept trajectories in `base`.
      real: False where a row is only padding.
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
    trajectories = Trajectories(
        entropy=entropy,
        logprob=logprob,
        length=count,
        key=keys,
        count=rules.positions,
        min_gap=rules.min_gap,
    )
    position, valid = positions_of(rules.rule, trajectories)
    prefix_length, valid = states_of(position, valid)
    states = States(query, trajectory, response, prefix_length, valid & real[:, None])
    return jax.tree.map(lambda x: placement.shard(x, "batch"), states)


def roots(base: Rollouts) -> States:
    """S_0 of every query, for rounds without positions."""
    n, _, width = base.token.shape
    nothing = np.zeros((n, 1), np.int32)
    return States(
        np.arange(n, dtype=np.int32), nothing[:, 0], np.zeros((n, width), np.int32), nothing, nothing == 0
    )


def explore(
    config: Config,
    engine: Engine,
    params: Params,
    draws: Draws,
    queries: Queries,
    caches: Caches,
    states: States,
) -> tuple[Rollouts, Array]:
    """Stage 7: M rollouts from every valid state; all on the devices.

    Returns:
      (rollouts, rows decoded).
    """
    return engine.explore(
        params,
        queries,
        caches,
        states,
        seed_key=draws.tokens,
        step=draws.step,
        rollouts=config.explore.rollouts,
        sampling=sampling_of(config.rollout),
    )


Credit = tuple[Float32[Array, "N J M"], Float32[Array, "N J"], Float32[Array, "N J"], Bool[Array, "N J"]]


def assign_credit(
    credit: CreditConfig,
    reward: Float32[AnyArray, "N J M"],
    valid: Bool[AnyArray, "N J"],
    query: Int32[AnyArray, " N"],
) -> Credit:
    """Stage 9: (advantage, value, alpha, accepted) of the states of kept trajectories.

    Args:
      credit: names or functions.
      reward: of the partial rollouts, whole answers.
      valid: which states there are.
      query: row of the round's queries, of each trajectory.
    """
    return compiled_credit(with_functions(credit), reward, valid, query)


@functools.partial(jax.jit, static_argnames="credit")
def compiled_credit(credit: CreditConfig, reward: Array, valid: Array, query: Array) -> Credit:
    """`assign_credit` of rules that are functions."""
    advantage, value, alpha = modulated_advantage(
        reward,
        valid,
        normalize_std=credit.normalize_std,
        modulation=credit.modulation,
        first_state=credit.first_state,
        sharpen=credit.sharpen,
        advantage=credit.advantage,
    )
    return advantage, value, alpha, accept_states(reward, valid, query, credit.reject)
