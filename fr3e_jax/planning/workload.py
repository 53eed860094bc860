"""The work of a step under assumptions about lengths of answers: shapes of its programs, and runs of each.

The engine's own schedule of a decoding and the learner's own layout of rows decide on both.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np

from fr3e_jax.config import Config, rows_of_state
from fr3e_jax.config.values import Bounds, NonNegativeNumber, Share
from fr3e_jax.engine.pages import ON_TPU
from fr3e_jax.engine.schedule import Room
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of, most_rows, width_of
from fr3e_jax.parallel.sizes import next_power_of_two
from fr3e_jax.planning.answers import AnswerLengths
from fr3e_jax.planning.decodes import Decode, decode_of
from fr3e_jax.planning.steady import first_decodings, steady_decoding
from fr3e_jax.run.queries import (
    ContinuedShape,
    assumed_states,
    continued_shape,
    most_kept,
    needs_pilots,
    pilot_rollouts,
    pilot_states,
    queries_for,
    round_sizes,
)
from fr3e_jax.types import StateGroups


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Numbers that a plan cannot know.

    Lengths of answers are log-normal and cut at the limit.
    """

    response: Share = 0.35
    """Mean length of an answer as a share of rollout.max_response."""
    prompt: Share = 0.25
    """Mean length of a query as a share of rollout.max_prompt."""
    accepted: Share = 0.5
    """Share of states that carry a gradient."""
    kept: Annotated[float, Bounds(least=1)] = 2.0
    """Mean number of base trajectories of a query that are explored."""
    compute: Share = 0.5
    """Share of the chip's FLOP/s that programs reach."""
    memory: Share = 0.7
    """Share of the bandwidth of its memory that programs reach."""
    network: Share = 0.7
    """Share of the bandwidth of its links that collectives reach."""
    latency: NonNegativeNumber = 5e-6
    """Least time of a collective, seconds."""


Rooms = Callable[[int, int, int, int | None], Room]
"""(Trajectories of a part, branches of each, slots that these share, most branches that are drawn or None) ->
blocks and pages of a decoding."""


def rooms_for(limit: int) -> Rooms:
    """The blocks and pages of decodings where memory bounds nothing. limit: most tokens of a branch."""

    def room(n: int, c: int, slots: int, drawn: int | None) -> Room:
        whole = Room(ON_TPU, n, c, limit, 0, drawn)
        return dataclasses.replace(whole, pages=whole.useful)

    return room


def planned_queries(
    config: Config, parts: int, assumptions: Assumptions, fits: Callable[[int], bool] = lambda _: True
) -> int:
    """Number of queries of a round: with `auto`, as many as a first round asks that knows what is assumed.

    Later ones may ask fewer, for what carried states leave. Plans have the same number for any
    `rollout.wait_for`, so that they can be compared.

    Args:
      config: resolved.
      parts: number of parts that the mesh splits batch rows into.
      assumptions: how many trajectories of a query are explored, and which share of states is accepted.
      fits: whether rounds of so many queries can be sampled; the fewest are taken where none can.
    """
    per_query = assumed_states(config, assumptions.kept, assumptions.accepted)
    sizes = round_sizes(config.rollout, parts)
    fitting = tuple(size for size in sizes if fits(size)) or sizes[:1]
    return queries_for(config.optimizer.batch_states, per_query, fitting)


