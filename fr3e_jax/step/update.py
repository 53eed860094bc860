"""A training step: a batch of states that carry a gradient, then the policy update."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from fr3e_jax.algorithm.entropy_target import adapted_coefficient
from fr3e_jax.config import Config, LossConfig
from fr3e_jax.cost import total_flops, update_flops
from fr3e_jax.engine.unfinished import Unfinished
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of, token_counts
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.weights import with_shares
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.batch import fill_batch
from fr3e_jax.step.machine import memory_metrics, waiting_metrics
from fr3e_jax.step.metrics import Metrics, summarize_step
from fr3e_jax.step.record import Recorder
from fr3e_jax.step.weigh import weigh
from fr3e_jax.types import StateGroups


class SkippedError(RuntimeError):
    """Too many updates in a row were skipped; the message says what to change."""


def train_step(
    config: Config,
    parts: Parts,
    reference: Params | None,
    state: TrainState,
    carried: StateGroups,
    progress: Progress,
    shown: StepProgress,
    recorder: Recorder | None = None,
) -> tuple[TrainState, StateGroups, Progress, Metrics, dict[str, Any] | None]:
    """Rounds until the batch is full, then the update.

    Args:
      config: resolved.
      parts: as `build` makes them from it.
      reference: parameters that the policy is held near, where loss.kl_coefficient is above 0.
      state: used up by the update.
      carried: accepted states that the step before left over.
      progress: up to the step before.
      shown: tells people how far the step is.
      recorder: keeps the rollouts; None keeps none.

    Returns:
      (state, carried and progress after this step, its metrics, a state for people to read).

    Raises:
      SamplingError: the batch is not full after `credit.max_rounds` rounds, and `credit.short_batch` does not
        let the step use what there is.
      NotFiniteError: tokens were drawn from logits that are not finite.
      Interrupted: the run is asked to stop, and `state` is untouched.
      StorageError: rollouts of the step before could not be written.
    """
    watch, started, wanted = Stopwatch(), time.perf_counter(), config.optimizer.batch_states
    step, bonus = progress.step + 1, bonus_of(config.loss, progress)
    sampled = fill_batch(config, parts, state, carried, progress, shown, watch, recorder)
    parts.engine.between()  # for the last time while there is a state to save: updates replace it
    batch, carried = groups.split(sampled.states, wanted)
    batch, weighing = weigh(config, parts, state, batch, watch)
    state, updates, costs = take_updates(config, parts, reference, state, step, batch, bonus, watch)

    metrics: Metrics = {"step": step} | summarize_step(sampled.rounds, updates)
    metrics |= costs | weighing | sampled.metrics
    if "rows/decoded" in metrics:
        metrics["rows/occupancy"] = metrics["tokens/generated"] / metrics["rows/decoded"]
    generated = progress.tokens_generated + metrics.get("tokens/generated", 0)
    metrics |= {"states/carried": groups.count(carried), "tokens/total": generated}
    if groups.count(batch) < wanted:
        metrics["states/missing"] = wanted - groups.count(batch)
    if (steps := groups.staleness(batch, step)) is not None:
        metrics["tokens/staleness"] = steps
    if config.rollout.wait_for < 1:
        metrics |= unfinished_metrics(sampled.unfinished, metrics.get("rollouts/drawn", 0))
    if bonus is not None:
        metrics["update/entropy_coefficient"] = bonus
    if metrics.get("states/accepted"):
        metrics["tokens/per_accepted"] = metrics["tokens/generated"] / metrics["states/accepted"]
    seconds = time.perf_counter() - started
    metrics |= watch.metrics() | waiting_metrics(watch.seconds, seconds) | memory_metrics()
    metrics["time/step"] = round(seconds, 4)
    progress = dataclasses.replace(
        progress,
        step=step,
        data_position=sampled.position,
        tokens_generated=generated,
        flops=progress.flops + total_flops(metrics),
        skipped=skipped_in_a_row(progress.skipped, updates, config.optimizer.max_skipped),
        empty_steps=0 if updates else progress.empty_steps + 1,
        rates=sampled.rates,
        unfinished=sampled.unfinished,
        recent_queries=sampled.counted.queries,
        recent_states=sampled.counted.states,
        entropy_coefficient=following_bonus(config.loss, bonus, metrics.get("update/entropy")),
    )
    return state, carried, progress, metrics, sampled.excerpt


def unfinished_metrics(unfinished: Unfinished | None, drawn: int) -> Metrics:
    """Count what goes on in the next step.

    Args:
      unfinished: after the step; None: nothing.
      drawn: rollouts that the decodings of the step began or went on with; 0 without a round.
    """
    queries, rollouts = (0, 0) if unfinished is None else (unfinished.count, unfinished.in_the_middle)
    share = {"rollouts/unfinished_share": rollouts / drawn} if drawn else {}  # none without a round
    return {"queries/unfinished": queries, "rollouts/unfinished": rollouts} | share


def take_updates(
    config: Config,
    parts: Parts,
    reference: Params | None,
    state: TrainState,
    step: int,
    batch: StateGroups,
    bonus: float | None,
    watch: Stopwatch,
) -> tuple[TrainState, list[Metrics], Metrics]:
    """Stage 10: every epoch takes one update on each minibatch, of which an empty batch has none.

    Args:
      config, parts, reference, state: as for `train_step`.
      step: its number, of which the order of the states is a function.
      batch: states with the weights of their tokens.
      bonus: weight of the entropy, where it is adapted.
      watch: takes the time.

    Returns:
      (state, metrics of each update, FLOPs and tokens of all of them).
    """
    updates, flops, tokens = [], 0.0, np.zeros(2)
    minibatches, optimizer = minibatches_of(groups.count(batch), config), config.optimizer
    with watch.stage("update"):
        for epoch in range(optimizer.epochs if minibatches else 0):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in groups.minibatches(batch, minibatches, rng):
                part = with_shares(part, config.loss)
                bundles = bundles_of(part, row_parts(parts.learner.placement.mesh), optimizer.micro_tokens)
                flops += update_flops(parts.policy.model.config, bundles)
                tokens += np.array(token_counts(bundles))
                state, update_metrics = parts.learner.update(state, bundles, reference, bonus)
                updates.append(update_metrics)
        updates = jax.device_get(updates)
    costs: Metrics = {"flops/update": flops, "tokens/trained": tokens[0]}
    if updates:
        costs["update/padding"] = tokens[1] / tokens[0]
    return state, updates, costs


def minibatches_of(states: int, config: Config) -> int:
    """Count the minibatches of a batch: fewer for one that is short, so that none is larger than usual."""
    most = config.optimizer.batch_states // config.optimizer.minibatches
    return -(-states // most)


def bonus_of(loss: LossConfig, progress: Progress) -> float | None:
    """Return the weight of the entropy in the next step, where it is adapted."""
    if loss.entropy_target is None:
        return None
    known = progress.entropy_coefficient
    return loss.entropy_coefficient if known is None else known


def following_bonus(loss: LossConfig, bonus: float | None, entropy: float | None) -> float | None:
    """Adapt the weight of the entropy to what a step measured; without an update it stays."""
    if bonus is None or entropy is None or loss.entropy_target is None:
        return bonus
    return adapted_coefficient(bonus, entropy, loss.entropy_target, loss.entropy_step, loss.entropy_limit)


def skipped_in_a_row(before: int, updates: list[Metrics], limit: int) -> int:
    """How many updates in a row were skipped, up to the last one, or to where `limit` was reached.

    Args:
      before: up to the step's first update.
      updates: metrics of the step's updates, in order.
    """
    for update in updates:
        before = before + 1 if update["skipped"] else 0
        if before >= limit:
            break
    return before
