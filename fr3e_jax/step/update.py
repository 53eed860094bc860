"""A training step: rounds until enough states carry a gradient, then the policy update.

Where `credit.max_rounds` rounds do not give enough, the step ends the run, or uses what there is.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from fr3e_jax.algorithm.entropy_target import adapted_coefficient
from fr3e_jax.config import Config, LossConfig
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
      SamplingError: the batch is not full after `credit.max_rounds` rounds, and `credit.short_batch` does not
        let the step use what there is.
      NotFiniteError: tokens were drawn from logits that are not finite.
      Interrupted: the run is asked to stop, and `state` is untouched.
    """
    watch, started, placement = Stopwatch(), time.perf_counter(), parts.engine.placement
    timed_out = parts.verifier.pool.timed_out
    step, position, wanted = progress.step + 1, progress.data_position, config.optimizer.batch_states
    rounds: list[Metrics] = []
    visits: list[tuple[np.ndarray, np.ndarray]] = []
    shown.begin(step, groups.count(carried), wanted)
    sample, waiting, sampler_params, ahead = None, carried, None, None
    while groups.count(waiting) < wanted:
        if len(rounds) == config.credit.max_rounds:
            if may_be_short(config, groups.count(waiting), progress.empty_steps):
                break
            late = count_timed_out(parts.verifier, timed_out)
            raise SamplingError(
                f"step {step}: {len(rounds)} rounds gave {groups.count(waiting)} of {wanted} states that "
                f"carry a gradient{after_others(progress.empty_steps)}. {no_signal(config, rounds, late)}"
            )
        if sampler_params is None:
            sampler_params = parts.policy.sampling_params(state.params)
        shown.round(len(rounds) + 1, config.credit.max_rounds)
        asked = (step, position, watch, progress.rates)
        opened, ahead = ahead or open_round(config, parts, sampler_params, *asked), None
        position = opened.following
        if groups.count(waiting) + opened.most < wanted and len(rounds) + 1 < config.credit.max_rounds:
            # There will be another round, whatever the verdicts on this one.
            ahead = open_round(config, parts, sampler_params, step, position, watch, progress.rates)
        accepted, round_metrics, sample, success = close_round(config, parts, opened, watch)
        visits.append((opened.queries.index, success))
        waiting = groups.concatenate(waiting, accepted)
        rounds.append(round_metrics)
        shown.states(groups.count(waiting))
    shown.end()
    parts.engine.between()  # for the last time while there is a state to save: updates replace it
    sampler_params = None  # the update needs its memory
    batch, carried = groups.split(waiting, wanted)
    minibatches, bonus = minibatches_of(groups.count(batch), config), bonus_of(config.loss, progress)
    weights: Metrics = {}
    if minibatches:
        batch, weights = weigh(config, parts, state, batch, watch)

    updates, flops, tokens = [], 0.0, np.zeros(2)
    with watch.stage("update"):
        for epoch in range(config.optimizer.epochs if minibatches else 0):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in groups.minibatches(batch, minibatches, rng):
                part = with_shares(part, config.loss)
                bundles = bundles_of(part, row_parts(placement.mesh), config.optimizer.micro_tokens)
                flops += update_flops(parts.policy.model.config, bundles)
                tokens += np.array(token_counts(bundles))
                state, update_metrics = parts.learner.update(state, bundles, reference, bonus)
                updates.append(update_metrics)
        updates = jax.device_get(updates)

    metrics: Metrics = {"step": step} | summarize_step(rounds, updates) | {"flops/update": flops} | weights
    metrics |= {"tokens/trained": tokens[0]}
    if minibatches:
        metrics["update/padding"] = tokens[1] / tokens[0]
    if groups.count(batch) < wanted:
        metrics["states/missing"] = wanted - groups.count(batch)
    if bonus is not None:
        metrics["update/entropy_coefficient"] = bonus
    if "rows/decoded" in metrics:
        metrics["rows/occupancy"] = metrics["tokens/generated"] / metrics["rows/decoded"]
    generated = progress.tokens_generated + metrics.get("tokens/generated", 0)
    metrics |= {"states/carried": groups.count(carried), "tokens/total": generated, "rounds": len(rounds)}
    if rounds:
        metrics["reward/timed_out"] = count_timed_out(parts.verifier, timed_out)
        metrics |= parts.verifier.parts.take()
    rates, difficulty = progress.rates, parts.stream.difficulty
    if rates is not None and difficulty is not None:
        rates = difficulty.remembered(rates, visits)
        metrics |= difficulty.metrics(rates)
    metrics |= watch.metrics() | {"time/step": round(time.perf_counter() - started, 4)}
    skipped = skipped_in_a_row(progress.skipped, updates, config.optimizer.max_skipped)
    progress = dataclasses.replace(
        progress,
        step=step,
        data_position=position,
        tokens_generated=generated,
        skipped=skipped,
        empty_steps=0 if minibatches else progress.empty_steps + 1,
        rates=rates,
        entropy_coefficient=following_bonus(config.loss, bonus, metrics.get("update/entropy")),
    )
    return state, carried, progress, metrics, sample


def may_be_short(config: Config, states: int, empty_steps: int) -> bool:
    """Decide whether a step goes on with a batch that its rounds did not fill.

    Args:
      states: that there are.
      empty_steps: steps in a row before this one that had none.
    """
    return config.credit.short_batch == "use" and (
        states > 0 or empty_steps + 1 < config.optimizer.max_skipped
    )


def after_others(empty_steps: int) -> str:
    """Say that steps before had no state either, and which option bounds their number."""
    if not empty_steps:
        return ""
    return (
        f", and the {empty_steps} before it none either; so many steps in a row end the run "
        f"(optimizer.max_skipped)"
    )


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
