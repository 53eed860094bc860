"""The programs of first return and exploration, compiled for a slice."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.engine.caches import Caches
from fr3e_jax.engine.rollout import Engine, root_branches
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.seats import Leg
from fr3e_jax.planning.position_programs import compile_second_pass, pass_needs
from fr3e_jax.planning.setup import abstract, bytes_on_chip
from fr3e_jax.planning.stages import Stage, StageCompiler
from fr3e_jax.planning.workload import Decode, Workload, pilot_rollouts, pilot_states
from fr3e_jax.types import Queries, States


def compile_rollouts(compiler: StageCompiler, work: Workload) -> Iterator[Stage]:
    """Compile the programs of first return and exploration.

    Left out are programs that are not wanted, unless one that is wanted needs their results, and those that
    need the results of one that is too large.
    """
    if not any(compiler.wants(phase) for phase in ("first return", "positions", "explore")):
        return
    setup, always = compiler.setup, compiler.always
    config, engine = setup.config, setup.engine
    rollout, params = config.rollout, setup.params(setup.dtype, sampling=True)
    weights = bytes_on_chip(params)
    seed = jax.eval_shape(lambda: jax.random.key(0))
    numbers = setup.rows(jnp.int32, setup.queries)
    queries = Queries(setup.rows(jnp.int32, setup.queries, rollout.max_prompt), numbers, numbers)
    count = work.first_return.lengths.shape[2]
    branch_numbers = jax.eval_shape(lambda queries: root_branches(queries, count), queries)

    prefill, opened = compiler(
        "first return",
        "prefill",
        lambda: Engine.open_queries.lower(engine, params, queries, branch_numbers, seed, 0),
        held=always,
        own={"sampling copy": weights},
    )
    yield prefill
    if opened is None:
        return
    branches, decoding = opened
    leg = work.first_return.largest
    if compiler.wants("first return", "decode"):
        yield compile_decode(compiler, ("first return", "decode"), opened, leg, held=always)
    if work.explore is None or not (compiler.wants("positions") or compiler.wants("explore")):
        return

    own = decoding.own.key
    rows = own.shape[3] // work.first_return.legs[0].slots
    last = work.first_return.legs[-1]
    cache = abstract((*own.shape[:3], last.size, own.shape[4]), own.dtype, own.sharding)
    (query_segment,) = branches.context
    caches = Caches(
        query_segment._replace(length=numbers), decoding.own._replace(key=cache, value=cache), rows, count
    )
    restarts = RestartCompiler(compiler, params, queries, caches)
    states = restarts.states(work.trajectories, config.explore.positions + 1)
    if pass_needs(config.explore) and compiler.wants("positions"):
        yield compile_second_pass(compiler, params, queries, caches, states)
    if work.pilots is not None:
        candidates = restarts.states(work.trajectories, pilot_states(config.explore))
        count = pilot_rollouts(config.explore)
        yield from restarts.compile("positions", "open pilots", work.pilots, candidates, count, keep=True)
    yield from restarts.compile("explore", "open states", work.explore, states, config.explore.rollouts)


@dataclasses.dataclass(frozen=True)
class RestartCompiler:
    """What is decoded from states of the base trajectories.

    params, queries, caches: abstract, as the engine has them after first return.
    """

    compiler: StageCompiler
    params: Any
    queries: Queries
    caches: Caches

    def states(self, trajectories: int, count: int) -> States:
        """`count` states of each of the kept trajectories of a part, without arrays."""
        setup = self.compiler.setup
        n, limit = trajectories * setup.parts, setup.config.rollout.max_response
        return States(
            setup.rows(jnp.int32, n),
            setup.rows(jnp.int32, n),
            setup.rows(jnp.int32, n, limit),
            setup.rows(jnp.int32, n, count),
            setup.rows(jnp.bool_, n, count),
        )

    def compile(
        self, phase: str, opening: str, decode: Decode, states: States, rollouts: int, keep: bool = False
    ) -> Iterator[Stage]:
        """Compile the opening of branches from states, and their decoding.

        Args:
          phase, opening: names of the phase, and of the program that opens the branches.
          decode: the legs.
          states: abstract.
          rollouts: of a state.
          keep: whether the caches of the base trajectories stay.
        """
        compiler, caches = self.compiler, self.caches
        if not compiler.wants(phase):
            return
        always, engine = compiler.always, compiler.setup.engine
        seed = jax.eval_shape(lambda: jax.random.key(0))
        stage, opened = compiler(
            phase,
            opening,
            lambda: Engine.open_states.lower(
                engine, self.params, self.queries, caches, states, seed_key=seed, step=0, rollouts=rollouts
            ),
            held=always,
            own={"sampling copy": bytes_on_chip(self.params), "shared caches": bytes_on_chip(caches)},
        )
        yield stage
        if opened is None:
            return
        held = {**always, "queries' caches": bytes_on_chip(caches.query)}
        if keep:
            held["base caches"] = bytes_on_chip(caches.base)
        for leg in legs_to_compile(decode):
            names = (phase, decode_name(leg))
            if compiler.wants(*names):
                yield compile_decode(compiler, names, opened, leg, held=held)


def legs_to_compile(decode: Decode) -> list[Leg]:
    """The legs of a decoding whose programs stand for all: the first, and the largest or the second."""
    legs = [decode.legs[0]]
    if decode.largest.moves:
        legs.append(decode.largest)
    elif len(decode.legs) > 1:
        legs.append(decode.legs[1])
    return legs


def decode_name(leg: Leg) -> str:
    """The name of the program of a leg of exploration in reports."""
    return f"decode {leg.rows} x {leg.slots}" + (" after a move" if leg.moves else "")


def compile_decode(
    compiler: StageCompiler, names: tuple[str, str], opened: Any, leg: Leg, held: Mapping[str, int]
) -> Stage:
    """Compile a call of the decoding program.

    Args:
      names: of the phase and of the program.
      opened: abstract (branches, decoding) as the engine opens them.
      leg: rows and slots of the call.
      held: as in `Stage`.
    """
    setup, (branches, decoding) = compiler.setup, opened
    rollout, params = setup.config.rollout, setup.params(setup.dtype, sampling=True)
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p)
    own = decoding.own
    shape = (*own.key.shape[:3], leg.size_before, own.key.shape[4])
    cache = abstract(shape, own.key.dtype, own.key.sharding)
    before = dataclasses.replace(decoding, own=own._replace(key=cache, value=cache))
    seats, origin = jax.tree.map(lambda x: setup.rows(jnp.int32, *x.shape), (leg.seats, leg.origin))
    number = abstract((), jnp.int32)
    placed = dataclasses.replace(leg, seats=seats, origin=origin, until=number, leave=number)
    lower = functools.partial(
        Engine.advance.lower, setup.engine, params, branches, before, placed, sampling=sampling
    )
    sizes = {
        "sampling copy": bytes_on_chip(params),
        "shared caches": bytes_on_chip(branches.context),
        "branch caches": bytes_on_chip((cache, cache)),
        "rollouts": bytes_on_chip(decoding.rollouts),
    }
    return compiler(*names, lower, held=held, own=sizes, leg=leg)[0]
