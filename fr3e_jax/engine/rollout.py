"""Base trajectories, exploration and plain sampling: the rollouts of a step.

`sample` samples answers to queries: the base trajectories of first return are such. `explore` restarts from
states of the kept ones. Each opens branches in one program and decodes them in legs: the loop over tokens
stays on the device, and returns when a page is full, or so many branches have stopped that the others are
worth moving together.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Int, Int32, Key

from fr3e_jax.engine.branches import Branches, Decoding, advance_branches, start_branches
from fr3e_jax.engine.budget import pages_within
from fr3e_jax.engine.caches import prefill, sequences_of
from fr3e_jax.engine.page_moves import Aside, PageMoves
from fr3e_jax.engine.pages import ON_CPU, PageSizes
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.schedule import Room, Schedule
from fr3e_jax.engine.seats import Leg, arrange_kept, place_leg
from fr3e_jax.engine.starts import Starts, branches_at, root_branches, starts_of, starts_of_queries
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Decoder, Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import Placement, row_parts
from fr3e_jax.types import AnyArray, Queries, Rollouts, States, StopTable

Watch = Callable[[int, int, int], None]
"""Is given how far a decoding is: branches that run, all branches, most tokens that one has drawn."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument under jit
class Engine:
    """Samples rollouts of one model on one mesh.

    max_new: most tokens of a response. end_tokens: a branch stops after drawing one of these. between: called
    before each program of a decoding; it may end the decoding with an exception. watch: called after each.
    stops: recognises texts that end a branch too. sizes: of blocks and pages. cache_bytes: most bytes of each
    device that the KV caches of a decoding take, shared and own; None: what its branches can come to need.
    """

    graph: nnx.GraphDef[Decoder]
    placement: Placement
    max_new: int
    end_tokens: tuple[int, ...]
    between: Callable[[], None] = lambda: None
    watch: Watch = lambda *_: None
    stops: StopTable | None = None
    sizes: PageSizes = ON_CPU
    cache_bytes: int | None = None

    @functools.cached_property
    def page_moves(self) -> PageMoves:
        """What moves pages and rows of them between legs."""
        return PageMoves(self.placement)

    def sample(
        self,
        params: Params,
        queries: Queries,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        count: int,
        sampling: Sampling,
    ) -> tuple[Rollouts, Int32[Array, ""]]:
        """Sample `count` answers to every query.

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
        states: States,
        *,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        rollouts: int,
        sampling: Sampling,
        after: int,
        caches: Segment | None = None,
        ranks: tuple[int, ...] | None = None,
    ) -> tuple[Rollouts, Int32[Array, ""]]:
        """Sample `rollouts` continuations from every valid state.

        Args:
          params: merged into the model.
          queries: that the states' trajectories answer.
          states: of N trajectories, where N divides by the mesh's row parts, and each trajectory is in the
            part of its query (`arrange`).
          seed_key, step: what is drawn is a function of them, the query, the branch and the position.
          rollouts: M.
          sampling: the distribution that tokens are drawn from.
          after: number of base trajectories of a query, behind which the branches' numbers begin.
          caches: as `prefill_trajectories` returns them; None: they are made.
          ranks: of the first tokens of the M rollouts of a state, as `Branches.rank`; None: they are drawn.

        Returns:
          (Rollouts with N trajectories and C = J x rollouts branches, state-major, rows decoded over all
          steps).
        """
        if caches is None:
            caches = self.prefill_trajectories(params, queries, states)
        how = {"seed_key": seed_key, "step": step, "rollouts": rollouts, "after": after, "ranks": ranks}
        branches, decoding = self.open_states(params, queries, caches, states, **how)
        branches = branches.with_context(caches)
        decoding = last(self.decode(params, branches, decoding, sampling))
        return decoding.rollouts, decoding.row_steps

    def go_on(
        self,
        params: Params,
        queries: Queries,
        starts: Starts,
        *,
        seed_key: Key[AnyArray, ""],
        sampling: Sampling,
        may_run: int,
        drawn: int | None = None,
    ) -> tuple[Rollouts, Bool[Array, "N C"], Int32[Array, ""]]:
        """Sample branches from where they start or were left, until few of them run.

        Args:
          params, queries, seed_key, sampling: as for `explore`.
          starts: of N trajectories, as its states.
          may_run: most branches that have not ended at the end.
          drawn: most branches of a part that decode at the same time, and for which there is memory; others
            wait until blocks are free. None: all of them.

        Returns:
          (Rollouts with the tokens that each drew now, which branches have not ended, rows decoded over all
          steps).
        """
        caches = self.prefill_trajectories(params, queries, starts)
        branches, decoding = self.open_starts(params, queries, caches, starts, seed_key, drawn=drawn)
        branches = branches.with_context(caches)
        decoding = last(self.decode(params, branches, decoding, sampling, may_run=may_run, drawn=drawn))
        return decoding.rollouts, decoding.running, decoding.row_steps

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
        caches = prefill(model, self.placement, queries.token, queries.length)
        starts = starts_of_queries(queries, number, step)
        how = {"seed_key": seed_key, "max_new": self.max_new, "stops": self.stops}
        branches = branches_at(starts, queries, caches, self.placement, **how).with_context(caches)
        return branches, self.start(model, branches, queries.token.shape[1])

    @functools.partial(jax.jit, static_argnames=("self",))
    def prefill_trajectories(self, params: Params, queries: Queries, states: States | Starts) -> Segment:
        """Compute the KV caches of N trajectories, each in the part of its query.

        One forward pass over the kept ones costs far less than to keep those of all that were sampled. Starts
        without any branch that is drawn are passed over.

        Returns:
          Keys and values [L, N, K, P + S, D], the query in the first slots and the response behind it.
        """
        model = nnx.merge(self.graph, params)
        token = sequences_of(self.placement, queries, states)
        length = jnp.full(len(token), token.shape[1], jnp.int32)
        if isinstance(states, States):
            return prefill(model, self.placement, token, length)
        length = jnp.where(jnp.any(states.drawn, axis=1), length, 0)
        return prefill(model, self.placement, token, length, some_empty=True)

    @functools.partial(jax.jit, static_argnames=("self", "rollouts", "ranks", "after"))
    def open_states(
        self,
        params: Params,
        queries: Queries,
        caches: Segment,
        states: States,
        *,
        seed_key: Key[AnyArray, ""],
        step: Int[AnyArray, ""] | int,
        rollouts: int,
        after: int,
        ranks: tuple[int, ...] | None = None,
    ) -> tuple[Branches, Decoding]:
        """Open `rollouts` branches from every valid state; the arguments are those of `explore`.

        Their context is without keys and values, since a program would copy what it is given and returns:
        `Branches.with_context` adds them.
        """
        starts = starts_of(states, rollouts, after, step)
        return self.open_starts(params, queries, caches, starts, seed_key, ranks)

    @functools.partial(jax.jit, static_argnames=("self", "ranks", "drawn"))
    def open_starts(
        self,
        params: Params,
        queries: Queries,
        caches: Segment,
        starts: Starts,
        seed_key: Key[AnyArray, ""],
        ranks: tuple[int, ...] | None = None,
        drawn: int | None = None,
    ) -> tuple[Branches, Decoding]:
        """Open branches at starts; the arguments are those of `branches_at`, and `drawn` of `go_on`."""
        how = {"seed_key": seed_key, "max_new": self.max_new, "stops": self.stops, "ranks": ranks}
        branches = branches_at(starts, queries, caches, self.placement, **how)
        return branches, self.start(nnx.merge(self.graph, params), branches, caches.key.shape[3], drawn)

    def start(self, model: Decoder, branches: Branches, slots: int, drawn: int | None = None) -> Decoding:
        """Make the state of branches that have generated nothing; slots, drawn: as for `room_for`."""
        room = self.room_for(model.config, branches.token.shape, slots, model.dtype, drawn)
        return start_branches(
            model, self.placement, branches, max_new=self.max_new, sizes=room.sizes, pages=room.pages
        )

    def room_for(
        self, config: Any, shape: tuple[int, ...], slots: int, dtype: Any, drawn: int | None = None
    ) -> Room:
        """The blocks and pages of a decoding.

        Args:
          config: of the model. shape: N trajectories and C branches of each. slots: of what they share.
          dtype: of keys and values. drawn: as for `go_on`.

        Raises:
          CacheBudgetError: `cache_bytes` do not hold what a block of rows needs.
        """
        n, c = shape[0] // row_parts(self.placement.mesh), shape[1]
        room = Room(self.sizes, n, c, self.max_new, 0, drawn)
        pages = pages_within(self.cache_bytes, config, self.placement, room, slots, dtype)
        return dataclasses.replace(room, pages=pages)

    def decode(
        self,
        params: Params,
        branches: Branches,
        decoding: Decoding,
        sampling: Sampling,
        every: int | None = None,
        may_run: int = 0,
        drawn: int | None = None,
    ) -> Iterator[Decoding]:
        """Generate until every branch has stopped, or few of them run.

        Every process takes the same decisions: they follow from which branches run, which all processes know.

        Args:
          params: merged into the model.
          branches, decoding: as opened; `decoding` and what is yielded are used up by going on.
          sampling: the distribution that tokens are drawn from.
          every: tokens between two looks at what was generated, 1 before the first; None looks where rows
            move.
          may_run, drawn: as for `go_on`.

        Yields:
          The state after each leg.
        """
        n, c = branches.token.shape
        parts = row_parts(self.placement.mesh)
        room = Room(self.sizes, n // parts, c, self.max_new, decoding.pages.key.shape[1], drawn)
        usual = (
            dataclasses.replace(branches, rank=None, root=None),
            dataclasses.replace(sampling, first_temperature=None),
        )
        special = (sampling.first_temperature is not None and branches.root is not None) or (
            branches.rank is not None
        )
        running = gather(decoding.running).reshape(parts, -1)
        schedule = Schedule(room, running.astype(np.int32), every, first_alone=special, may_run=may_run)
        aside = Aside()
        if schedule.done:
            yield decoding
            return
        while not schedule.done:
            turn = schedule.next()
            self.between()
            pages = self.page_moves.before(turn, decoding.pages, aside)
            decoding = dataclasses.replace(decoding, pages=pages)
            started, how = (branches, sampling) if special and turn.first else usual
            leg = place_leg(self.placement, turn.leg)
            decoding, ended = self.advance(params, started, decoding, leg, sampling=how)
            yield decoding
            running, steps, longest = jax.device_get(ended)
            self.watch(int(running.sum()), running.size, int(longest))
            schedule.end(running.reshape(parts, -1), int(steps))

    @functools.partial(jax.jit, static_argnames=("self", "sampling"), donate_argnames=("decoding",))
    def advance(
        self, params: Params, branches: Branches, decoding: Decoding, leg: Leg, *, sampling: Sampling
    ) -> tuple[Decoding, tuple[Bool[Array, "N C"], Int32[Array, ""], Int32[Array, ""]]]:
        """Generate until a leg ends.

        Returns:
          (the state, (which branches run, tokens of the leg, most tokens that one has drawn), which every
          process has).
        """
        decoding, steps = advance_branches(
            nnx.merge(self.graph, params),
            self.placement,
            self.sizes.fitted(branches.token.size // row_parts(self.placement.mesh)),
            branches,
            decoding,
            leg,
            end_tokens=self.end_tokens,
            sampling=sampling,
        )
        longest = jnp.max(decoding.rollouts.length)
        return decoding, (self.placement.shard(decoding.running), steps, longest)

    def arrange(
        self, kept: Bool[np.ndarray, "B R"]
    ) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Lay kept trajectories out on this engine's mesh: (query, trajectory, real), see `arrange_kept`."""
        return arrange_kept(kept, row_parts(self.placement.mesh))


def last(states: Iterator[Decoding]) -> Decoding:
    """Take the last of an iterator; those before it are dropped as they come."""
    return collections.deque(states, maxlen=1)[0]