def kept_trajectories(config: Config, queries: int, assumptions: Assumptions) -> tuple[float, int]:
    """Number of trajectories of a part that are explored.

    Args:
      queries: of the part.

    Returns:
      (number that is assumed, that to which the engine pads it, a power of two).
    """
    if not config.explore.positions:
        return queries, queries
    wanted = max(min(assumptions.kept, most_kept(config)), 1) * queries
    return wanted, next_power_of_two(math.ceil(wanted))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The shape of a chunk on each part: rows of `width` tokens that see `window` slots of the trunks."""

    rows: int
    width: int
    window: int

    @property
    def name(self) -> str:
        """Name of its program in reports."""
        return f"chunk {self.rows} x {self.width}"

    @property
    def tokens(self) -> int:
        """Number of tokens that run through the model."""
        return self.rows * self.width

    @property
    def seen(self) -> int:
        """Number of keys that the rows see, summed over rows."""
        return self.rows * (self.window + self.width)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of a step.

    rounds: of sampling; their mean where rollout.wait_for is below 1. first_return, pilots, explore:
    decodings of a round; explore is None without positions, and pilots where explore.rule needs none. Where
    rollout.wait_for is below 1, first_return is None, and explore has what a round amid a run decodes: base
    trajectories too, and what was left. trajectories: number of trajectories of a part that are explored.
    trunks: (number, width) of the trunks of a bundle on each part -> number of such bundles in the step.
    chunks: shape -> number of such chunks in the step. real: tokens that run through the model in the update,
    padding left out, on all parts. trained: tokens that carry loss. widest, widest_trunks: the chunk and the
    trunks that need most memory.
    """

    rounds: float
    first_return: Decode | None
    explore: Decode | None
    pilots: Decode | None
    trajectories: int
    trunks: dict[tuple[int, int], int]
    chunks: dict[Chunk, int]
    real: int
    trained: int
    widest: Chunk
    widest_trunks: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Number of tokens that are generated in the step."""
        return round(self.rounds * sum(decode.tokens for decode in self.decodings))

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that generate a token."""
        return sum(x.tokens for x in self.decodings) / sum(x.row_steps for x in self.decodings)

    @property
    def opening(self) -> str:
        """Name of the program in reports that opens the branches of `explore`."""
        return "open starts" if self.first_return is None else "open states"

    @property
    def decodings(self) -> list[Decode]:
        """The decodings of a round in order: first return, pilots and exploration where it has them."""
        return [x for x in (self.first_return, self.pilots, self.explore) if x is not None]


