"""A training step: rounds until enough states carry a gradient, then the policy update."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from fr3e_jax.config import Config
from fr3e_jax.cost import update_flops
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of, token_counts
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.weights import with_shares
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.diagnosis import no_signal
from fr3e_jax.step.metrics import Metrics, summarize_step
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.weigh import weigh
from fr3e_jax.types import StateGroups


class SamplingError(RuntimeError):
    """A step did not find enough states that carry a gradient; the message says what to change."""


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

    Returns:
      (state, carried and progress after this step, its metrics, a state for people to read).

    Raises:
      SamplingError: the batch is not full after `credit.max_rounds` rounds.
      NotFiniteError: tokens were drawn from logits that are not finite.
      Interrupted: the run is asked to stop, and `state` is untouched.
    """
    watch, started, placement = Stopwatch(), time.perf_counter(), parts.engine.placement
    timed_out = parts.verifier.pool.timed_out
    step, position, wanted = progress.step + 1, progress.data_position, config.optimizer.batch_states
    rounds: list[Metrics] = []
    shown.begin(step, groups.count(carried), wanted)
    sample, waiting, sampler_params, ahead = None, carried, None, None
    while groups.count(waiting) < wanted:
        if len(rounds) == config.credit.max_rounds:
            late = count_timed_out(parts.verifier, timed_out)
            raise SamplingError(
                f"step {step}: {len(rounds)} rounds gave {groups.count(waiting)} of {wanted} states that "
                f"carry a gradient. {no_signal(config, rounds, late)}"
            )
        if sampler_params is None:
            sampler_params = parts.policy.sampling_params(state.params)
        shown.round(len(rounds) + 1, config.credit.max_rounds)
        opened, ahead = ahead or open_round(config, parts, sampler_params, step, position, watch), None
        position += config.rollout.queries
        if groups.count(waiting) + opened.most < wanted and len(rounds) + 1 < config.credit.max_rounds:
            # There will be another round, whatever the verdicts on this one.
            ahead = open_round(config, parts, sampler_params, step, position, watch)
        accepted, round_metrics, sample = close_round(config, parts, opened, watch)
        waiting = groups.concatenate(waiting, accepted)
        rounds.append(round_metrics)
        shown.states(groups.count(waiting))
    shown.end()
    parts.engine.between()  # for the last time while there is a state to save: updates replace it
    sampler_params = None  # the update needs its memory
    batch, carried = groups.split(waiting, wanted)
    batch, weights = weigh(config, parts, state, batch, watch)

    updates, flops, tokens = [], 0.0, np.zeros(2)
    with watch.stage("update"):
        for epoch in range(config.optimizer.epochs):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in groups.minibatches(batch, config.optimizer.minibatches, rng):
                part = with_shares(part, config.loss, config.rollout.max_response)
                bundles = bundles_of(part, row_parts(placement.mesh), config.optimizer.micro_tokens)
                flops += update_flops(parts.policy.model.config, bundles)
                tokens += np.array(token_counts(bundles))
                state, update_metrics = parts.learner.update(state, bundles, reference)
                updates.append(update_metrics)
        updates = jax.device_get(updates)

    metrics: Metrics = {"step": step} | summarize_step(rounds, updates) | {"flops/update": flops} | weights
    metrics |= {"tokens/trained": tokens[0], "update/padding": tokens[1] / tokens[0]}
    if "rows/decoded" in metrics:
        metrics["rows/occupancy"] = metrics["tokens/generated"] / metrics["rows/decoded"]
    generated = progress.tokens_generated + metrics.get("tokens/generated", 0)
    metrics |= {"states/carried": groups.count(carried), "tokens/total": generated, "rounds": len(rounds)}
    if rounds:
        metrics["reward/timed_out"] = count_timed_out(parts.verifier, timed_out)
        metrics |= parts.verifier.parts.take()
    metrics |= watch.metrics() | {"time/step": round(time.perf_counter() - started, 4)}
    skipped = skipped_in_a_row(progress.skipped, updates, config.optimizer.max_skipped)
    progress = dataclasses.replace(
        progress, step=step, data_position=position, tokens_generated=generated, skipped=skipped
    )
    return state, carried, progress, metrics, sample


def count_timed_out(verifier: Verifier, before: int) -> int:
    """Answers on which the scorers of all hosts ran out of time.

    Args:
      before: that it had on this host when the count began.
    """
    here = np.array([verifier.pool.timed_out - before])
    return int(verifier.hosts.add_up(here, "answers that timed out")[0])


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
