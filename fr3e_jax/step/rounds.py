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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from fr3e_jax.algorithm.credit import accept_states, modulated_advantage
from fr3e_jax.algorithm.explore import keep_trajectories, positions_of, states_of
from fr3e_jax.config import Config, CreditConfig, ExploreConfig, with_functions
from fr3e_jax.cost import Cost, rollout_cost
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling, row_key
from fr3e_jax.learner import groups
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import DecoderConfig, Params
from fr3e_jax.parallel.hosts import Hosts, gather
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.rewards.verify import Rewards, Verifier
from fr3e_jax.run.interruption import Interruption
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.metrics import Measured, Metrics, cost_metrics, measure
from fr3e_jax.types import Problem, Queries, Rollouts, StateGroups, States


@dataclasses.dataclass(frozen=True)
class Run:
    """What is fixed for a run."""

    config: Config
    model: DecoderConfig
    placement: Placement
    engine: Engine
    learner: Learner
    stream: QueryStream
    verifier: Verifier
    reference: Params | None
    sampling_params: Callable[[Params], Params]
    """Parameters in the type and layout for sampling, from those that are trained."""
    interruption: Interruption

    @property
    def hosts(self) -> Hosts:
        """The processes that run it."""
        return self.interruption.hosts

    @property
    def sampling(self) -> Sampling:
        """The distribution that rollouts are drawn from."""
        rollout = self.config.rollout
        return Sampling(rollout.temperature, rollout.top_k, rollout.top_p)

    def key(self, purpose: int) -> Array:
        """A key of the run's seed, on all devices: 0 for the tokens that are drawn, 1 for choices of them."""
        return make_key(self.config.seed, purpose, self.placement.sharding())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_key(seed: int, purpose: int, at: NamedSharding) -> Array:
    """A key of a seed, made where it is to lie."""
    return jax.lax.with_sharding_constraint(jax.random.fold_in(jax.random.key(seed), purpose), at)


@dataclasses.dataclass(frozen=True)
class Round:
    """A round whose last rewards are being found: stages 1 to 7 are done."""

    queries: Queries
    problems: Sequence[Problem]
    base: Rollouts
    base_reward: np.ndarray | None
    """None where the base trajectories are what is explored, from S_0."""
    states: States
    rollouts: Rollouts
    rewards: Rewards
    costs: dict[str, Cost]

    @property
    def most(self) -> int:
        """States that it can give, whatever the rewards are."""
        return int(self.states.valid.sum())


def open_round(run: Run, params: Params, step: int, position: int, watch: Stopwatch) -> Round:
    """Stages 1 to 7, and the beginning of 8: answers are judged while the caller goes on.

    Args:
      params: in the layout for sampling.
      step: the training step that samples.
      position: of the round's first query in the stream.
      watch: takes the time of each stage.

    Raises:
      NotFiniteError: tokens were drawn from logits that are not finite.
    """
    config = run.config
    with watch.stage("tokenize"):
        queries, problems = run.stream.take(position, config.rollout.queries)
    place = run.engine.placement.place_rows
    placed, placed_step = place(queries), run.placement.place(np.int32(step))
    with watch.stage("first_return"):
        base, caches, row_steps = first_return(run, params, placed_step, placed)
    require_finite(base, f"step {step}, base trajectories")
    costs = {"first_return": rollout_cost(run.model, queries, base, row_steps)}
    with watch.stage("verify"):
        base_rewards = run.verifier.base(base, problems)
        base = run.stream.text.trimmed(base)
    if not config.explore.positions:
        return Round(queries, problems, base, None, roots(base), base, base_rewards, costs)
    with watch.stage("verify"):
        base_reward = base_rewards()
    states = find_states(run, placed_step, queries, base, base_reward)
    with watch.stage("explore"):
        rollouts, row_steps = explore(run, params, placed_step, placed, caches, place(states))
    require_finite(rollouts, f"step {step}, partial rollouts")
    costs["explore"] = rollout_cost(run.model, queries, rollouts, row_steps, states)
    with watch.stage("verify"):
        rewards = run.verifier.whole(states, rollouts, problems)
        rollouts = run.stream.text.trimmed(rollouts, states)
    return Round(queries, problems, base, base_reward, states, rollouts, rewards, costs)


def close_round(
    run: Run, opened: Round, watch: Stopwatch
) -> tuple[StateGroups, Metrics, dict[str, Any] | None]:
    """The end of stage 8, and 9.

    Returns:
      (accepted states, metrics, a state with two of its continuations for people to read).
    """
    queries, states, rollouts, base = opened.queries, opened.states, opened.rollouts, opened.base
    credit, place = run.config.credit, run.engine.placement.place_rows
    with watch.stage("verify"):
        reward = opened.rewards()
    base_reward = opened.base_reward
    if base_reward is None:
        base_reward, reward = reward, reward[:, None]
    advantage, value, alpha, accepted = gather(
        assign_credit(credit, *place((reward, states.valid, states.query)))
    )

    restarts = opened.base_reward is not None
    found = (reward, value, alpha, advantage, accepted)
    success_at = run.config.reward.success_at
    metrics = measure(Measured(base, base_reward, states, rollouts, *found, restarts, success_at))
    metrics |= cost_metrics(opened.costs)
    gathered = groups.collect(accepted, queries, states, rollouts, advantage)
    return gathered, metrics, run.verifier.excerpt(accepted, states, rollouts, reward, opened.problems)


