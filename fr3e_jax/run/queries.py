"""The number of queries of a sampling round: `rollout.queries`, or with `auto` as many as fill the batch.

A step should sample once, since every round waits for its longest answer. With `auto` a round asks for the
states that the batch still lacks, divided by the states that a query has given so far. The numbers are
rounded up to one of few sizes, since each size is a set of compiled programs. All of it follows from counts
that every process has, so all processes ask the same queries.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from fr3e_jax.algorithm.information import CANDIDATES, PILOT_TOKENS
from fr3e_jax.config import Config, ConfigError, ExploreConfig, RolloutConfig, rule_needs
from fr3e_jax.engine.budget import GB, context_bytes, least_bytes
from fr3e_jax.engine.laid_out import Placed, lay_out
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.schedule import Room
from fr3e_jax.engine.unfinished import QueryRoom, Unfinished
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.parallel.sizes import ceil_divide, next_power_of_two, two_per_doubling_below
from fr3e_jax.run.saved import Progress

FADING = 0.8  # weight of a step in the counts of accepted states, to that of the step after it
QUERY_MARGIN = 1.2  # queries that are asked, to those that would do on average
IN_RESERVE = 0.5  # states that should wait when a round begins that does not wait, to those of a batch
RESERVE_GAIN = 0.25  # of what the reserve lacks, that a round makes up for: more would swing
MOST_ROUNDS_UNFINISHED = 8  # rounds whose queries may be unfinished, so that memory is bounded
ASSUMED_QUERIES = 8  # weight of the assumption before the first round, in queries
ASSUMED_KEPT, ASSUMED_ACCEPTED = 2.0, 0.5  # trajectories of a query, and share of their states


@dataclasses.dataclass(frozen=True)
class AcceptedCount:
    """How many queries were asked, and how many of their states were accepted; older steps count less."""

    queries: float
    states: float

    @property
    def per_query(self) -> float:
        """Mean number of states of a query that were accepted, by which the next round asks."""
        return self.states / self.queries

    def add_round(self, queries: int, states: int) -> "AcceptedCount":
        """Count a round with full weight."""
        return AcceptedCount(self.queries + queries, self.states + states)

    def fade(self) -> "AcceptedCount":
        """Lower the weight of all that is counted, before the first round of a step is added."""
        return AcceptedCount(FADING * self.queries, FADING * self.states)


def accepted_before(config: Config, progress: Progress) -> AcceptedCount:
    """Take the counts of the steps before; an assumption where no round was sampled yet.

    Args:
      config: resolved.
      progress: up to the step before.
    """
    if progress.recent_queries > 0:
        return AcceptedCount(progress.recent_queries, progress.recent_states)
    return AcceptedCount(ASSUMED_QUERIES, ASSUMED_QUERIES * assumed_states(config))


def assumed_states(config: Config, kept: float = ASSUMED_KEPT, accepted: float = ASSUMED_ACCEPTED) -> float:
    """Assume how many states of a query are accepted.

    Args:
      config: resolved.
      kept: trajectories of a query that are explored.
      accepted: share of the states that are accepted.
    """
    explore = config.explore
    if not explore.positions:
        return accepted
    return max(min(kept, most_kept(config)), 1) * (explore.positions + 1) * accepted


def most_kept(config: Config) -> int:
    """Most trajectories of a query that are explored."""
    pair = config.explore.keep in ("first_of_each", "random_of_each")
    return 2 if pair else config.rollout.base_trajectories


def needs_pilots(explore: ExploreConfig) -> bool:
    """Whether the position rule needs pilot rollouts."""
    return explore.positions > 0 and "information" in rule_needs(explore)


def pilot_states(explore: ExploreConfig) -> int:
    """Number of candidates of a trajectory, from each of which pilots are sampled."""
    return CANDIDATES * explore.positions


def pilot_rollouts(explore: ExploreConfig) -> int:
    """Number of pilots of a candidate."""
    return len(PILOT_TOKENS) * explore.pilots


def query_room(config: Config) -> QueryRoom:
    """What a query of a run has room for; without positions its base trajectories are all that there is."""
    explore, rollout = config.explore, config.rollout
    base = rollout.base_trajectories if explore.positions else explore.rollouts
    kept = min(most_kept(config), base) if explore.positions else 1
    return QueryRoom(base, kept, explore.positions + 1, explore.rollouts, rollout.max_response)


class ContinuedShape(NamedTuple):
    """What decodes together on a part where rollout.wait_for is below 1.

    rows: trajectories. branches: most that decode at the same time. left: most of them that the decoding
    before may have left in the middle, each of which has a row of its own.
    """

    rows: int
    branches: int
    left: int

    def may_run(self, wait_for: float, drawn: int, parts: int) -> int:
        """Count the branches that may still run when a decoding ends.

        Args:
          wait_for: share of the branches that are to end.
          drawn: branches of all parts. parts: of the mesh.
        """
        return min(int((1 - wait_for) * drawn + 1e-6), self.left * parts)


def continued_shape(config: Config, queries: int) -> ContinuedShape:
    """Count what decodes together: the kept trajectories of so many queries, the base trajectories of as many
    new ones, and what the decoding before has left.

    Args:
      config: resolved.
      queries: of a round, of a part.
    """
    sizes, wait_for = query_room(config), config.rollout.wait_for
    kept = sizes.kept if config.explore.positions else 0
    branches = queries * (sizes.base + kept * sizes.branches)
    left = math.ceil((1 - wait_for) / wait_for * branches)
    rows = queries * (kept + ceil_divide(sizes.base, sizes.branches)) + left
    if wait_for == 1 and kept:  # what was begun before is completed in the memory of an exploration
        rows = next_power_of_two(queries * kept)
    return ContinuedShape(rows, branches + left, left)


def round_sizes(rollout: RolloutConfig, parts: int) -> tuple[int, ...]:
    """List the numbers of queries that a round may have, ascending: one, or with `auto` at most 7.

    Args:
      rollout: section of the configuration.
      parts: row parts of the mesh; each has as many queries as the others.
    """
    if rollout.queries != "auto":
        return (rollout.queries,)
    return tuple(parts * size for size in two_per_doubling_below(max(rollout.max_queries // parts, 1)))


def least_cache(config: Config, engine: Engine, model: DecoderConfig, queries: int) -> int:
    """Count the bytes on a device with which every branch of a round of so many queries ends.

    Args:
      config: resolved.
      engine: of the run. model: its architecture.
      queries: of the round.
    """
    rollout, explore = config.rollout, config.explore
    per_part = queries // row_parts(engine.placement.mesh)
    prompt, response = rollout.max_prompt, rollout.max_response
    decodings = [(per_part, explore.rollouts, prompt)]
    if explore.positions:
        kept = per_part * min(most_kept(config), rollout.base_trajectories)
        states = (explore.positions + 1) * explore.rollouts
        decodings = [
            (per_part, rollout.base_trajectories, prompt),
            (next_power_of_two(kept), states, prompt + response),
        ]
        if needs_pilots(explore):
            pilots = pilot_states(explore) * pilot_rollouts(explore)
            decodings.append((decodings[-1][0], pilots, prompt + response))
    if rollout.wait_for < 1:
        rows = continued_shape(config, per_part).rows
        decodings = [(rows, query_room(config).branches, prompt + response), *decodings[2:]]
    if config.evaluate.every:
        decodings.append((ceil_divide(config.evaluate.rows, row_parts(engine.placement.mesh)), 1, prompt))
    dtype = config.model.compute_dtype
    return max(
        least_bytes(model, engine.placement, Room(engine.sizes, n, c, response, 0), slots, dtype)
        for n, c, slots in decodings
    )


def fitting_sizes(config: Config, engine: Engine, model: DecoderConfig) -> tuple[int, ...]:
    """List the numbers of queries that a round may have, those whose KV caches fit.

    Raises:
      ConfigError: none does.
    """
    sizes = round_sizes(config.rollout, row_parts(engine.placement.mesh))
    room = engine.cache_bytes
    fitting = [n for n in sizes if room is None or least_cache(config, engine, model, n) <= room]
    if fitting:
        return tuple(fitting)
    assert room is not None
    least = least_cache(config, engine, model, sizes[0])
    raise ConfigError(
        f"the KV caches of a round of {sizes[0]} queries and of an evaluation take at least "
        f"{least / GB:.2f} GB on each device, "
        f"and rollout.cache_gb {config.rollout.cache_gb} gives {room / GB:.2f}; lower --rollout.queries, "
        f"--evaluate.rows, --rollout.max_response or --explore.rollouts, or raise --rollout.cache_gb"
    )


def continued_shapes(
    config: Config, engine: Engine, model: DecoderConfig, sizes: Sequence[int]
) -> list[ContinuedShape]:
    """List the shapes that decodings have which do not wait for their last rollouts, ascending.

    They are the smallest, and those that leave pages at least as much memory as the caches that branches
    share take: with few pages most branches would wait.

    Args:
      config: resolved.
      engine: of the run. model: its architecture.
      sizes: numbers of queries of rounds that fit, ascending.
    """
    placement, rollout = engine.placement, config.rollout
    slots, dtype = rollout.max_prompt + rollout.max_response, config.model.compute_dtype
    parts, shapes = row_parts(placement.mesh), list[ContinuedShape]()
    for size in sizes:
        shape = continued_shape(config, size // parts)
        room = Room(engine.sizes, shape.rows, 1, rollout.max_response, 0)
        shared = context_bytes(model, placement, room, slots, dtype)
        if not shapes or engine.cache_bytes is None or 2 * shared <= engine.cache_bytes:
            shapes.append(shape)
    return shapes


def laid_out_decoding(
    config: Config, unfinished: Unfinished, shapes: Sequence[ContinuedShape], parts: int
) -> tuple[Placed, ContinuedShape, int]:
    """Lay out the next decoding of a run that does not wait for its last rollouts.

    Args:
      config: resolved.
      unfinished: all queries that are not complete.
      shapes: of `continued_shapes`. parts: of the mesh.

    Returns:
      (branches where they sit, the shape that has room for them, branches that may still run at the end).
    """
    rows = [shape.rows for shape in shapes]
    placed = lay_out(unfinished, config.rollout.base_trajectories, query_room(config).branches, rows, parts)
    shape = shapes[rows.index(len(placed.place) // parts)]
    return placed, shape, shape.may_run(config.rollout.wait_for, int(placed.starts.drawn.sum()), parts)


def queries_for(states: float, per_query: float, sizes: tuple[int, ...], left: int | None = None) -> int:
    """Choose the number of queries of a round.

    Args:
      states: that the batch lacks.
      per_query: accepted states that a query is expected to give; 0 takes the largest size.
      sizes: of `round_sizes`.
      left: questions that may be asked; None: any number. The smallest size is taken in any case.
    """
    possible = sizes_within(sizes, left)
    enough = (size for size in possible if size * per_query >= QUERY_MARGIN * states)
    return next(enough, possible[-1])


def sizes_within(sizes: tuple[int, ...], left: int | None) -> tuple[int, ...]:
    """Choose the sizes of rounds that ask no more questions than are left; the smallest in any case."""
    return tuple(size for size in sizes if left is None or size <= left) or sizes[:1]


def queries_to_begin(
    config: Config,
    states: float,
    unfinished: int,
    per_query: float,
    sizes: tuple[int, ...],
    left: int | None = None,
) -> int:
    """Choose the number of queries that a round begins where it does not wait for its last rollouts.

    Queries are complete some rounds later, and how many depends on their lengths. So with rollout.queries
    `auto` each round begins what one step uses: as many states as a batch has, and a little more or fewer
    where fewer or more states than `IN_RESERVE` wait. Of the sizes the nearest is taken, as what it is too
    large or too small by shows in later rounds.

    Args:
      config: resolved.
      states: that the batch lacks.
      unfinished: queries that are not complete.
      per_query: accepted states that a query is expected to give; 0 takes the largest size.
      sizes: numbers of queries that a decoding has room for, ascending.
      left: questions that may be asked, as for `queries_for`.
    """
    if config.rollout.wait_for == 1:
        return 0  # those are completed that were begun before another wait_for was set
    if unfinished > MOST_ROUNDS_UNFINISHED * sizes[-1]:
        return 0
    if config.rollout.queries != "auto":
        return sizes[0]
    batch = config.optimizer.batch_states
    wanted = max(batch + RESERVE_GAIN * (IN_RESERVE * batch - (batch - states)), 0.0)
    possible = sizes_within(sizes, left)
    return min(possible, key=lambda size: abs(size * per_query - wanted)) if per_query > 0 else possible[-1]
