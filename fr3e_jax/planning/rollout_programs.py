"""The programs of first return and exploration, compiled for a slice."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.config import ExploreConfig
from fr3e_jax.engine.caches import prefilled_together
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.seats import map_leg
from fr3e_jax.engine.starts import Starts, root_branches
from fr3e_jax.models.attention import Segment
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.planning.decodes import Decode
from fr3e_jax.planning.position_programs import compile_second_pass, pass_needs
from fr3e_jax.planning.setup import abstract, bytes_on_chip
from fr3e_jax.planning.stages import Stage, StageCompiler
from fr3e_jax.planning.workload import Workload
from fr3e_jax.run.queries import pilot_rollouts, pilot_states
from fr3e_jax.types import Queries, States


def compile_rollouts(compiler: StageCompiler, work: Workload) -> Iterator[Stage]:
    """Compile the programs of first return and exploration.

    Left out are programs that are not wanted, unless one that is wanted needs their results, and those that
    need the results of one that is too large.
    """
    setup, explore = compiler.setup, compiler.setup.config.explore
    params = setup.params(setup.dtype, sampling=True)
    queries = abstract_queries(compiler, setup.queries)
    if work.first_return is not None and compiler.wants("first return"):
        first = work.first_return
        count = first.lengths.shape[2]
        branch_numbers = jax.eval_shape(lambda queries: root_branches(queries, count), queries)
        engine = setup.engine_with(first.room, first.slots)
        prefill, opened = compiler(
            "first return",
            "prefill",
            lambda: Engine.open_queries.lower(engine, params, queries, branch_numbers, seed_of(), 0),
            held=compiler.always,
            own={"sampling copy": bytes_on_chip(params)},
        )
        yield prefill
        if opened is None:
            return
        if compiler.wants("first return", "decode"):
            yield compile_decode(compiler, "first return", opened, first)

    prefilled, restarts = prefilled_trajectories(explore, work), None
    # Exploration goes on with the caches, unless it prefills trajectories of its own.
    needed = compiler.wants("positions") or ("explore" not in prefilled and compiler.wants("explore"))
    if "positions" in prefilled and needed:
        states = abstract_states(compiler, work, explore.positions + 1)
        prefill, restarts = compile_prefill(compiler, "positions", params, queries, states)
        yield prefill
        if restarts is None:
            return
        if pass_needs(explore) and compiler.wants("positions"):
            yield compile_second_pass(compiler, params, queries, restarts.caches, states)
        if work.pilots is not None:
            candidates = abstract_states(compiler, work, pilot_states(explore))
            lower = restarts.from_states(candidates, pilot_rollouts(explore))
            yield from restarts.compile("positions", "open pilots", work.pilots, lower)
    if work.explore is None or not compiler.wants("explore"):
        return
    starts: States | Starts = abstract_states(compiler, work, explore.positions + 1)
    if work.first_return is None:
        starts = abstract_starts(compiler, work.explore)
        queries = abstract_queries(compiler, starts.query.shape[0])
    if "explore" in prefilled:
        prefill, restarts = compile_prefill(compiler, "explore", params, queries, starts)
        yield prefill
    if restarts is None:
        return
    if isinstance(starts, States):
        lower = restarts.from_states(starts, explore.rollouts)
    else:
        lower = restarts.from_starts(starts, work.explore.room.drawn)
    yield from restarts.compile("explore", work.opening, work.explore, lower)


def seed_of() -> Any:
    """A key, without its array."""
    return jax.eval_shape(lambda: jax.random.key(0))


def prefilled_trajectories(explore: ExploreConfig, work: Workload) -> dict[str, int]:
    """The phases where trajectories are prefilled -> how many of each part their caches hold.

    Kept trajectories are in the first phase that needs their caches. A decoding that does not wait for its
    last rollouts prefills all that it decodes.
    """
    found = dict[str, int]()
    if work.pilots is not None or pass_needs(explore):
        found["positions"] = work.trajectories
    if work.explore is not None and (not found or work.first_return is None):
        found["explore"] = work.explore.room.n
    return found


def prefilled_share(decode: Decode) -> float:
    """Share of a decoding's trajectories that run through the model in their prefill.

    Those without branches are passed over, where all that run together are such.
    """
    together = prefilled_together(decode.room.n, decode.slots)
    return next_multiple(decode.trajectories, together) / decode.room.n


def abstract_queries(compiler: StageCompiler, count: int) -> Queries:
    """`count` queries, without arrays."""
    setup = compiler.setup
    numbers = setup.rows(jnp.int32, count)
    return Queries(setup.rows(jnp.int32, count, setup.config.rollout.max_prompt), numbers, numbers)


def abstract_states(compiler: StageCompiler, work: Workload, count: int) -> States:
    """`count` states of each of the kept trajectories, without arrays."""
    setup = compiler.setup
    n, limit = work.trajectories * setup.parts, setup.config.rollout.max_response
    return States(
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n, limit),
        setup.rows(jnp.int32, n, count),
        setup.rows(jnp.bool_, n, count),
    )


def abstract_starts(compiler: StageCompiler, decode: Decode) -> Starts:
    """The starts of all branches of a decoding, without arrays."""
    setup, (_, n, c) = compiler.setup, decode.lengths.shape
    n *= setup.parts
    numbers, flags = setup.rows(jnp.int32, n, c), setup.rows(jnp.bool_, n, c)
    return Starts(
        query=setup.rows(jnp.int32, n),
        response=setup.rows(jnp.int32, n, setup.config.rollout.max_response),
        prefix_length=numbers,
        drawn=flags,
        number=numbers,
        step=setup.rows(jnp.int32, n),
        at_position=flags,
    )


def compile_prefill(
    compiler: StageCompiler, phase: str, params: Any, queries: Queries, starts: States | Starts
) -> "tuple[Stage, RestartCompiler | None]":
    """Compile the prefill of trajectories, which branches then start from; None: it is too large."""
    stage, caches = compiler(
        phase,
        "prefill trajectories",
        lambda: Engine.prefill_trajectories.lower(compiler.setup.engine, params, queries, starts),
        held=compiler.always,
        own={"sampling copy": bytes_on_chip(params)},
    )
    return stage, None if caches is None else RestartCompiler(compiler, params, queries, caches)


Lowering = Callable[[Engine], Any]
"""Lowers a program of an engine."""


@dataclasses.dataclass(frozen=True)
class RestartCompiler:
    """What is decoded behind trajectories that are prefilled.

    params, queries, caches: abstract, as `Engine.open_states` and `Engine.open_starts` take them.
    """

    compiler: StageCompiler
    params: Any
    queries: Queries
    caches: Segment

    def from_states(self, states: States, rollouts: int) -> Lowering:
        """Lower the opening of so many branches from each of the states."""
        after = self.compiler.setup.config.rollout.base_trajectories
        given = self.params, self.queries, self.caches, states
        how = {"step": 0, "rollouts": rollouts, "after": after}
        return lambda engine: Engine.open_states.lower(engine, *given, seed_key=seed_of(), **how)

    def from_starts(self, starts: Starts, drawn: int | None) -> Lowering:
        """Lower the opening of the branches of starts; drawn: most of a part that there are."""
        given = self.params, self.queries, self.caches, starts
        return lambda engine: Engine.open_starts.lower(engine, *given, seed_of(), drawn=drawn)

    def compile(self, phase: str, opening: str, decode: Decode, lower: Lowering) -> Iterator[Stage]:
        """Compile the opening of branches, and their decoding.

        Args:
          phase, opening: names of the phase, and of the program that opens the branches.
          decode: the legs.
          lower: lowers that program.
        """
        compiler = self.compiler
        if not compiler.wants(phase):
            return
        setup = compiler.setup
        engine = setup.engine_with(decode.room, decode.slots)
        shared = setup.context_bytes(decode.room.n, decode.slots)
        stage, opened = compiler(
            phase,
            opening,
            lambda: lower(engine),
            held=compiler.always,
            own={"sampling copy": bytes_on_chip(self.params), "shared caches": shared},
        )
        yield stage
        if opened is not None and compiler.wants(phase, "decode"):
            branches, decoding = opened
            yield compile_decode(compiler, phase, (branches.with_context(self.caches), decoding), decode)


def compile_decode(compiler: StageCompiler, phase: str, opened: Any, decode: Decode) -> Stage:
    """Compile the decoding program for the spans that most rows run in.

    Args:
      phase: of the step.
      opened: abstract (branches, decoding) as the engine opens them.
      decode: the legs.
    """
    setup, (branches, decoding) = compiler.setup, opened
    rollout, params = setup.config.rollout, setup.params(setup.dtype, sampling=True)
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p)
    work, whole = decode.typical, setup.placements[1].sharding()
    leg = map_leg(
        decode.examples[work.span],
        lambda x: setup.rows(x.dtype, *x.shape),
        lambda x: abstract(x.shape, x.dtype, whole),
    )
    branches = dataclasses.replace(branches, rank=None, root=None)
    lower = functools.partial(
        Engine.advance.lower, setup.engine, params, branches, decoding, leg, sampling=sampling
    )
    sizes = {
        "sampling copy": bytes_on_chip(params),
        "shared caches": setup.context_bytes(decode.room.n, decode.slots),
        "branch caches": decode.room.pages * setup.page_bytes(decode.room),
        "rollouts": bytes_on_chip(decoding.rollouts),
    }
    return compiler(phase, "decode", lower, held=compiler.always, own=sizes, leg=work)[0]
