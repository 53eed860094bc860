"""One step of FR3E: the pipeline of the paper, one line a stage.

A step samples rounds until enough states carry a gradient, then updates the policy. A round is:

  1. queries            B of them from the stream                       host/data
  2. base trajectories  R whole answers to each; every token's entropy  engine/rollout.first_return
  3. rewards            of the base trajectories                        host/verify
  4. kept trajectories  one correct, one wrong                          algorithm/explore
  5. positions          the K most uncertain tokens                     algorithm/explore
  6. states             S_0 = the query, S_j = before position T_j      algorithm/explore
  7. partial rollouts   M from each state, on the cached prefixes       engine/rollout.explore
  8. rewards            of the whole answers                            host/verify
  9. credit             values, modulated advantages, rejection         algorithm/credit
 10. policy update      clip-higher, once enough states are accepted    learner/update

grpo and grpo++ have no positions: a round is M rollouts from S_0, which stages 2 and 7 both are.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fr3e_jax.algorithm.credit import accept_states, modulated_advantage
from fr3e_jax.algorithm.explore import keep_trajectories, positions_of, states_of
from fr3e_jax.config import Config
from fr3e_jax.engine.rollout import Caches, Engine
from fr3e_jax.engine.sampler import row_key
from fr3e_jax.host import groups
from fr3e_jax.host.checkpoints import Progress
from fr3e_jax.host.data import QueryStream
from fr3e_jax.host.metrics import Stopwatch
from fr3e_jax.host.verify import Verifier
from fr3e_jax.learner.state import TrainState, sampling_params
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.qwen2 import Params
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.types import Queries, Rollouts, StateGroups, States

Metrics = dict[str, Any]


class SamplingError(RuntimeError):
    """A step did not find enough states that carry a gradient; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What is fixed for a run."""

    config: Config
    placement: Placement
    axes: Params
    engine: Engine
    learner: Learner
    stream: QueryStream
    verifier: Verifier
    reference: Params | None

    def key(self, purpose: int) -> jax.Array:
        """A key of the run's seed: 0 for the tokens that are drawn, 1 for choices between them."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def sampling_params(self, params: Params) -> Params:
        """Parameters in the type and layout for sampling."""
        return sampling_params(self.engine.placement, self.axes, params, self.learner.compute_dtype)


def sample_round(
    run: Run, params: Params, step: int, position: int, watch: Stopwatch
) -> tuple[StateGroups, Metrics, dict[str, Any] | None]:
    """Stages 1 to 9.

    Args:
      params: in the layout for sampling.
      step: the training step that samples.
      position: of the round's first query in the stream.
      watch: takes the time of each stage.

    Returns:
      (accepted states, metrics, a state with two of its continuations for people to read).
    """
    config, credit = run.config, run.config.credit
    queries, problems = run.stream.take(position, config.rollout.queries)
    with watch.stage("first_return"):
        base, caches = first_return(run, params, step, queries)
    with watch.stage("verify"):
        base_reward = run.verifier.base(base, problems)
    if config.explore.positions:
        states = find_states(run, step, queries, base, base_reward)
        with watch.stage("explore"):
            rollouts = explore(run, params, step, queries, caches, states)
        with watch.stage("verify"):
            reward = run.verifier.whole(states, rollouts, problems)
    else:
        states, rollouts, reward = roots(base), base, base_reward[:, None]
    advantage, value, alpha = jax.device_get(
        modulated_advantage(
            jnp.asarray(reward),
            jnp.asarray(states.valid),
            credit.normalize_std,
            credit.modulation,
            credit.first_state,
            credit.sharpen,
        )
    )
    accepted = np.asarray(accept_states(jnp.asarray(reward), states.valid, states.query, credit.reject))

    metrics = round_metrics(base, base_reward, states, value, alpha, accepted)
    if config.explore.positions:
        metrics |= restart_metrics(states, base, rollouts)
        metrics["tokens/generated"] += int(rollouts.length.sum())
    gathered = groups.collect(accepted, queries, states, rollouts, advantage)
    return gathered, metrics, run.verifier.excerpt(accepted, states, rollouts, reward, problems)


def first_return(run: Run, params: Params, step: int, queries: Queries) -> tuple[Rollouts, Caches]:
    """R whole answers per query, or M where they are all that is sampled; rollouts on the host."""
    config = run.config
    count = config.rollout.base_trajectories if config.explore.positions else config.explore.rollouts
    placed = run.engine.placement.place_rows(queries)
    rollouts, caches = run.engine.first_return(
        params, placed, run.key(0), step, count, config.rollout.temperature
    )
    return jax.device_get(rollouts), caches


def find_states(run: Run, step: int, queries: Queries, base: Rollouts, base_reward: np.ndarray) -> States:
    """Stages 4 to 6, on the host.

    The kept trajectories are padded to a bucket, with some that have no valid state, so that few shapes
    are compiled.
    """
    rules = run.config.explore
    round_key = row_key(run.key(1), step, queries.index[0], 0)
    kept = keep_trajectories(jnp.asarray(base_reward), rules.keep, round_key)
    query, trajectory = np.nonzero(np.asarray(kept))
    real = np.arange(run.engine.bucket(len(query))) < len(query)
    query, trajectory = np.pad([query, trajectory], [(0, 0), (0, len(real) - len(query))]).astype(np.int32)

    # Branch numbers from 1: 0 is the round's.
    keys = jax.vmap(row_key, (None, None, 0, 0))(run.key(1), step, queries.index[query], 1 + trajectory)
    entropy, logprob = base.entropy[query, trajectory], base.logprob[query, trajectory]
    length = base.length[query, trajectory]
    position, valid = positions_of(rules.rule, entropy, logprob, length, rules.positions, rules.min_gap, keys)
    prefix_length, valid = jax.device_get(states_of(position, valid))
    response = base.token[query, trajectory]
    return States(query, trajectory, response, prefix_length, valid & real[:, None])


