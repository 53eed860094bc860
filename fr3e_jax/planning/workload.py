"""What a step does, under assumptions about how long answers are: the shapes of its programs, and how often
each runs. The engine's own ladder of rows and the learner's own layout of rows decide.
"""

import collections
import dataclasses
import math
from typing import Annotated

import numpy as np

from fr3e_jax.config import Config
from fr3e_jax.config.values import Bounds, NonNegativeNumber, Share
from fr3e_jax.engine.seats import Ladder, Seats, first_slots, take_seats
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bucket, bundles_of, most_of
from fr3e_jax.types import StateGroups

SPREAD = 0.8  # of the logarithm of answers' lengths


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know.

    Lengths of answers are log-normal and cut at the limit.
    """

    response: Share = 0.35
    """Mean length of an answer as a share of rollout.max_response."""
    prompt: Share = 0.25
    """Mean length of a query as a share of rollout.max_prompt."""
    accepted: Share = 0.5
    """Share of states that carry a gradient."""
    kept: Annotated[float, Bounds(least=1)] = 2.0
    """Base trajectories of a query that are explored."""
    compute: Share = 0.5
    """Share of the chip's FLOP/s that programs reach."""
    memory: Share = 0.7
    """Share of the bandwidth of its memory."""
    network: Share = 0.7
    """Share of the bandwidth of its links."""
    latency: NonNegativeNumber = 5e-6
    """Seconds that a collective takes at least."""


