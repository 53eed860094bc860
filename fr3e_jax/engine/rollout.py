"""First return, explore, and plain sampling: the rollouts of a step.

`first_return` samples R trajectories per query and hands their caches over; `explore` restarts from states
of the kept ones on those caches; `sample` does the first without keeping caches. Each opens branches in one
program and decodes them in a few: the loop over tokens stays on the device, and comes back when so many
branches have stopped that the others are worth moving together.
"""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fr3e_jax.engine.branches import (
    Branches,
    Decoding,
    advance_branches,
    prefill,
    reseat,
    start_branches,
)
from fr3e_jax.engine.sampler import Sampling, row_key
from fr3e_jax.engine.seats import Ladder, Seats, first_slots, take_seats
from fr3e_jax.engine.stops import states_along
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder, Params
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, row_parts
from fr3e_jax.types import Queries, Rollouts, States, StopTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
    """What exploration restarts from: the segments of a round's queries and base trajectories.

    query: key, value [L, B, K, Q, D], length [B]. base: key, value [L, P, K, rows x S, D], branch r of the
    b-th query of a part in row b x count + r.
    """

    query: Segment
    base: Segment
    rows: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Engine:
    """The rollouts of one model on one mesh.

    max_new: most tokens of a response. end_tokens: a branch stops after drawing one of these. between: called
    before each program of a decoding, and may end it with an exception. stops: texts that end a branch too.
    """

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    max_new: int
    end_tokens: tuple[int, ...]
    between: Callable[[], None] = lambda: None
    stops: StopTable | None = None

    def first_return(
        self,
        params: Params,
        queries: Queries,
        seed_key: Array,
        step: Array | int,
        count: int,
        sampling: Sampling,
    ) -> tuple[Rollouts, Caches, Array]:
        """Sample `count` base trajectories from every query.

        Rows keep their place, since exploration goes on from what they hold.

        Returns:
          (Rollouts with N = B and C = count, the caches, rows decoded over all steps).
        """
        number = self.placement.place_rows(roots(queries, count))
        branches, decoding = self.open_queries(params, queries, number, seed_key, step)
        decoding = last(self.decode(params, branches, decoding, sampling, compact=False))
        (query_segment,) = branches.context
        query_segment = query_segment._replace(length=queries.length)
        rows = self.rows_of(branches)
        return decoding.rollouts, Caches(query_segment, decoding.own, rows, count), decoding.row_steps

    def sample(
        self,
        params: Params,
        queries: Queries,
        seed_key: Array,
        step: Array | int,
        count: int,
        sampling: Sampling,
    ) -> tuple[Rollouts, Array]:
        """Sample `count` answers to every query, and keep nothing else.

        Returns:
          (Rollouts with N = B and C = count, rows decoded over all steps).
        """
        number = self.placement.place_rows(roots(queries, count))
        branches, decoding = self.open_queries(params, queries, number, seed_key, step)
        decoding = last(self.decode(params, branches, decoding, sampling))
        return decoding.rollouts, decoding.row_steps

    def explore(
        self,
        params: Params,
        queries: Queries,
        caches: Caches,
        states: States,
        seed_key: Array,
        step: Array | int,
        rollouts: int,
        sampling: Sampling,
        keep: bool = False,
    ) -> tuple[Rollouts, Array]:
        """Sample `rollouts` continuations from every valid state.

        Args:
          queries, caches: as given to and returned by `first_return`; the caches are used up, unless `keep`.
          states: of N trajectories, N dividing by the mesh's row parts, and each in the part of its query
            (`arrange`).

        Returns:
          (Rollouts with N trajectories and C = J x rollouts branches, state-major, rows decoded over all
          steps).
        """
        branches, decoding = self.open_states(params, queries, caches, states, seed_key, step, rollouts)
        if not keep:  # what the kept trajectories need of them has been taken out
            jax.tree.map(lambda x: x.delete(), (caches.base.key, caches.base.value))
        decoding = last(self.decode(params, branches, decoding, sampling))
        return decoding.rollouts, decoding.row_steps

    @functools.partial(jax.jit, static_argnames=("self",))
    def open_queries(
        self, params: Params, queries: Queries, number: Array, seed_key: Array, step: Array | int
    ) -> tuple[Branches, Decoding]:
        """Prefill the queries, each once, and open branches from them.

        Args:
          number: int32 [B, C], the branches' numbers, which their randomness is a function of.
        """
        model = nnx.merge(self.graph, params)
        query_segment = prefill(model, self.placement, queries.token, queries.length)
        shape = number.shape
        last = queries.length[:, None] - 1
        position = jnp.broadcast_to(last, shape)
        branches = Branches(
            token=jnp.broadcast_to(jnp.take_along_axis(queries.token, last, axis=1), shape),
            position=position,
            context=(query_segment._replace(length=position),),
            limit=jnp.full(shape, self.max_new, jnp.int32),
            key=branch_keys(seed_key, step, queries.index, number),
            stops=self.stops,
            begun=None if self.stops is None else jnp.zeros(shape, jnp.int32),
        )
        return branches, self.start(model, branches)

    @functools.partial(jax.jit, static_argnames=("self", "rollouts"))
    def open_states(
        self,
        params: Params,
        queries: Queries,
        caches: Caches,
        states: States,
        seed_key: Array,
        step: Array | int,
        rollouts: int,
    ) -> tuple[Branches, Decoding]:
        """Open `rollouts` branches from every valid state."""
        model = nnx.merge(self.graph, params)

        def per_branch(x: Array) -> Array:
            return jnp.repeat(x, rollouts, axis=1)

        # The kept trajectories' rows are taken out once; their branches share them.
        query_length = queries.length[states.query][:, None]
        query_segment = Segment(
            take_query(caches.query.key, states, row_parts(self.placement.mesh)),
            take_query(caches.query.value, states, row_parts(self.placement.mesh)),
            per_branch(jnp.broadcast_to(query_length - 1, states.prefix_length.shape)),
        )
        per_part = queries.length.shape[0] // row_parts(self.placement.mesh)
        base_segment = Segment(
            take_trajectory(caches.base.key, caches, states, per_part),
            take_trajectory(caches.base.value, caches, states, per_part),
            per_branch(states.prefix_length),
        )
        begun = None
        if self.stops is not None:
            begun = jnp.take_along_axis(
                states_along(self.stops, states.response), states.prefix_length, axis=1
            )
            begun = per_branch(begun)
        before = jnp.take_along_axis(states.response, jnp.maximum(states.prefix_length - 1, 0), axis=1)
        last = jnp.take_along_axis(queries.token[states.query], query_length - 1, axis=1)
        token = jnp.where(states.prefix_length > 0, before, last)

        # A whole answer, prefix included, has at most max_new tokens.
        limit = jnp.where(states.valid, self.max_new - states.prefix_length, 0)
        count = states.prefix_length.shape[1] * rollouts
        # Branch numbers continue after the base trajectories', one range per trajectory of the query.
        number = caches.count + states.base[:, None] * count + jnp.arange(count)[None, :]
        branches = Branches(
            token=per_branch(token),
            position=per_branch(query_length - 1 + states.prefix_length),
            context=(query_segment, base_segment),
            limit=per_branch(limit),
            key=branch_keys(seed_key, step, queries.index[states.query], number),
            stops=self.stops,
            begun=begun,
        )
        return branches, self.start(model, branches)

    def start(self, model: Decoder, branches: Branches) -> Decoding:
        """No token yet, and a row for every branch."""
        rows = self.rows_of(branches)
        slots = first_slots(self.max_new)
        return start_branches(model, self.placement, branches, self.max_new, rows, slots)

    def rows_of(self, branches: Branches) -> int:
        """Rows of a part to begin with, one for every branch."""
        return branches.token.size // row_parts(self.placement.mesh)

    def decode(
        self,
        params: Params,
        branches: Branches,
        decoding: Decoding,
        sampling: Sampling,
        compact: bool = True,
        every: int | None = None,
    ) -> Iterator[Decoding]:
        """Generate until every branch has stopped.

        Every process takes the same decisions: they follow from who runs, which all are told.

        Args:
          decoding: as opened; it and what is yielded are used up by going on.
          compact: give the rows of branches that have stopped to others.
          every: tokens between two looks at what was generated, 1 before the first; None looks at the end,
            and before each move.

        Yields:
          How far it has come.
        """
        parts = row_parts(self.placement.mesh)
        rows, slot = self.rows_of(branches), 0
        slots = decoding.own.key.shape[3] // rows
        ladder = Ladder(rows, slots, self.max_new)
        running = np.ones((parts, branches.token.shape[0] // parts, branches.token.shape[1]), bool)
        seats, origin, before = take_seats(running, rows), None, rows
        while True:
            window = min(slots, self.max_new)
            until = window if every is None else min(window, slot + every if slot else 1)
            leave = ladder.below(rows) if compact else 0
            self.between()
            stop, few = (self.placement.place(np.int32(n)) for n in (until, leave))
            with warnings.catch_warnings():
                # A cache that grows cannot be what it grew from.
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                decoding, told = self.advance(
                    params,
                    branches,
                    decoding,
                    self.placement.place_rows(seats),
                    origin,
                    stop,
                    few,
                    sampling,
                    before,
                    slots,
                )
            yield decoding
            now, slot = jax.device_get(told)
            if not now.any():
                return
            running, origin, before = now.reshape(running.shape), None, rows
            fullest = int(running.sum(axis=(1, 2)).max()) if compact else rows
            shape = ladder.next(fullest, rows, slots, slot == slots)
            if shape != (rows, slots):
                old = seats
                rows, slots = shape
                seats = take_seats(running, rows) if compact else old
                origin = self.placement.place_rows(np.take_along_axis(old.row, seats.branch, axis=1))

    @functools.partial(
        jax.jit, static_argnames=("self", "sampling", "before", "slots"), donate_argnames=("decoding",)
    )
    def advance(
        self,
        params: Params,
        branches: Branches,
        decoding: Decoding,
        seats: Seats,
        origin: Array | None,
        until: Array | int,
        leave: Array | int,
        sampling: Sampling,
        before: int,
        slots: int,
    ) -> tuple[Decoding, tuple[Array, Array]]:
        """Move rows together, if `origin` says from where, and generate.

        Args:
          before: rows of a part until now. slots: of a row from now on.
          Others: as for `reseat` and `advance_branches`.

        Returns:
          (how far it has come, (who runs, bool [N, C], and the next slot, int32 [], on every process)).
        """
        model = nnx.merge(self.graph, params)
        if origin is not None:
            own = reseat(model, self.placement, decoding.own, origin, before, seats.rows, slots)
            decoding = dataclasses.replace(decoding, own=own)
        decoding = advance_branches(
            model,
            self.placement,
            branches,
            decoding,
            seats,
            until,
            leave,
            min(slots, self.max_new),
            self.end_tokens,
            sampling,
        )
        return decoding, (self.placement.shard(decoding.running), decoding.own.length)

    def arrange(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lay kept trajectories out so that each is in the mesh's part of its query, whose caches it needs.

        Args:
          kept: bool [B, R].

        Returns:
          (query int32 [N], trajectory int32 [N], real bool [N]: False where only padding).
        """
        parts = row_parts(self.placement.mesh)
        per_part = kept.shape[0] // parts
        pieces = kept.reshape(parts, per_part, -1)
        most = int(pieces.sum(axis=(1, 2)).max())
        n = 1 << max(most - 1, 0).bit_length()  # a power of two, so that few numbers are compiled for
        query = np.repeat(np.arange(parts, dtype=np.int32) * per_part, n).reshape(parts, n)
        trajectory, real = np.zeros((parts, n), np.int32), np.zeros((parts, n), bool)
        for part, piece in enumerate(pieces):
            rows, columns = np.nonzero(piece)
            query[part, : len(rows)] += rows.astype(np.int32)
            trajectory[part, : len(rows)] = columns
            real[part, : len(rows)] = True
        return query.reshape(-1), trajectory.reshape(-1), real.reshape(-1)


def last(steps: Iterator[Decoding]) -> Decoding:
    """The last of them."""
    return collections.deque(steps, maxlen=1)[0]


def roots(queries: Queries, count: int) -> np.ndarray:
    """Branch numbers int32 [B, count] of answers from the query alone, on the host."""
    return np.broadcast_to(np.arange(count, dtype=np.int32), (queries.length.shape[0], count))


def take_query(cache: Array, states: States, parts: int) -> Array:
    """The queries of kept trajectories: [L, B, K, Q, D] -> [L, N, K, Q, D]."""
    layers, count, *each = cache.shape
    index = states.query.reshape(parts, -1) % (count // parts)

    def take(cache: Array, index: Array) -> Array:
        return cache[:, index]

    taken = jax.vmap(take, (1, 0), 1, spmd_axis_name=BATCH_AXES)(
        cache.reshape(layers, parts, -1, *each), index
    )
    return taken.reshape(layers, -1, *each)


def take_trajectory(cache: Array, caches: Caches, states: States, per_part: int) -> Array:
    """Kept trajectories of a base cache: [L, P, K, rows x S, D] -> [L, N, K, S, D]."""
    layers, parts, heads, _, width = cache.shape
    row = states.query.reshape(parts, -1) % per_part * caches.count + states.base.reshape(parts, -1)

    def take(cache: Array, row: Array) -> Array:
        return jnp.moveaxis(cache[:, :, row], 2, 1)

    divided = cache.reshape(layers, parts, heads, caches.rows, -1, width)
    taken = jax.vmap(take, (1, 0), 1, spmd_axis_name=BATCH_AXES)(divided, row)
    return taken.reshape(layers, -1, heads, divided.shape[4], width)


def branch_keys(seed_key: Array, step: Array | int, query: Array, branch: Array) -> Array:
    """Keys [N, C] of branches int32 [N, C] of queries int32 [N]."""
    keys = jax.vmap(row_key, in_axes=(None, None, None, 0))
    return jax.vmap(keys, in_axes=(None, None, 0, 0))(seed_key, step, query, branch)
