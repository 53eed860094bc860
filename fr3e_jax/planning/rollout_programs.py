"""The programs of first return and exploration, compiled for a slice."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.config import ExploreConfig
from fr3e_jax.engine.rollout import Engine, root_branches
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.seats import map_leg
from fr3e_jax.models.attention import Segment
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
    setup, always = compiler.setup, compiler.always
    config, first = setup.config, work.first_return
    rollout, params = config.rollout, setup.params(setup.dtype, sampling=True)
    numbers = setup.rows(jnp.int32, setup.queries)
    queries = Queries(setup.rows(jnp.int32, setup.queries, rollout.max_prompt), numbers, numbers)
    weights = {"sampling copy": bytes_on_chip(params)}
    if compiler.wants("first return"):
        count = first.lengths.shape[2]
        branch_numbers = jax.eval_shape(lambda queries: root_branches(queries, count), queries)
        engine = setup.engine_with(first.room, first.slots)
        prefill, opened = compiler(
            "first return",
            "prefill",
            lambda: Engine.open_queries.lower(engine, params, queries, branch_numbers, seed_of(), 0),
            held=always,
            own=weights,
        )
        yield prefill
        if opened is None:
            return
        if compiler.wants("first return", "decode"):
            yield compile_decode(compiler, "first return", opened, first)
    if work.explore is None or not (compiler.wants("positions") or compiler.wants("explore")):
        return

    states = abstract_states(compiler, work, config.explore.positions + 1)
    prefill, caches = compiler(
        prefill_phase(config.explore, work),
        "prefill trajectories",
        lambda: Engine.prefill_trajectories.lower(setup.engine, params, queries, states),
        held=always,
        own=weights,
    )
    yield prefill
    if caches is None:
        return
    restarts = RestartCompiler(compiler, params, queries, caches)
    if pass_needs(config.explore) and compiler.wants("positions"):
        yield compile_second_pass(compiler, params, queries, caches, states)
    if work.pilots is not None:
        candidates = abstract_states(compiler, work, pilot_states(config.explore))
        yield from restarts.compile(
            "positions", "open pilots", work.pilots, candidates, pilot_rollouts(config.explore)
        )
    yield from restarts.compile("explore", "open states", work.explore, states, config.explore.rollouts)


def seed_of() -> Any:
    """A key, without its array."""
    return jax.eval_shape(lambda: jax.random.key(0))


def prefill_phase(explore: ExploreConfig, work: Workload) -> str:
    """The phase where trajectories are prefilled: the first that needs their caches."""
    return "positions" if work.pilots is not None or pass_needs(explore) else "explore"


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


@dataclasses.dataclass(frozen=True)
class RestartCompiler:
    """What is decoded from states of the base trajectories.

    params, queries, caches: abstract, as `Engine.open_states` takes them.
    """

    compiler: StageCompiler
    params: Any
    queries: Queries
    caches: Segment

    def compile(
        self, phase: str, opening: str, decode: Decode, states: States, rollouts: int
    ) -> Iterator[Stage]:
        """Compile the opening of branches from states, and their decoding.

        Args:
          phase, opening: names of the phase, and of the program that opens the branches.
          decode: the legs.
          states: abstract.
          rollouts: of a state.
        """
        compiler = self.compiler
        if not compiler.wants(phase):
            return
        setup = compiler.setup
        engine = setup.engine_with(decode.room, decode.slots)
        lower = functools.partial(
            Engine.open_states.lower, engine, self.params, self.queries, self.caches, states
        )
        after = setup.config.rollout.base_trajectories
        shared = setup.context_bytes(decode.room.n, decode.slots)
        stage, opened = compiler(
            phase,
            opening,
            lambda: lower(seed_key=seed_of(), step=0, rollouts=rollouts, after=after),
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
