"""One step of FR3E: the pipeline of the paper, one line a stage.

A step samples rounds until enough states carry a gradient, then updates the policy. A round is:

  1. queries            B of them from the stream                       problems/stream
  2. base trajectories  R whole answers to each; every token's entropy  engine/rollout.sample
  3. rewards            of the base trajectories                        rewards/verify
  4. kept trajectories  one correct, one wrong                          algorithm/keep
  5. positions          the K most uncertain tokens (one of the rules   algorithm/positions
                        samples pilots before, step/pilots)
  6. states             S_0 = the query, S_j = before position T_j      algorithm/states
  7. partial rollouts   M from each state, on the cached prefixes       engine/rollout.explore
  8. rewards            of the whole answers, while the next round that  rewards/verify
                        is surely needed samples
  9. credit             values, modulated advantages, rejection         algorithm/credit
 10. policy update      clip-higher, once enough states are accepted    learner/update

grpo and grpo++ have no positions: a round is M rollouts from S_0, which stages 2 and 7 both are. Where a
step does not wait for its last rollouts, stages 2 and 7 are one decoding (step/continued.py).
"""

import dataclasses
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.values import counted_states
from fr3e_jax.config import Config
from fr3e_jax.cost import Cost, rollout_cost
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.learner import groups
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.problems.difficulty import SuccessRates
from fr3e_jax.rewards.verify import Rewards
from fr3e_jax.run.build import Parts, sampling_of
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.choose import states_to_explore
from fr3e_jax.step.decisions import decision_metrics
from fr3e_jax.step.judged import Judged, uncut
from fr3e_jax.step.measured import Measured, success_rates
from fr3e_jax.step.metrics import Metrics, cost_metrics, measure
from fr3e_jax.step.record import ForRecord, Recorder
from fr3e_jax.step.sources import source_metrics
from fr3e_jax.step.stages import (
    Draws,
    assign_credit,
    draws_of,
)
from fr3e_jax.types import Queries, Rollouts, StateGroups, States


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
    following: int
    """Position in the stream behind the round's queries."""
    drawn_step: Float32[np.ndarray, "N C"]
    """Mean of the steps in which the tokens of each partial rollout were drawn."""
    base_drawn_step: Float32[np.ndarray, "B R"]
    """Mean of the steps in which the tokens of each base trajectory were drawn."""
    counted: Bool[np.ndarray, "N J M"] | None = None
    """Which of the rollouts count; None: all. Others were never drawn, or their rewards are not known."""
    for_record: ForRecord | None = None
    """What the record of the round needs beside; None where it is not recorded."""

    @property
    def most(self) -> int:
        """States that it can give, whatever the rewards are."""
        return int(self.states.valid.sum())


def open_round(
    config: Config,
    parts: Parts,
    params: Params,
    step: int,
    position: int,
    watch: Stopwatch,
    rates: SuccessRates | None = None,
    recorded: bool = False,
    count: int | None = None,
) -> Round:
    """Stages 1 to 7, and the beginning of 8: answers are judged while the caller goes on.

    Of what has an entry per token, the base trajectories and the partial rollouts come to the host, once
    each; the states stay on the devices.

    Args:
      params: in the layout for sampling.
      step: the training step that samples.
      position: in the stream, from which the round takes its queries.
      watch: takes the time of each stage.
      rates: of questions, by which the stream passes over some.
      recorded: whether its rollouts are kept.
      count: of its queries; None: as many as a round has at most.

    Raises:
      NotFiniteError: tokens were drawn from logits that are not finite.
    """
    engine, verifier, model = parts.engine, parts.verifier, parts.policy.model.config
    draws, place = draws_of(config.seed, step, engine.placement), engine.placement.place_rows
    kept_for = ForRecord() if recorded else None
    base_notes, notes = (None, None) if kept_for is None else (kept_for.base_notes, kept_for.notes)
    with watch.stage("tokenize"):
        count = count or parts.round_sizes(config)[-1]
        queries, problems, following = parts.stream.take(position, count, rates)
    placed = place(queries)
    with watch.stage("first_return"):
        sampled, row_steps = first_return(config, engine, params, draws, placed)
        base = gather(sampled)
    require_finite(base, f"step {step}, base trajectories")
    costs = {"first_return": rollout_cost(model, queries, base, int(row_steps))}
    with watch.stage("verify"):
        base_rewards = verifier.base(base, problems, base_notes)
        base = parts.text.trimmed(base)
    if not config.explore.positions:
        alone, when = (queries, problems, base, None, roots(base), base), drawn_in(step, base)
        return Round(*alone, base_rewards, costs, following, when, when, None, kept_for)
    with watch.stage("verify"):
        base_reward = base_rewards()
    judged = Judged(queries, problems, base, base_reward, uncut(config, base), placed, sampled)
    chosen = states_to_explore(config, parts, params, draws, judged, watch, recorded)
    states, costs = chosen.states, costs | chosen.costs
    with watch.stage("explore"):
        rollouts, row_steps = explore(config, engine, params, draws, placed, chosen.placed, chosen.caches)
        rollouts = gather(rollouts)
    require_finite(rollouts, f"step {step}, partial rollouts")
    costs["explore"] = rollout_cost(model, queries, rollouts, int(row_steps), states)
    with watch.stage("verify"):
        rewards = verifier.whole(states, rollouts, problems, notes)
        rollouts = parts.text.trimmed(rollouts, states)
    counted = None if states.rollouts is None else states.drawn(config.explore.rollouts)
    if kept_for is not None:
        kept_for.statistic = chosen.statistic
    return Round(
        queries,
        problems,
        base,
        base_reward,
        states,
        rollouts,
        rewards,
        costs,
        following,
        drawn_step=drawn_in(step, rollouts),
        base_drawn_step=drawn_in(step, base),
        counted=counted,
        for_record=kept_for,
    )


