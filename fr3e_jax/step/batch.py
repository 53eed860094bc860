"""The batch of a step: rounds until enough states carry a gradient.

Where `credit.max_rounds` rounds do not give enough, the step ends the run, or uses what there is.
"""

import dataclasses
from typing import Any

import numpy as np

from fr3e_jax.config import Config
from fr3e_jax.engine.unfinished import Unfinished
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.problems.difficulty import SuccessRates
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.build import Parts
from fr3e_jax.run.queries import AcceptedCount, accepted_before, queries_for, queries_to_begin
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.continued import continue_round
from fr3e_jax.step.diagnosis import no_signal
from fr3e_jax.step.metrics import Metrics, cost_metrics
from fr3e_jax.step.record import Recorder
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.types import StateGroups


class SamplingError(RuntimeError):
    """A step did not find enough states that carry a gradient; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class SampledBatch:
    """What the rounds of a step gave."""

    states: StateGroups
    """Accepted states: those that were carried, then those of the rounds."""
    position: int
    """In the stream of queries, behind the last round's."""
    rounds: list[Metrics]
    """Metrics of each round of the step in order; of one in which no query was complete only its costs."""
    metrics: Metrics
    """Metrics of all rounds together."""
    counted: AcceptedCount
    """Queries and their accepted states, those of the rounds included."""
    rates: SuccessRates | None
    """Success rates of questions, with what the rounds showed, where they are remembered."""
    excerpt: dict[str, Any] | None
    """A state with two of its continuations, for people to read."""
    unfinished: Unfinished | None = None
    """Queries whose rollouts are not all there, which go on in the next step; None without any."""


def fill_batch(
    config: Config,
    parts: Parts,
    state: TrainState,
    carried: StateGroups,
    progress: Progress,
    shown: StepProgress,
    watch: Stopwatch,
    recorder: Recorder | None = None,
) -> SampledBatch:
    """Stages 1 to 9, round after round, until the batch is full.

    The arguments and exceptions are those of `train_step`; `watch` takes the time of each stage.
    """
    step, position, wanted = progress.step + 1, progress.data_position, config.optimizer.batch_states
    timed_out, most = parts.verifier.pool.timed_out, config.credit.max_rounds
    rounds: list[Metrics] = []
    visits: list[tuple[np.ndarray, np.ndarray]] = []
    excerpt, waiting, params, ahead = None, carried, None, None
    recorder = None if recorder is None else recorder.begin(step)
    counted, sizes = accepted_before(config, progress), parts.round_sizes(config)
    left, asked = questions_left(parts, progress.rates), list[int]()
    unfinished, judged = progress.unfinished, 0
    shown.begin(step, groups.count(carried), wanted)
    while groups.count(waiting) < wanted:
        if judged == most:
            if may_be_short(config, groups.count(waiting), progress.empty_steps):
                break
            late = count_timed_out(parts.verifier, timed_out)
            if recorder is not None:
                recorder.end()
            raise SamplingError(
                f"step {step}: {most} rounds gave {groups.count(waiting)} of {wanted} states that carry a "
                f"gradient{after_others(progress.empty_steps)}. {no_signal(config, rounds, late)}"
            )
        if params is None:
            params = parts.policy.sampling_params(state.params)
        shown.round(judged + 1, most)
        how = watch, progress.rates, recorder is not None
        missing, per_query = wanted - groups.count(waiting), counted.per_query
        if config.rollout.wait_for < 1 or unfinished is not None:
            begun_before = 0 if unfinished is None else unfinished.count
            with_room = sizes[: len(parts.continued_shapes(config))]
            asked.append(queries_to_begin(config, missing, begun_before, per_query, with_room, left))
            unfinished, opened, costs, position = continue_round(
                config, parts, params, step, position, *how, asked[-1], unfinished
            )
            if opened is None:
                rounds.append(cost_metrics(costs))
                continue
            opened.costs.update(costs)
        else:
            if (opened := ahead) is None:
                queries = queries_for(missing, per_query, sizes, left)
                opened = open_round(config, parts, params, step, position, *how, queries)
            ahead, position = None, opened.following
            asked.append(len(opened.queries.length))
            if opened.most < missing and judged + 1 < most:
                # There will be another round, whatever the verdicts on this one.
                expected = min(per_query * asked[-1], opened.most)
                queries = queries_for(missing - expected, per_query, sizes, left)
                ahead = open_round(config, parts, params, step, position, *how, queries)
        accepted, round_metrics, excerpt, success = close_round(config, parts, opened, watch, recorder)
        visits.append((opened.queries.index, success))
        counted = counted if judged else counted.fade()
        counted = counted.add_round(len(opened.queries.length), groups.count(accepted))
        waiting = groups.concatenate(waiting, accepted)
        rounds.append(round_metrics)
        judged += 1
        shown.states(groups.count(waiting))
    shown.end()
    if recorder is not None:
        with watch.stage("record"):
            recorder.end()

    metrics: Metrics = {"rounds": len(rounds)}
    if rounds:
        metrics["reward/timed_out"] = count_timed_out(parts.verifier, timed_out)
        metrics |= parts.verifier.parts.take()
    if config.rollout.queries == "auto":
        metrics |= {"queries/asked": sum(asked), "queries/states_per_query": counted.per_query}
        metrics |= {"queries/first_round": asked[0]} if asked else {}
    rates, difficulty = progress.rates, parts.stream.difficulty
    if rates is not None and difficulty is not None:
        rates = difficulty.remembered(rates, visits)
        metrics |= difficulty.metrics(rates)
    return SampledBatch(waiting, position, rounds, metrics, counted, rates, excerpt, unfinished)


def questions_left(parts: Parts, rates: SuccessRates | None) -> int | None:
    """Count the questions that are not retired; None where none ever is."""
    difficulty = parts.stream.difficulty
    if difficulty is None or difficulty.retire_above is None or rates is None:
        return None
    return difficulty.left(rates)


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


def count_timed_out(verifier: Verifier, before: int) -> int:
    """Answers on which the scorers of all hosts ran out of time.

    Args:
      before: that it had on this host when the count began.
    """
    here = np.array([verifier.pool.timed_out - before])
    return int(verifier.hosts.add_up(here, "answers that timed out")[0])
