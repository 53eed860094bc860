"""The number of queries of a sampling round: `rollout.queries`, or with `auto` as many as fill the batch.

A step should sample once, since every round waits for its longest answer. With `auto` a round asks for the
states that the batch still lacks, divided by the states that a query has given so far. The numbers are
rounded up to one of few sizes, since each size is a set of compiled programs. All of it follows from counts
that every process has, so all processes ask the same queries.
"""

import dataclasses

from fr3e_jax.config import Config, RolloutConfig
from fr3e_jax.parallel.sizes import two_per_doubling_below
from fr3e_jax.run.saved import Progress

FADING = 0.8  # weight of a step in the counts of accepted states, to that of the step after it
QUERY_MARGIN = 1.2  # queries that are asked, to those that would do on average
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
    pair = explore.keep in ("first_of_each", "random_of_each")
    most = 2 if pair else config.rollout.base_trajectories
    return max(min(kept, most), 1) * (explore.positions + 1) * accepted


def round_sizes(rollout: RolloutConfig, parts: int) -> tuple[int, ...]:
    """List the numbers of queries that a round may have, ascending: one, or with `auto` at most 7.

    Args:
      rollout: section of the configuration.
      parts: row parts of the mesh; each has as many queries as the others.
    """
    if rollout.queries != "auto":
        return (rollout.queries,)
    return tuple(parts * size for size in two_per_doubling_below(max(rollout.max_queries // parts, 1)))


def queries_for(states: float, per_query: float, sizes: tuple[int, ...], left: int | None = None) -> int:
    """Choose the number of queries of a round.

    Args:
      states: that the batch lacks.
      per_query: accepted states that a query is expected to give; 0 takes the largest size.
      sizes: of `round_sizes`.
      left: questions that may be asked; None: any number. The smallest size is taken in any case.
    """
    possible = [size for size in sizes if left is None or size <= left] or [sizes[0]]
    enough = (size for size in possible if size * per_query >= QUERY_MARGIN * states)
    return next(enough, possible[-1])