def roots(base: Rollouts) -> States:
    """S_0 of every query, for rounds without positions."""
    n, _, width = base.token.shape
    nothing = np.zeros((n, 1), np.int32)
    return States(
        np.arange(n, dtype=np.int32), nothing[:, 0], np.zeros((n, width), np.int32), nothing, nothing == 0
    )


def explore(
    run: Run, params: Params, step: int, queries: Queries, caches: Caches, states: States
) -> Rollouts:
    """M rollouts from every valid state, on the host."""
    config, place = run.config, run.engine.placement.place_rows
    rollouts = run.engine.explore(
        params,
        place(queries),
        caches,
        place(states),
        run.key(0),
        step,
        config.explore.rollouts,
        config.rollout.temperature,
    )
    return jax.device_get(rollouts)


def train_step(
    run: Run, state: TrainState, carried: StateGroups, progress: Progress
) -> tuple[TrainState, StateGroups, Progress, Metrics, dict[str, Any] | None]:
    """Rounds until the batch is full, then the update.

    Raises:
      SamplingError: the batch is not full after `credit.max_rounds` rounds.
    """
    config, watch, started = run.config, Stopwatch(), time.perf_counter()
    step, position, wanted = progress.step + 1, progress.data_position, config.optimizer.batch_states
    rounds: list[Metrics] = []
    sample, waiting, sampler_params = None, carried, None
    while groups.count(waiting) < wanted:
        if len(rounds) == config.credit.max_rounds:
            raise SamplingError(
                f"step {step}: {len(rounds)} rounds gave {groups.count(waiting)} of {wanted} states "
                f"that carry a gradient (the other states' rollouts were all right or all wrong; mean "
                f"reward at the root {np.mean([r['reward/root_mean'] for r in rounds]):.3f}). Choose an "
                "easier or harder task, raise explore.rollouts, rollout.queries or credit.max_rounds, or "
                "lower optimizer.batch_states."
            )
        if sampler_params is None:
            sampler_params = run.sampling_params(state.params)
        accepted, metrics, sample = sample_round(run, sampler_params, step, position, watch)
        waiting = groups.join(waiting, accepted)
        position += config.rollout.queries
        rounds.append(metrics)
    batch, carried = groups.split(waiting, wanted)

    updates = []
    with watch.stage("update"):
        for epoch in range(config.optimizer.epochs):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in groups.minibatches(batch, config.optimizer.minibatches, rng):
                rows = run.placement.place_rows(groups.to_rows(part, config.optimizer.micro_rows), 1)
                state, metrics = run.learner.update(state, rows, run.reference)
                updates.append(metrics)
        updates = jax.device_get(updates)

    told: Metrics = {"step": step} | summarize(rounds, updates)
    tokens = progress.tokens_generated + told.get("tokens/generated", 0)
    told |= {"states/carried": groups.count(carried), "tokens/total": tokens, "rounds": len(rounds)}
    told |= watch.metrics() | {"time/step": round(time.perf_counter() - started, 4)}
    progress = dataclasses.replace(progress, step=step, data_position=position, tokens_generated=tokens)
    return state, carried, progress, told, sample


def round_metrics(
    base: Rollouts,
    base_reward: np.ndarray,
    states: States,
    value: np.ndarray,
    alpha: np.ndarray,
    accepted: np.ndarray,
) -> Metrics:
    """Metrics that a round of every algorithm has; `base` are answers sampled from the query alone."""
    tokens = int(base.length.sum())
    return {
        "reward/root_mean": float(value[states.valid[:, 0], 0].mean()),
        "reward/base_mean": float(base_reward.mean()),
        "entropy/mean": float(base.entropy.sum() / max(tokens, 1)),
        "response/length": float(base.length.mean()),
        "response/cut": float(1.0 - base.stopped.mean()),
        "value/mean": float(value[states.valid].mean()),
        "modulation/mean": float(alpha[states.valid].mean()),
        "states/accepted": int(accepted.sum()),
        "states/rejected": int((states.valid & ~accepted).sum()),
        "tokens/generated": tokens,
    }


def restart_metrics(states: States, base: Rollouts, rollouts: Rollouts) -> Metrics:
    """Metrics of a round with positions: how uncertain they are, and how long the restarts go on."""
    entropy = base.entropy[states.query, states.base]
    chosen = np.take_along_axis(entropy, states.prefix_length[:, 1:], axis=1)[states.valid[:, 1:]]
    started = rollouts.length[rollouts.length > 0]
    return {
        "entropy/positions": float(chosen.mean()) if chosen.size else 0.0,
        "response/continuation": float(started.mean()),
    }


def summarize(rounds: list[Metrics], updates: list[Metrics]) -> Metrics:
    """One number per metric: counts are added up over rounds, the rest averaged.

    A step that the carried states fill has no rounds, and none of their metrics.
    """
    metrics: Metrics = {}
    for name in rounds[0] if rounds else ():
        values = [r[name] for r in rounds]
        counted = name.startswith(("states/", "tokens/"))
        metrics[name] = sum(values) if counted else float(np.mean(values))
    reduce = {"ratio_max": np.max, "ratio_min": np.min}
    for name in updates[0]:
        values = [u[name] for u in updates]
        metrics[f"update/{name}"] = float(reduce.get(name, np.mean)(values))
    return metrics