def workload_of(
    config: Config,
    parts: int,
    assumptions: Assumptions,
    worst: bool = False,
    update_parts: int | None = None,
    rooms: Rooms | None = None,
    shapes: Sequence[ContinuedShape] | None = None,
) -> Workload:
    """The work of a step of a run.

    Args:
      config: resolved.
      parts: number of parts that the mesh splits batch rows into while sampling.
      assumptions: lengths of answers, and shares of trajectories and states.
      worst: every answer goes to the limit, and every position is at the beginning.
      update_parts: number of parts that updates split batch rows into; None: as many.
      rooms: the blocks and pages of decodings; None: as many as can come to be useful.
      shapes: of decodings that do not wait for their last rollouts; None: those of the configuration.
    """
    rollout, explore, limit = config.rollout, config.explore, config.rollout.max_response
    queries = planned_queries(config, parts, assumptions)
    rng, per_part = np.random.default_rng(0), queries // parts
    mean = limit if worst else assumptions.response * limit
    answers = AnswerLengths(mean, limit, query_tokens(config, assumptions), worst)
    rooms = rooms or rooms_for(limit)
    wanted, kept = kept_trajectories(config, per_part, assumptions)
    restarts, states, alone = explore.positions > 0, explore.positions + 1, explore.temperature is not None

    def decode_queries(lengths: np.ndarray) -> Decode:
        """A decoding of answers [B, C] from the queries alone."""
        lengths = lengths.reshape(parts, per_part, -1)
        # All others wait for the longest, and among so many one goes to the limit.
        lengths[:, 0, 0] = limit
        room = rooms(per_part, lengths.shape[2], rollout.max_prompt, None)
        return decode_of(lengths, room, answers.query, rollout.max_prompt)

    def decode_from(lengths: np.ndarray, first: int, alone: bool) -> Decode:
        """A decoding of continuations [P n, J, M] from states `first` on; `alone` as for `decode_of`."""
        _, count, rollouts = lengths.shape
        prefix = answers.prefix(first, first + count)
        slots, context = rollout.max_prompt + limit, answers.query + np.repeat(prefix, rollouts)
        room = rooms(kept, count * rollouts, slots, None)
        return decode_of(lengths.reshape(parts, kept, -1), room, context, slots, alone)

    whole = answers.whole(queries, rollout.base_trajectories if restarts else explore.rollouts, rng)
    continuations = answers.partial(parts * kept, 0, states, explore.rollouts, rng)
    # Others have random numbers of their own, so that the update is planned as it is without them.
    first = decode = pilots = None
    if rollout.wait_for == 1:
        first, decode = decode_queries(whole), decode_from(continuations, 0, alone) if restarts else None
    else:
        share = wanted / per_part if restarts else 0.0
        shapes = shapes or [continued_shape(config, size // parts) for size in round_sizes(rollout, parts)]
        given = config, parts, queries, shapes, answers, share
        decode = steady_decoding(first_decodings(*given, np.random.default_rng(2), rooms))
    if needs_pilots(explore):
        count, own_rng = pilot_rollouts(explore), np.random.default_rng(1)
        tried = answers.partial(parts * kept, 1, 1 + pilot_states(explore), count, own_rng)
        pilots = decode_from(tried, 1, alone=True)
    per_round = max(parts * math.ceil(wanted) * states * assumptions.accepted, 1)
    lacking = config.optimizer.batch_states / per_round
    rows = continuations.reshape(-1, states, explore.rollouts)
    if config.credit.estimator == "edge":
        segment = limit if worst else max(math.ceil(mean / states), 1)
        rows = np.concatenate([rows, np.full((*rows.shape[:2], 1), segment, np.int32)], axis=2)
    accepted = accepted_groups(config, rows, assumptions, rng)
    return Workload(
        rounds=math.ceil(lacking) if rollout.wait_for == 1 else max(lacking, 1.0),
        first_return=first,
        explore=decode,
        pilots=pilots,
        trajectories=kept,
        **update_shapes(config, update_parts or parts, accepted),
    )


def query_tokens(config: Config, assumptions: Assumptions) -> int:
    """Tokens of a query."""
    return max(int(assumptions.prompt * config.rollout.max_prompt), 1)


def update_shapes(config: Config, parts: int, accepted: StateGroups) -> dict[str, Any]:
    """The fields of a `Workload` that are about the update, from the accepted states of a batch.

    Args:
      config: resolved.
      parts: number of parts that updates split batch rows into.
      accepted: the states of the batch.
    """
    rollout, optimizer = config.rollout, config.optimizer
    budget, epochs = optimizer.micro_tokens, optimizer.epochs
    chunks, trunks, real = collections.Counter[Chunk](), collections.Counter[tuple[int, int]](), 0
    for minibatch in groups.minibatches(accepted, optimizer.minibatches, np.random.default_rng(0)):
        for bundle in bundles_of(minibatch, parts, budget):
            assert bundle.trunks is not None
            trunks[bundle.trunks.token.shape[1:]] += 1
            real += int(bundle.trunks.length.sum())
            for batch, window in zip(bundle.chunks, bundle.window, strict=True):
                rows, width = batch.token.shape
                chunks[Chunk(rows // parts, width - 1, window)] += 1
                real += int((batch.length - 1).sum())
    longest, width = width_of(rollout.max_prompt + rollout.max_response - 1), width_of(rollout.max_response)
    rows = optimizer.batch_states // optimizer.minibatches * rows_of_state(config)
    # Whole answers after a whole trunk, or many short ones: each row has the slots that it sees of its trunk.
    possible = [Chunk(most_rows(rows, width, budget), width, longest), *chunks]
    return {
        "trunks": {shape: epochs * times for shape, times in trunks.items()},
        "chunks": {shape: epochs * times for shape, times in chunks.items()},
        "real": epochs * real,
        "trained": epochs * int(accepted.length.sum()),
        "widest": max(possible, key=lambda chunk: (chunk.seen, chunk.tokens)),
        "widest_trunks": (most_rows(rows, longest, budget), longest),
    }


def accepted_groups(
    config: Config, lengths: np.ndarray, assumptions: Assumptions, rng: np.random.Generator
) -> StateGroups:
    """The accepted states of a batch, `batch_states` of them, with tokens that are all 0.

    Args:
      lengths: int [trees, J, rows], of what is trained on; repeated until there are enough.
    """
    rollout, wanted = config.rollout, config.optimizer.batch_states
    trees, states, rollouts = lengths.shape
    repeats = math.ceil(2 * wanted / max(trees * states * assumptions.accepted, 1))
    tree, state = np.divmod(np.arange(trees * states * repeats), states)
    count = max(round(len(tree) * assumptions.accepted), wanted)
    chosen = np.sort(rng.permutation(len(tree))[:count])[:wanted]
    tree, state = tree[chosen], state[chosen]
    length = lengths[tree % trees, state]
    prefix = np.ceil(state / states * assumptions.response * rollout.max_response).astype(np.int32)
    query = np.full(wanted, query_tokens(config, assumptions), np.int32)
    longest = int(length.max())

    def zeros(dtype: type, *sizes: int) -> np.ndarray:
        return np.zeros(sizes, dtype)

    return StateGroups(
        query=zeros(np.int32, wanted, rollout.max_prompt),
        query_length=query,
        prefix=zeros(np.int32, wanted, rollout.max_response),
        prefix_length=prefix,
        token=zeros(np.int32, wanted, rollouts, longest),
        logprob=zeros(np.float32, wanted, rollouts, longest),
        length=length,
        advantage=zeros(np.float32, wanted, rollouts),
        source=np.stack([tree, np.zeros_like(tree), state], axis=1).astype(np.int32),
    )
