"""The decodings of the steps of a run that does not wait for its last rollouts (`rollout.wait_for` below 1).

They are simulated one after the other from the first step on, with lengths of answers that are known
beforehand. Each takes over what the one before has left. Which branch sits where is the engine's own choice,
and so is when a decoding ends.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fr3e_jax.config import Config
from fr3e_jax.engine.schedule import Room
from fr3e_jax.engine.unfinished import QueryRoom, Unfinished, begin
from fr3e_jax.planning.answers import AnswerLengths
from fr3e_jax.planning.decodes import Decode, decode_of
from fr3e_jax.run.queries import ContinuedShape, laid_out_decoding, query_room
from fr3e_jax.types import PER_TOKEN, Growing, Queries

STEPS = 16  # that are simulated
UNLIKE = 3  # of them, at first, have less in work than those that follow


@dataclasses.dataclass(frozen=True)
class InWork:
    """Q queries whose rollouts are not all there.

    base, partial: int [Q, R] and [Q, T J M], tokens that each branch has in the end; 0: there is none.
    base_drawn, partial_drawn: those of them that it has drawn. judged: bool [Q], whether base trajectories
    are judged, and states are open.
    """

    base: np.ndarray
    partial: np.ndarray
    base_drawn: np.ndarray
    partial_drawn: np.ndarray
    judged: np.ndarray

    @property
    def left(self) -> np.ndarray:
        """Tokens that each branch still has to draw, int [.], in the order of `Placed.place`."""
        parts = self.base - self.base_drawn, self.partial - self.partial_drawn
        return np.concatenate([x.reshape(-1) for x in parts])


def steady_decoding(steps: Sequence[tuple[InWork, Decode]]) -> Decode:
    """The decoding of a step amid a run, of those that `first_decodings` returns.

    Steps differ by chance. It is the one that is nearest to the mean, by the time that it takes and the
    tokens that it draws.
    """
    later = [decode for _, decode in steps[UNLIKE:]]
    found = np.array([(relative_time(decode), decode.tokens) for decode in later], float)
    return later[int(np.abs(found / found.mean(axis=0) - 1).sum(axis=1).argmin())]


def relative_time(decode: Decode) -> int:
    """The time of a decoding in the unit that the engine compares spans of blocks by, rows computed."""
    return sum(leg.steps * (leg.rows + leg.spans * decode.room.sizes.fixed) for leg in decode.legs)


def first_decodings(
    config: Config,
    parts: int,
    queries: int,
    shapes: Sequence[ContinuedShape],
    answers: AnswerLengths,
    kept: float,
    rng: np.random.Generator,
    rooms: Callable[[int, int, int, int | None], Room],
    steps: int = STEPS,
) -> list[tuple[InWork, Decode]]:
    """The decodings of the first steps of a run.

    Args:
      config: resolved.
      parts: number of parts that the mesh splits batch rows into.
      queries: that each step begins. shapes: of decodings, ascending, as `continued_shapes` lists them.
      answers: their lengths. kept: mean number of base trajectories of a query that are explored.
      rooms: (trajectories of a part, branches of each, slots that these share, most branches that are drawn)
        -> blocks and pages.
      steps: number of decodings.

    Returns:
      (queries that are decoded, decoding) of each step.
    """
    rollout, room, found = config.rollout, query_room(config), list[tuple[InWork, Decode]]()
    slots, prefix, in_work = rollout.max_prompt + rollout.max_response, answers.prefix(0, room.states), None
    for step in range(steps):
        base = answers.whole(queries, room.base, rng)
        partial = answers.partial(queries * room.kept, 0, room.states, room.rollouts, rng)
        partial = partial.reshape(queries, room.kept, -1)
        # Query by query a whole number of trajectories is kept, which has the mean that is assumed.
        number = np.diff(np.floor(kept * np.arange(step * queries, (step + 1) * queries + 1) + 1e-9))
        partial = np.where((np.arange(room.kept) < number[:, None])[..., None], partial, 0)
        in_work = begun(in_work, base, partial.reshape(queries, -1))
        unfinished = unfinished_of(in_work, room, prefix)
        placed, shape, may_run = laid_out_decoding(config, unfinished, shapes, parts)
        there = placed.place >= 0
        lengths = np.where(there, in_work.left[placed.place], 0).reshape(parts, -1, room.branches)
        context = answers.query + np.asarray(placed.starts.prefix_length).reshape(lengths.shape)
        of_pages = rooms(*lengths.shape[1:], slots, shape.branches)
        alone = config.explore.temperature is not None
        decode = decode_of(lengths, of_pages, context, slots, alone, may_run)
        found.append((in_work, decode))
        drawn = (decode.lengths - decode.left).reshape(there.shape)
        in_work = after_drawing(in_work, placed.place[there], drawn[there])
    return found


def begun(in_work: InWork | None, base: np.ndarray, partial: np.ndarray) -> InWork:
    """Put queries, of which nothing is drawn, behind those that are in work; others as in `InWork`."""
    new = InWork(base, partial, np.zeros_like(base), np.zeros_like(partial), np.zeros(len(base), bool))
    if in_work is None:
        return new
    fields = [(getattr(in_work, x.name), getattr(new, x.name)) for x in dataclasses.fields(InWork)]
    return InWork(*map(np.concatenate, fields))


def unfinished_of(in_work: InWork, room: QueryRoom, prefix: np.ndarray) -> Unfinished:
    """The queries in work as the engine has them, with tokens that are all 0.

    Args:
      room: of each query. prefix: int [J], tokens of a trajectory before each of its states.
    """
    count = len(in_work.judged)
    queries = Queries(*(np.zeros(shape, np.int32) for shape in ((count, 1), (count,), (count,))))
    empty = begin(queries, 0, room._replace(response=1))  # one token that is repeated takes no memory

    def growing(nothing: Growing, drawn: np.ndarray, ended: np.ndarray) -> Growing:
        shape = (*drawn.shape, room.response)
        zeros = {name: np.broadcast_to(getattr(nothing.rollouts, name), shape) for name in PER_TOKEN}
        rollouts = dataclasses.replace(nothing.rollouts, length=drawn, **zeros)
        return dataclasses.replace(nothing, rollouts=rollouts, ended=ended)

    ended = (in_work.partial_drawn >= in_work.partial) | ~in_work.judged[:, None]
    return dataclasses.replace(
        empty,
        base=growing(empty.base, in_work.base_drawn, in_work.base_drawn >= in_work.base),
        partial=growing(empty.partial, in_work.partial_drawn, ended),
        prefix_length=np.broadcast_to(prefix.astype(np.int32), empty.prefix_length.shape),
    )


def after_drawing(in_work: InWork, place: np.ndarray, drawn: np.ndarray) -> InWork:
    """Add what a decoding has drawn, open states, and leave out the queries that are complete.

    Args:
      place: int [branches], of the branches that were decoded, as in `Placed`. drawn: tokens of each.
    """
    more = np.zeros(in_work.base.size + in_work.partial.size, in_work.base.dtype)
    more[place] = drawn
    base = in_work.base_drawn + more[: in_work.base.size].reshape(in_work.base.shape)
    partial = in_work.partial_drawn + more[in_work.base.size :].reshape(in_work.partial.shape)
    judged = np.all(base >= in_work.base, axis=1)
    goes_on = np.logical_not(judged & np.all(partial >= in_work.partial, axis=1))
    fields = in_work.base, in_work.partial, base, partial, judged
    return InWork(*(x[goes_on] for x in fields))
