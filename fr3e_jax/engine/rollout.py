"""First return, exploration and plain sampling: the rollouts of a step.

`first_return` samples R base trajectories per query and returns their KV caches. `explore` restarts from
states of the kept ones on these caches. `sample` samples answers and keeps no caches. Each opens branches in
one program and decodes them in a few: the loop over tokens stays on the device, and returns when so many
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
from jaxtyping import Bool, Int, Int32, Key, Shaped

from fr3e_jax.engine.branches import Branches, Decoding, advance_branches, start_branches
from fr3e_jax.engine.caches import Caches, prefill, reseat, take_queries, take_trajectories
from fr3e_jax.engine.sampler import Sampling, branch_keys
from fr3e_jax.engine.seats import Leg, arrange_kept, first_slots, schedule
from fr3e_jax.engine.stops import states_along
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder, Params
from fr3e_jax.parallel.mesh import Placement, row_parts
from fr3e_jax.types import AnyArray, Queries, Rollouts, States, StopTable

Watch = Callable[[int, int, int], None]
"""Is given how far a decoding is: branches that run, all branches, tokens that those which run have drawn."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Engine:
    """Samples rollouts of one model on one mesh.

    max_new: most tokens of a response. end_tokens: a branch stops after drawing one of these. between: called
    before each program of a decoding; it may end the decoding with an exception. watch: called after each.
    stops: recognises texts that end a branch too.
    """

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    max_new: int
    end_tokens: tuple[int, ...]
    between: Callable[[], None] = lambda: None
    watch: Watch = lambda *_: None
    stops: StopTable | None = None

    def first_return(
        self,
        params: Params,
        queries: Queries,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        count: int,
        sampling: Sampling,
    ) -> tuple[Rollouts, Caches, Int32[Array, ""]]:
        """Sample `count` base trajectories from every query.

        Rows keep their place, since exploration goes on from what they hold.

        Returns:
          (Rollouts with N = B and C = count, the caches, rows decoded over all steps).
        """
        number = self.placement.place_rows(root_branches(queries, count))
        branches, decoding = self.open_queries(params, queries, number, seed_key, step)
        decoding = last(self.decode(params, branches, decoding, sampling, compact=False))
        (query_segment,) = branches.context
        query_segment = query_segment._replace(length=queries.length)
        caches = Caches(query_segment, decoding.own, self.rows_of(branches), count)
        return decoding.rollouts, caches, decoding.row_steps

    def sample(
        self,
        params: Params,
        queries: Queries,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        count: int,
        sampling: Sampling,
    ) -> tuple[Rollouts, Int32[Array, ""]]:
        """Sample `count` answers to every query, and keep no caches.

        Returns:
          (Rollouts with N = B and C = count, rows decoded over all steps).
        """
        number = self.placement.place_rows(root_branches(queries, count))
        branches, decoding = self.open_queries(params, queries, number, seed_key, step)
        decoding = last(self.decode(params, branches, decoding, sampling))
        return decoding.rollouts, decoding.row_steps

    def explore(
        self,
        params: Params,
        queries: Queries,
        caches: Caches,
        states: States,
        *,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        rollouts: int,
        sampling: Sampling,
        keep: bool = False,
        ranks: tuple[int, ...] | None = None,
    ) -> tuple[Rollouts, Int32[Array, ""]]:
        """Sample `rollouts` continuations from every valid state.

        Args:
          params: merged into the model.
          queries, caches: as given to and returned by `first_return`.
          states: of N trajectories, where N divides by the mesh's row parts, and each trajectory is in the
            part of its query (`arrange`).
          seed_key, step: what is drawn is a function of them, the query, the branch and the position.
          rollouts: M.
          sampling: the distribution that tokens are drawn from.
          keep: whether the caches can be used again; otherwise their memory is given back.
          ranks: of the first tokens of the M rollouts of a state, as `Branches.rank`; None: they are drawn.

        Returns:
          (Rollouts with N trajectories and C = J x rollouts branches, state-major, rows decoded over all
          steps).
        """
        branches, decoding = self.open_states(
            params, queries, caches, states, seed_key=seed_key, step=step, rollouts=rollouts, ranks=ranks
        )
        if not keep:  # what the kept trajectories need of them has been taken out
            jax.tree.map(lambda x: x.delete(), (caches.base.key, caches.base.value))
        decoding = last(self.decode(params, branches, decoding, sampling))
        return decoding.rollouts, decoding.row_steps

    @functools.partial(jax.jit, static_argnames=("self",))
    def open_queries(
        self,
        params: Params,
        queries: Queries,
        number: Int32[AnyArray, "B C"],
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
    ) -> tuple[Branches, Decoding]:
        """Prefill the queries, each once, and open branches from them.

        Args:
          params: merged into the model.
          queries: B of them.
          number: the branches' numbers, which their randomness is a function of.
          seed_key, step: as for `explore`.
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

    @functools.partial(jax.jit, static_argnames=("self", "rollouts", "ranks"))
    def open_states(
        self,
        params: Params,
        queries: Queries,
        caches: Caches,
        states: States,
        *,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        rollouts: int,
        ranks: tuple[int, ...] | None = None,
    ) -> tuple[Branches, Decoding]:
        """Open `rollouts` branches from every valid state; the arguments are those of `explore`."""
        model = nnx.merge(self.graph, params)

        def per_branch(x: Shaped[Array, "N J"]) -> Shaped[Array, "N C"]:
            return jnp.repeat(x, rollouts, axis=1)

        # The kept trajectories' rows are taken out once; their branches share them.
        query_length = queries.length[states.query][:, None]
        parts = row_parts(self.placement.mesh)
        query_segment = Segment(
            take_queries(caches.query.key, states, parts),
            take_queries(caches.query.value, states, parts),
            per_branch(jnp.broadcast_to(query_length - 1, states.prefix_length.shape)),
        )
        base_segment = Segment(
            take_trajectories(caches.base.key, caches, states),
            take_trajectories(caches.base.value, caches, states),
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
        limit = per_branch(jnp.where(states.valid, self.max_new - states.prefix_length, 0))
        count = states.prefix_length.shape[1] * rollouts
        if states.rollouts is not None:
            limit = jnp.where(jnp.arange(count)[None] % rollouts < states.rollouts[:, None], limit, 0)
        rank = None
        if ranks is not None:
            rank = jnp.broadcast_to(jnp.tile(jnp.array(ranks, jnp.int32), count // rollouts), limit.shape)
        # Branch numbers continue after the base trajectories', one range per trajectory of the query.
        number = caches.count + states.base[:, None] * count + jnp.arange(count)[None, :]
        branches = Branches(
            token=per_branch(token),
            position=per_branch(query_length - 1 + states.prefix_length),
            context=(query_segment, base_segment),
            limit=limit,
            key=branch_keys(seed_key, step, queries.index[states.query], number),
            stops=self.stops,
            begun=begun,
            rank=rank,
        )
        return branches, self.start(model, branches)

    def start(self, model: Decoder, branches: Branches) -> Decoding:
        """Make the state of branches that have generated nothing, with a row for each."""
        rows, slots = self.rows_of(branches), first_slots(self.max_new)
        return start_branches(model, self.placement, branches, max_new=self.max_new, rows=rows, slots=slots)

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

        Every process takes the same decisions: they follow from which branches run, which all processes know.

        Args:
          params: merged into the model.
          branches, decoding: as opened; `decoding` and what is yielded are used up by going on.
          sampling: the distribution that tokens are drawn from.
          compact: whether rows move together as branches stop.
          every: tokens between two looks at what was generated, 1 before the first; None looks at the end,
            and before each move.

        Yields:
          The state after each leg.
        """
        parts = row_parts(self.placement.mesh)
        shape = (parts, branches.token.shape[0] // parts, branches.token.shape[1])
        slots = decoding.own.key.shape[3] // self.rows_of(branches)
        usual = (
            dataclasses.replace(branches, rank=None),
            dataclasses.replace(sampling, first_temperature=None),
        )
        heats = sampling.first_temperature is not None and len(branches.context) > 1
        special = heats or branches.rank is not None
        legs = schedule(shape, slots, self.max_new, compact, every, first_alone=special)
        leg, drawing = next(legs), (branches, sampling) if special else usual
        while True:
            self.between()
            with warnings.catch_warnings():
                # A cache that grows cannot be what it grew from.
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                started, how = drawing
                decoding, ended = self.advance(params, started, decoding, self.place(leg), sampling=how)
            yield decoding
            running, filled = jax.device_get(ended)
            self.watch(int(running.sum()), running.size, int(filled))
            if filled:  # the first token is drawn
                drawing = usual
            try:
                leg = legs.send((running.reshape(shape), int(filled)))
            except StopIteration:
                return

    def place(self, leg: Leg) -> Leg:
        """Put a leg of the host on the mesh."""
        place, place_rows = self.placement.place, self.placement.place_rows
        return dataclasses.replace(
            leg,
            seats=place_rows(leg.seats),
            origin=place_rows(leg.origin),
            until=place(np.int32(leg.until)),
            leave=place(np.int32(leg.leave)),
        )

    @functools.partial(jax.jit, static_argnames=("self", "sampling"), donate_argnames=("decoding",))
    def advance(
        self, params: Params, branches: Branches, decoding: Decoding, leg: Leg, *, sampling: Sampling
    ) -> tuple[Decoding, tuple[Bool[Array, "N C"], Int32[Array, ""]]]:
        """Move rows together, where the leg says so, and generate until it ends.

        Returns:
          (the state, (which branches run, the slots filled), both of these on every process).
        """
        model = nnx.merge(self.graph, params)
        if leg.origin is not None:
            own = reseat(model, self.placement, decoding.own, leg)
            decoding = dataclasses.replace(decoding, own=own)
        decoding = advance_branches(
            model,
            self.placement,
            branches,
            decoding,
            leg,
            end_tokens=self.end_tokens,
            sampling=sampling,
        )
        return decoding, (self.placement.shard(decoding.running), decoding.own.length)

    def arrange(
        self, kept: Bool[np.ndarray, "B R"]
    ) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Lay kept trajectories out on this engine's mesh: (query, trajectory, real), see `arrange_kept`."""
        return arrange_kept(kept, row_parts(self.placement.mesh))


def last(states: Iterator[Decoding]) -> Decoding:
    """Take the last of an iterator; those before it are dropped as they come."""
    return collections.deque(states, maxlen=1)[0]


def root_branches(queries: Queries, count: int) -> Int32[np.ndarray, "B {count}"]:
    """Number `count` branches from each query alone, on the host."""
    return np.broadcast_to(np.arange(count, dtype=np.int32), (queries.length.shape[0], count))
