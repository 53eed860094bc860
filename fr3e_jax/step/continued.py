"""A round that does not wait for its last rollouts (`rollout.wait_for` below 1).

One decoding samples the base trajectories of new queries, the partial rollouts of queries whose states are
open, and what the decoding before has left. It ends when enough of these have ended. Queries whose base
trajectories are all there get their states, which the next decoding explores. Those whose rollouts are all
there leave as a round whose last rewards are being found. The others go on in the next step.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from fr3e_jax.config import Config
from fr3e_jax.cost import Cost, decode_cost, prefill_cost
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.laid_out import Placed
from fr3e_jax.engine.unfinished import (
    Unfinished,
    absorbed,
    begin,
    complete,
    joined,
    states_of_queries,
    with_states,
)
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.parallel.sizes import ceil_divide, next_power_of_two
from fr3e_jax.problems.difficulty import SuccessRates
from fr3e_jax.rewards.verify import Notes, PartMeans, Rewards, Verifier
from fr3e_jax.run.build import Parts, sampling_of
from fr3e_jax.run.queries import laid_out_decoding, query_room
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.choose import states_to_explore
from fr3e_jax.step.judged import Judged, uncut
from fr3e_jax.step.record import ForRecord
from fr3e_jax.step.rounds import Round, roots
from fr3e_jax.step.stages import Draws, draws_of
from fr3e_jax.types import Problem, Rollouts, States


def continue_round(
    config: Config,
    parts: Parts,
    params: Params,
    step: int,
    position: int,
    watch: Stopwatch,
    rates: SuccessRates | None,
    recorded: bool,
    count: int,
    unfinished: Unfinished | None,
) -> tuple[Unfinished | None, Round | None, dict[str, Cost], int]:
    """Stages 1 to 8 of all queries that are not complete, until enough branches have ended.

    Args:
      params, step, position, watch, rates, recorded: as for `open_round`.
      count: of queries that are begun; 0: none.
      unfinished: queries that were begun before.

    Returns:
      (queries that are not complete, those that are as a round whose rewards are being found, costs of the
      stages, position in the stream behind the queries that were begun); None without any queries.

    Raises:
      NotFiniteError: tokens were drawn from logits that are not finite.
    """
    draws = draws_of(config.seed, step, parts.engine.placement)
    if count:
        with watch.stage("tokenize"):
            queries, _, position = parts.stream.take(position, count, rates)
        begun = begin(queries, step, query_room(config))
        unfinished = begun if unfinished is None else joined(unfinished, begun)
    assert unfinished is not None, "a round has queries that are begun, or such as were begun before"
    mesh_rows, shapes = row_parts(parts.engine.placement.mesh), parts.continued_shapes(config)
    placed, shape, may_run = laid_out_decoding(config, unfinished, shapes, mesh_rows)
    with watch.stage("explore"):
        drawn, running, row_steps = parts.engine.go_on(
            params,
            parts.engine.placement.place_rows(placed.queries),
            parts.engine.placement.place_rows(placed.starts),
            seed_key=draws.tokens,
            sampling=sampling_of(config.rollout, config.explore.temperature),
            may_run=may_run,
            drawn=shape.branches,
        )
        drawn, running = gather((drawn, running))
    require_finite(drawn, f"step {step}, rollouts")
    costs = {"explore": continued_cost(parts, placed, drawn, int(row_steps))}
    unfinished = absorbed(unfinished, placed.place, drawn, running, step)
    if config.explore.positions:
        whole = np.flatnonzero(unfinished.base.ended.all(axis=1) & ~unfinished.judged)
        most = parts.round_sizes(config)[-1]
        for first in range(0, len(whole), most):
            some = whole[first : first + most]
            unfinished, more = judge_base(config, parts, params, draws, unfinished, some, watch, recorded)
            for stage, cost in more.items():
                costs[stage] = {name: cost[name] + costs.get(stage, {}).get(name, 0.0) for name in cost}
    done = complete(unfinished, bool(config.explore.positions))
    closing = None
    if done.any():
        closing = close(config, parts, unfinished.take(done), watch, recorded, position)
    return None if done.all() else unfinished.take(~done), closing, costs, position


def continued_cost(parts: Parts, placed: Placed, drawn: Rollouts, row_steps: int) -> Cost:
    """Count the cost of a decoding: each query is prefilled once, and tokens are drawn.

    What is prefilled again, prefixes and what was drawn before, is recomputation, which is not counted.

    Args:
      placed: what was decoded. drawn: on the host. row_steps: rows that were decoded, added up over steps.
    """
    model, starts = parts.policy.model.config, placed.starts
    prefix = placed.queries.length[:, None] + starts.prefix_length
    begins = (starts.number == 0) & (starts.prefix_length == 0) & (drawn.length > 0)
    prefilled = prefill_cost(model, placed.queries.length[begins.any(axis=1)])
    cost = decode_cost(model, prefix, drawn, row_steps)
    cost["flops"] += prefilled["flops"]
    cost["tokens/reused"] -= prefilled["tokens/prefilled"]
    drawn_now = {"rollouts/drawn": float(starts.drawn.sum())}
    return cost | {"tokens/prefilled": prefilled["tokens/prefilled"]} | drawn_now


def judge_base(
    config: Config,
    parts: Parts,
    params: Params,
    draws: Draws,
    unfinished: Unfinished,
    row: np.ndarray,
    watch: Stopwatch,
    recorded: bool,
) -> tuple[Unfinished, dict[str, Cost]]:
    """Stages 3 to 6 of queries whose base trajectories have all ended.

    Args:
      unfinished: all queries. row: of those that are judged.

    Returns:
      (all queries, those with their states open, costs of the stages).
    """
    placement, (padded, real) = parts.engine.placement, padded_rows(len(row), parts)
    some = unfinished.take(row[padded])
    problems = parts.stream.problems_at(some.queries.index)
    with watch.stage("verify"):
        reward = rewards_alone(parts.verifier, some.base.rollouts, real, problems)()
        base = parts.text.trimmed(some.base.rollouts)
    whole = uncut(config, base)
    counted = np.broadcast_to(real[:, None], reward.shape) & (True if whole is None else whole)
    on_devices = placement.place_rows((some.queries, some.base.rollouts))
    judged = Judged(some.queries, problems, base, reward, counted, *on_devices)
    chosen = states_to_explore(config, parts, params, draws, judged, watch, recorded)
    reward, base = jax.tree.map(lambda x: x[real], (reward, base))
    found = chosen.states, chosen.statistic, config.explore.rollouts
    return with_states(unfinished, row, reward, base, *found), chosen.costs


def close(
    config: Config, parts: Parts, done: Unfinished, watch: Stopwatch, recorded: bool, following: int
) -> Round:
    """Begin stage 8 of queries that have all their rollouts.

    Args:
      done: the queries.
      following: position in the stream behind all that were begun.
    """
    problems, kept_for = parts.stream.problems_at(done.queries.index), ForRecord() if recorded else None
    if not config.explore.positions:
        return close_answers(parts, done, problems, watch, kept_for, following)
    if kept_for is not None:
        with watch.stage("record"):
            note_again(parts, done, problems, kept_for)
    rows = padded_count(int((done.kept >= 0).sum()), parts)
    states, growing, statistic = states_of_queries(done, rows, config.explore.adaptive)
    with watch.stage("verify"):
        rewards = parts.verifier.whole(
            states, growing.rollouts, problems, None if kept_for is None else kept_for.notes
        )
        rollouts = parts.text.trimmed(growing.rollouts, states)
    if kept_for is not None:
        kept_for.statistic = statistic
    return Round(
        done.queries,
        problems,
        done.base.rollouts,
        done.base_reward,
        states,
        rollouts,
        rewards,
        {},
        following,
        drawn_step=growing.drawn_step,
        base_drawn_step=done.base.drawn_step,
        counted=None if states.rollouts is None else states.drawn(config.explore.rollouts),
        for_record=kept_for,
    )


def close_answers(
    parts: Parts,
    done: Unfinished,
    problems: Sequence[Problem],
    watch: Stopwatch,
    kept_for: ForRecord | None,
    following: int,
) -> Round:
    """`close` where the answers from the query alone are all that is sampled."""
    padded, real = padded_rows(done.count, parts)
    growing, asked = jax.tree.map(lambda x: x[padded], done.base), [problems[row] for row in padded]
    notes = None if kept_for is None else kept_for.base_notes
    with watch.stage("verify"):
        rewards = rewards_alone(parts.verifier, growing.rollouts, real, asked, notes)
        rollouts, base = (parts.text.trimmed(x) for x in (growing.rollouts, done.base.rollouts))
    return Round(
        done.queries,
        problems,
        base,
        None,
        real_roots(rollouts, real),
        rollouts,
        rewards,
        {},
        following,
        drawn_step=growing.drawn_step,
        base_drawn_step=done.base.drawn_step,
        for_record=kept_for,
    )


def note_again(parts: Parts, done: Unfinished, problems: Sequence[Problem], kept_for: ForRecord) -> None:
    """Judge base trajectories again for what the verdicts say, which no checkpoint keeps.

    No metric counts them twice.
    """
    verifier, (padded, real) = parts.verifier, padded_rows(done.count, parts)
    silent, timed_out = dataclasses.replace(verifier, parts=PartMeans()), verifier.pool.timed_out
    base, asked = jax.tree.map(lambda x: x[padded], done.base.rollouts), [problems[row] for row in padded]
    rewards_alone(silent, base, real, asked, kept_for.base_notes)()
    verifier.pool.timed_out = timed_out


def padded_count(count: int, parts: Parts) -> int:
    """Round a number of rows up, so that each part of the mesh has as many as few programs have."""
    mesh_rows = row_parts(parts.engine.placement.mesh)
    return mesh_rows * next_power_of_two(ceil_divide(count, mesh_rows))


def padded_rows(count: int, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Number so many rows, and repeat the first up to `padded_count`.

    Returns:
      (numbers, which of them are not repeated).
    """
    rows = np.arange(padded_count(count, parts))
    return np.where(rows < count, rows, 0), rows < count


def real_roots(rollouts: Rollouts, real: np.ndarray) -> States:
    """S_0 of queries; of those that are padding it is not valid, and they stand for the first query."""
    states = roots(rollouts)
    return dataclasses.replace(states, query=np.where(real, states.query, 0), valid=real[:, None])


def rewards_alone(
    verifier: Verifier,
    base: Rollouts,
    real: np.ndarray,
    problems: Sequence[Problem],
    notes: Notes | None = None,
) -> Rewards:
    """Start to find the rewards of answers from the query alone, float32 [B, R]; 0 where only padding.

    Args:
      real: bool [B], False of padding. notes: as for `Verifier.base`.
    """
    rewards = verifier.whole(real_roots(base, real), base, problems, notes)
    return lambda: rewards()[:, 0]