def drawn_in(step: int, rollouts: Rollouts) -> Float32[np.ndarray, "N C"]:
    """Say of each rollout that its tokens were drawn in a step."""
    return np.full(rollouts.length.shape, step, np.float32)


def close_round(
    config: Config, parts: Parts, opened: Round, watch: Stopwatch, recorder: Recorder | None = None
) -> tuple[StateGroups, Metrics, dict[str, Any] | None, Float32[np.ndarray, " B"]]:
    """The end of stage 8, and 9; a recorder gets the round if it was opened to be recorded.

    Returns:
      (accepted states, metrics, a state with two of its continuations for people to read, the share of right
      answers to each query).
    """
    queries, states, rollouts, base = opened.queries, opened.states, opened.rollouts, opened.base
    place = parts.engine.placement.place_rows
    with watch.stage("verify"):
        reward = opened.rewards()
    base_reward = opened.base_reward
    if base_reward is None:
        base_reward, reward = reward[: len(queries.length)], reward[:, None]
    counted, whole = opened.counted, uncut(config, rollouts)
    if whole is not None:
        counted = whole.reshape(reward.shape) & (True if counted is None else counted)
    edges, base_counted = config.credit.estimator == "edge", uncut(config, base)
    states = dataclasses.replace(states, valid=counted_states(states.valid, counted))
    given = [reward, states.valid, states.query, counted]
    if edges:
        given += [None if x is None else x[states.query, states.base] for x in (base_reward, base_counted)]
    credit = gather(assign_credit(config.credit, *place(given)))
    of_states = (reward, credit.value, credit.alpha, credit.advantage, credit.accepted)
    gathered = groups.collect(
        credit.accepted,
        queries,
        states,
        rollouts,
        credit.advantage,
        credit.trained,
        base if edges else None,
        opened.drawn_step,
        opened.base_drawn_step,
    )
    measured = Measured(
        base,
        base_reward,
        states,
        rollouts,
        *of_states,
        restarts=opened.base_reward is not None,
        success_at=config.reward.success_at,
        counted=counted,
        base_counted=base_counted,
        trained=credit.trained,
        gathered=gathered,
    )
    if recorder is not None and opened.for_record is not None:
        with watch.stage("record"):
            recorder.add(queries, opened.problems, measured, opened.for_record)
    excerpt = parts.verifier.excerpt(credit.accepted, states, rollouts, reward, opened.problems, counted)
    metrics = measure(measured) | cost_metrics(opened.costs)
    if opened.base_reward is not None:
        metrics |= decision_metrics(base, states, opened.problems, parts.text.decode)
    if len(parts.corpus.tasks) > 1:
        metrics |= source_metrics(opened.problems, credit.accepted, states.query)
    return gathered, metrics, excerpt, success_rates(measured)


def first_return(
    config: Config, engine: Engine, params: Params, draws: Draws, queries: Queries
) -> tuple[Rollouts, Array]:
    """Stage 2: R whole answers per query, or M where no other are sampled; all on the devices.

    Returns:
      (rollouts, rows decoded).
    """
    explore, sampling = config.explore, sampling_of(config.rollout)
    count = config.rollout.base_trajectories if explore.positions else explore.rollouts
    return engine.sample(params, queries, draws.tokens, draws.step, count, sampling)


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
    states: States,
    caches: Segment | None = None,
) -> tuple[Rollouts, Array]:
    """Stage 7: M rollouts from every valid state; all on the devices.

    Args:
      caches: of the trajectories; None: they are made.

    Returns:
      (rollouts, rows decoded).
    """
    return engine.explore(
        params,
        queries,
        states,
        seed_key=draws.tokens,
        step=draws.step,
        rollouts=config.explore.rollouts,
        sampling=sampling_of(config.rollout, config.explore.temperature),
        after=config.rollout.base_trajectories,
        caches=caches,
    )