@dataclasses.dataclass(frozen=True)
class Leg:
    """A call of the decoding program.

    before, before_slots: rows of a part and slots of each until then. rows, slots: from then on. steps:
    tokens of every row that it generates. seats: as the engine would seat the branches.
    """

    before: int
    before_slots: int
    rows: int
    slots: int
    steps: int
    seats: Seats

    @property
    def moves(self) -> bool:
        """Whether rows move together, or the cache grows, before it."""
        return (self.before, self.before_slots) != (self.rows, self.slots)

    @property
    def cache(self) -> int:
        """Slots of all rows that are there at a time: of a cache that grows, what it grew from too."""
        size, was = self.rows * self.slots, self.before * self.before_slots
        return size if size == was else size + was


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decoding: its branches, and the calls that it takes.

    lengths: int [P, n, C], tokens of each branch.
    """

    lengths: np.ndarray
    legs: tuple[Leg, ...]

    @property
    def tokens(self) -> int:
        """That are generated, on all parts."""
        return int(self.lengths.sum())

    @property
    def row_steps(self) -> int:
        """Rows decoded, idle ones too, on all parts."""
        return sum(leg.rows * leg.steps for leg in self.legs) * len(self.lengths)

    @property
    def largest(self) -> Leg:
        """The call that needs most memory."""
        return max(self.legs, key=lambda leg: (leg.cache, leg.rows))


def decode_of(lengths: np.ndarray, max_new: int, compact: bool) -> Decode:
    """How the engine would decode branches of these lengths: `Engine.decode`, without a device.

    Args:
      lengths: int [P, n, C], tokens that each branch generates, at least 1.
      compact: whether rows that stop are given to others.
    """
    parts = len(lengths)
    rows = int(lengths[0].size)
    slots, slot = first_slots(max_new), 0
    ladder, legs = Ladder(rows, slots, max_new), list[Leg]()
    seats, before = take_seats(np.ones(lengths.shape, bool), rows), (rows, slots)
    while True:
        window, leave = min(slots, max_new), ladder.below(rows) if compact else 0
        fullest = np.sort(
            lengths.reshape(parts, -1), axis=1
        )  # the part that is last to have few running decides
        last = int(fullest[:, fullest.shape[1] - leave - 1].max()) if leave < fullest.shape[1] else slot
        end = min(max(last, slot), window)
        legs.append(Leg(*before, rows, slots, end - slot, seats))
        slot, before = end, (rows, slots)
        running = lengths > slot
        if not running.any():
            return Decode(lengths, tuple(legs))
        most = int(running.sum(axis=(1, 2)).max()) if compact else rows
        rows, slots = ladder.next(most, rows, slots, slot == slots)
        if (rows, slots) != before and compact:
            seats = take_seats(running, rows)


def lengths_of(count: int, mean: float, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths int [count] of answers: log-normal, cut at the limit, of that mean before the cut."""
    drawn = np.exp(math.log(max(mean, 1.0)) - SPREAD**2 / 2 + SPREAD * rng.standard_normal(count))
    return np.clip(np.ceil(drawn), 1, limit).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Shape of a chunk on each part: rows of `width` tokens that see `window` slots of the trunks."""

    rows: int
    width: int
    window: int

    @property
    def tokens(self) -> int:
        """That run through the model."""
        return self.rows * self.width

    @property
    def seen(self) -> int:
        """Keys of all rows."""
        return self.rows * (self.window + self.width)


@dataclasses.dataclass(frozen=True)
class Work:
    """A step.

    rounds: of sampling. first_return, explore: of a round; explore None without positions. trajectories: of
    a part, that are explored. trunks: (number, width) of a bundle on each part, with how many bundles there
    are. chunks: shapes with how many there are in the step. real: tokens that the update has to run, on all
    parts. trained: tokens that carry loss. widest, widest_trunks: the chunk and the trunks that are assumed
    to need most memory.
    """

    rounds: int
    first_return: Decode
    explore: Decode | None
    trajectories: int
    trunks: dict[tuple[int, int], int]
    chunks: dict[Chunk, int]
    real: int
    trained: int
    widest: Chunk
    widest_trunks: tuple[int, int]


def work_of(config: Config, parts: int, told: Assumptions, worst: bool = False) -> Work:
    """A step of a run.

    Args:
      config: resolved.
      parts: row parts of the mesh.
      worst: every answer goes to the limit.
    """
    rollout, explore, limit = config.rollout, config.explore, config.rollout.max_response
    rng, per_part = np.random.default_rng(0), config.rollout.queries // parts
    mean = limit if worst else told.response * limit
    base = explore.positions > 0
    count = rollout.base_trajectories if base else explore.rollouts
    # That all others wait for the longest is what matters, and among so many one goes to the limit.
    lengths = lengths_of(rollout.queries * count, mean, limit, rng).reshape(parts, per_part, count)
    lengths[:, 0, 0] = limit
    if worst:
        lengths[:] = limit
    first = decode_of(lengths, limit, compact=not base)
    # The engine pads the kept trajectories of a part to a power of two.
    most = 2 if explore.keep in ("first_of_each", "random_of_each") else count
    wanted = max(min(told.kept, most), 1) * per_part if base else per_part
    kept = 1 << max(math.ceil(wanted) - 1, 0).bit_length() if base else per_part
    states = explore.positions + 1
    whole = lengths_of(parts * kept * states * explore.rollouts, mean, limit, rng)
    whole = whole.reshape(parts, kept, states, explore.rollouts)
    # Positions at equal distances; a restart goes on for what its share of an answer is.
    share = 1 - np.arange(states)[:, None] / states
    whole = np.maximum(np.ceil(whole * share), 1).astype(np.int32)
    if worst:  # positions that are all at the beginning
        whole[:] = limit
    decode = decode_of(whole.reshape(parts, kept, -1), limit, compact=True) if base else None
    batch, minibatches = config.optimizer.batch_states, config.optimizer.minibatches
    found = max(parts * math.ceil(wanted) * states * told.accepted, 1)
    accepted = groups_of(config, whole.reshape(-1, states, explore.rollouts), told, rng)
    shapes, trunks, real = collections.Counter[Chunk](), collections.Counter[tuple[int, int]](), 0
    for part in groups.minibatches(accepted, minibatches, np.random.default_rng(0)):
        for bundle in bundles_of(part, parts, config.optimizer.micro_tokens):
            assert bundle.trunks is not None
            trunks[bundle.trunks.token.shape[1:]] += 1
            real += int(bundle.trunks.length.sum())
            for chunk, window in zip(bundle.chunks, bundle.window, strict=True):
                rows, width = chunk.token.shape
                shapes[Chunk(rows // parts, width - 1, window)] += 1
                real += int((chunk.length - 1).sum())
    longest, budget = bucket(rollout.max_prompt + limit - 1), config.optimizer.micro_tokens
    many = batch // minibatches * explore.rollouts
    width, epochs = bucket(limit), config.optimizer.epochs
    return Work(
        rounds=math.ceil(batch / found),
        first_return=first,
        explore=decode,
        trajectories=kept,
        trunks={shape: epochs * times for shape, times in trunks.items()},
        chunks={shape: epochs * times for shape, times in shapes.items()},
        real=epochs * real,
        trained=epochs * int(accepted.length.sum()),
        # Whole answers after a whole trunk, or many short ones: each row has what it sees of its trunk.
        widest=max(
            [Chunk(most_of(many, width, budget), width, longest), *shapes], key=lambda x: (x.seen, x.tokens)
        ),
        widest_trunks=(most_of(many, longest, budget), longest),
    )


def groups_of(
    config: Config, lengths: np.ndarray, told: Assumptions, rng: np.random.Generator
) -> StateGroups:
    """The accepted states of a batch, `batch_states` of them.

    Args:
      lengths: int [trees, J, M], of continuations; repeated until there are enough.
    """
    rollout, wanted = config.rollout, config.optimizer.batch_states
    trees, states, rollouts = lengths.shape
    rounds = math.ceil(2 * wanted / max(trees * states * told.accepted, 1))
    tree, state = np.divmod(np.arange(trees * states * rounds), states)
    chosen = np.sort(rng.permutation(len(tree))[: max(round(len(tree) * told.accepted), wanted)])[:wanted]
    tree, state = tree[chosen], state[chosen]
    length = lengths[tree % trees, state]
    prefix = np.ceil(state / states * told.response * rollout.max_response).astype(np.int32)
    query = np.full(wanted, max(int(told.prompt * rollout.max_prompt), 1), np.int32)
    widest = int(length.max())

    def zeros(dtype: type, *sizes: int) -> np.ndarray:
        return np.zeros(sizes, dtype)

    return StateGroups(
        query=zeros(np.int32, wanted, rollout.max_prompt),
        query_length=query,
        prefix=zeros(np.int32, wanted, rollout.max_response),
        prefix_length=prefix,
        token=zeros(np.int32, wanted, rollouts, widest),
        logprob=zeros(np.float32, wanted, rollouts, widest),
        length=length,
        advantage=zeros(np.float32, wanted, rollouts),
        source=np.stack([tree, np.zeros_like(tree), state], axis=1).astype(np.int32),
    )
