"""Stages 4 to 6 of a round: the states of the base trajectories that are explored."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from fr3e_jax.algorithm.trajectories import Measures
from fr3e_jax.config import Config, rule_needs
from fr3e_jax.cost import Cost, second_pass_flops
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.judged import Judged, root_value
from fr3e_jax.step.measures import kept_rows, measure_trajectories, needs_caches
from fr3e_jax.step.pilots import Explored, sample_pilots
from fr3e_jax.step.record import position_statistic
from fr3e_jax.step.stages import Draws, find_states, keep
from fr3e_jax.types import States


@dataclasses.dataclass(frozen=True)
class ChosenStates:
    """The states of kept trajectories.

    states: on the host. placed: the same on the devices. caches: of the trajectories, where the position rule
    needed them. costs: of what it needed. statistic: what the rule gave each position, where it is recorded.
    """

    states: States
    placed: States
    caches: Segment | None
    costs: dict[str, Cost]
    statistic: Float32[np.ndarray, "N K"] | None


def states_to_explore(
    config: Config,
    parts: Parts,
    params: Params,
    draws: Draws,
    judged: Judged,
    watch: Stopwatch,
    recorded: bool,
) -> ChosenStates:
    """Stages 4 to 6: keep base trajectories, find positions, and lay out the states before them.

    Args:
      params: in the layout for sampling.
      draws: the randomness of the step.
      judged: the queries.
      watch: takes the time of each stage.
      recorded: whether the rollouts are kept, and what the rule gave the positions is asked for.
    """
    engine, queries, base = parts.engine, judged.queries, judged.base
    index, reward, counted = engine.placement.place_rows((queries.index, judged.reward, judged.counted))
    kept = gather(keep(config.explore, draws, index, reward, config.reward.success_at, counted))
    measures, caches, costs = None, None, dict[str, Cost]()
    value = root_value(config, judged)
    if needs := rule_needs(config.explore):
        with watch.stage("positions"):
            rows = kept_rows(engine, base, kept)
            if needs_caches(needs):
                caches = engine.prefill_trajectories(params, judged.placed, rows)
            measures = measure_trajectories(
                needs, engine, params, judged.placed, rows, caches, base, kept, parts.text
            )
        flops = second_pass_flops(parts.policy.model.config, needs, queries.length, base.length, kept)
        costs["positions"] = {"flops": flops}
        if "information" in needs and caches is not None:
            explored = Explored(judged, value, kept, caches)
            information, costs["pilots"] = sample_pilots(config, parts, params, draws, explored, watch)
            measures = dataclasses.replace(measures or Measures(), information=information)
    states, placed = find_states(
        config.explore, engine, draws, queries, base, kept, judged.sampled, value, measures
    )
    statistic = None
    if recorded:
        found = states, placed, value, measures
        statistic = position_statistic(
            config.explore, engine.placement, draws, queries, base, judged.sampled, *found
        )
    return ChosenStates(states, placed, caches, costs, statistic)
