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
from fr3e_jax.planning.workload import Workload
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
    numbers = setup.rows(jnp.int32, rollout.queries)
    queries = Queries(setup.rows(jnp.int32, rollout.queries, rollout.max_prompt), numbers, numbers)
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
    n, j = work.trajectories * setup.parts, config.explore.positions + 1
    states = States(
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n, rollout.max_response),
        setup.rows(jnp.int32, n, j),
        setup.rows(jnp.bool_, n, j),
    )
    if pass_needs(config.explore) and compiler.wants("positions"):
        yield compile_second_pass(compiler, params, queries, caches, states)
    if not compiler.wants("explore"):
        return
    opening, opened = compiler(
        "explore",
        "open states",
        lambda: Engine.open_states.lower(
            engine, params, queries, caches, states, seed_key=seed, step=0, rollouts=config.explore.rollouts
        ),
        held=always,
        own={"sampling copy": weights, "shared caches": bytes_on_chip(caches)},
    )
    yield opening
    if opened is None:
        return
    held = {**always, "queries' caches": bytes_on_chip(caches.query)}
    for leg in legs_to_compile(work):
        names = ("explore", decode_name(leg))
        if compiler.wants(*names):
            yield compile_decode(compiler, names, opened, leg, held=held)


def legs_to_compile(work: Workload) -> list[Leg]:
    """The legs of exploration whose programs stand for all: the first, and the largest or the second."""
    assert work.explore is not None
    legs = [work.explore.legs[0]]
    if work.explore.largest.moves:
        legs.append(work.explore.largest)
    elif len(work.explore.legs) > 1:
        legs.append(work.explore.legs[1])
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