def first_return(run: Run, params: Params, step: Array, queries: Queries) -> tuple[Rollouts, Any, int]:
    """R whole answers per query, or M where no other are sampled.

    Returns:
      (rollouts on the host, their `Caches` if there is to be exploration, rows decoded).
    """
    explore, caches = run.config.explore, None
    told = (params, queries, run.key(0), step)
    if explore.positions:
        count = run.config.rollout.base_trajectories
        rollouts, caches, row_steps = run.engine.first_return(*told, count, run.sampling)
    else:
        rollouts, row_steps = run.engine.sample(*told, explore.rollouts, run.sampling)
    return gather(rollouts), caches, int(row_steps)


def find_states(run: Run, step: Array, queries: Queries, base: Rollouts, base_reward: np.ndarray) -> States:
    """Stages 4 to 6; states on the host.

    The kept trajectories are padded to a bucket, with some that have no valid state, so that few shapes
    are compiled.
    """
    rules, place = run.config.explore, run.engine.placement.place_rows
    index, reward = place((queries.index, base_reward))
    kept = gather(keep(rules, run.key(1), step, index, reward, run.config.reward.success_at))
    return states_of_kept(run.engine, rules, run.key(1), step, queries, base, kept)


def states_of_kept(
    engine: Engine,
    rules: ExploreConfig,
    key: Array,
    step: Array,
    queries: Queries,
    base: Rollouts,
    kept: np.ndarray,
) -> States:
    """Stages 5 and 6: the states of kept trajectories, on the host.

    Args:
      engine: what samples from the states, and lays trajectories out for its mesh.
      rules: how positions are chosen.
      key: of the run's seed, for choices.
      step: int32 [].
      queries: of the round. base: base trajectories, [B, R, S] leaves; both on the host.
      kept: bool [B, R].
    """
    query, trajectory, real = engine.arrange(kept)
    chosen = jax.tree.map(lambda x: x[query, trajectory], base)
    told = (queries.index[query], trajectory, real, chosen.entropy, chosen.logprob, chosen.length)
    prefix_length, valid = gather(choose_states(rules, key, step, *engine.placement.place_rows(told)))
    return States(query, trajectory, chosen.token, prefix_length, valid)


def keep(
    rules: ExploreConfig, key: Array, step: Array, query: Array, base_reward: Array, success_at: float = 1.0
) -> Array:
    """Stage 4: bool [B, R] from rewards [B, R] of queries [B]; a reward of `success_at` is correct."""
    return compiled_keep(with_functions(rules), key, step, query, base_reward, success_at)


@functools.partial(jax.jit, static_argnames=("rules", "success_at"))
def compiled_keep(
    rules: ExploreConfig, key: Array, step: Array, query: Array, base_reward: Array, success_at: float
) -> Array:
    """`keep` of rules that are functions."""
    keys = jax.vmap(row_key, (None, None, 0, None))(key, step, query, 0)
    return keep_trajectories(base_reward, rules.keep, keys, success_at)


def choose_states(rules: ExploreConfig, *told: Array) -> tuple[Array, Array]:
    """Stages 5 and 6: (prefix_length int32 [N, J], valid bool [N, J]) of N kept trajectories.

    Args:
      rules: names or functions.
      told: the other arguments of `compiled_states`.
    """
    return compiled_states(with_functions(rules), *told)


@functools.partial(jax.jit, static_argnames="rules")
def compiled_states(
    rules: ExploreConfig,
    key: Array,
    step: Array,
    query: Array,
    trajectory: Array,
    real: Array,
    entropy: Array,
    logprob: Array,
    length: Array,
) -> tuple[Array, Array]:
    """`choose_states` of rules that are functions."""
    # Branch numbers from 1: 0 chose the trajectories.
    keys = jax.vmap(row_key, (None, None, 0, 0))(key, step, query, 1 + trajectory)
    position, valid = positions_of(rules.rule, entropy, logprob, length, rules.positions, rules.min_gap, keys)
    prefix_length, valid = states_of(position, valid)
    return prefix_length, valid & real[:, None]


def assign_credit(
    credit: CreditConfig, reward: Array, valid: Array, query: Array
) -> tuple[Array, Array, Array, Array]:
    """Stage 9: (advantage [N, J, M], value [N, J], alpha [N, J], accepted bool [N, J])."""
    return compiled_credit(with_functions(credit), reward, valid, query)


@functools.partial(jax.jit, static_argnames="credit")
def compiled_credit(
    credit: CreditConfig, reward: Array, valid: Array, query: Array
) -> tuple[Array, Array, Array, Array]:
    """`assign_credit` of rules that are functions."""
    told = (credit.normalize_std, credit.modulation, credit.first_state, credit.sharpen, credit.advantage)
    advantage, value, alpha = modulated_advantage(reward, valid, *told)
    return advantage, value, alpha, accept_states(reward, valid, query, credit.reject)


def roots(base: Rollouts) -> States:
    """S_0 of every query, for rounds without positions."""
    n, _, width = base.token.shape
    nothing = np.zeros((n, 1), np.int32)
    return States(
        np.arange(n, dtype=np.int32), nothing[:, 0], np.zeros((n, width), np.int32), nothing, nothing == 0
    )


def explore(
    run: Run, params: Params, step: Array, queries: Queries, caches: Any, states: States
) -> tuple[Rollouts, int]:
    """M rollouts from every valid state; queries, caches and states on the mesh.

    Returns:
      (rollouts on the host, rows decoded).
    """
    rollouts, row_steps = run.engine.explore(
        params, queries, caches, states, run.key(0), step, run.config.explore.rollouts, run.sampling
    )
    return gather(rollouts), int(row_steps)
