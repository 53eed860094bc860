"""The memory of KV caches: no program copies them, and a round stays within what it is given."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import ENDS, GRAPH, MAX_PROMPT, PARAMS, POLICY, SEED_KEY, STEP, queries
from support import TINY, changed, placed, placement

from fr3e_jax.config import Config, ConfigError
from fr3e_jax.engine.budget import CacheBudgetError, context_bytes, least_bytes, page_bytes
from fr3e_jax.engine.laid_out import lay_out
from fr3e_jax.engine.page_moves import PageMoves
from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.schedule import Schedule
from fr3e_jax.engine.seats import place_leg
from fr3e_jax.engine.starts import root_branches
from fr3e_jax.engine.unfinished import QueryRoom, begin
from fr3e_jax.parallel.memory import share_of_host
from fr3e_jax.parallel.mesh import SAMPLING_TABLE, row_parts
from fr3e_jax.planning import cache_budget
from fr3e_jax.planning.cache_budget import cache_bytes_here
from fr3e_jax.planning.hlo import Program
from fr3e_jax.run.queries import fitting_sizes, least_cache, round_sizes
from fr3e_jax.types import States

LONG = 256  # tokens of an answer, beside which a query is short
COUNT = 16
SIZES = PageSizes(rows=16, slots=32, spans=(1, 2), context=64, fixed=32)
MESHES = [(1, 1, 1), (2, 1, 2)]


@functools.cache
def engine(mesh, end_tokens=ENDS):
    return Engine(GRAPH, placement(*mesh, SAMPLING_TABLE), LONG, end_tokens, sizes=SIZES)


@functools.cache
def decoding_programs(mesh):
    """(Compiled program, elements of the pages' keys on a device) by name."""
    e = engine(mesh)
    parts, place = row_parts(e.placement.mesh), e.placement
    params, q = placed(PARAMS, TINY, mesh), place.place_rows(queries())
    branches, decoding = e.open_queries(params, q, root_branches(queries(), COUNT), SEED_KEY, STEP)
    n, c = branches.token.shape
    room = e.room_for(TINY, (n, c), MAX_PROMPT, np.float32)
    turn = Schedule(room, np.ones((parts, n * c // parts), np.int32)).next()
    leg, number, pages = place_leg(place, turn.leg), place.place(np.int32(0)), decoding.pages
    moves, copies = e.page_moves, place.place_rows(np.zeros((parts, 8, 4), np.int32))
    one = moves.take_page(pages, number)
    lowered = {
        "advance": Engine.advance.lower(e, params, branches, decoding, leg, sampling=POLICY),
        "copy": PageMoves.copy.lower(moves, pages, copies, number),
        "put_page": PageMoves.put_page.lower(moves, pages, one, number),
    }
    elements = pages.key.addressable_shards[0].data.size
    return {name: (program.compile(), elements) for name, program in lowered.items()}


def in_loops(program):
    """The computations that loops of a program run."""
    found = []
    for instructions in program.computations.values():
        for instruction in instructions.values():
            if instruction.operation == "while":
                found += re.findall(r"(?:body|condition)=%([\w.\-]+)", instruction.line)
    for name in found:  # grows while it is read
        for instruction in program.computations[name].values():
            found += [called for called in instruction.called if called not in found]
    return set(found)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["advance", "copy", "put_page"])
def test_pages_are_updated_in_place(name, mesh):
    """In the compiled program nothing of their size is copied, and what else it needs is small."""
    compiled, elements = decoding_programs(mesh)[name]
    program = Program(compiled.as_text())
    assert program.moves(elements) == []
    stores = [
        computation
        for computation, instructions in program.computations.items()
        for x in instructions.values()
        if x.operation == "dynamic-update-slice" and any(a.elements == elements for a in x.arrays)
    ]
    assert len(stores) == 2  # keys and values
    assert name == "put_page" or set(stores) <= in_loops(program)
    memory = compiled.memory_analysis()
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new < 0.1 * 2 * 4 * elements


def test_a_cache_that_is_copied_is_seen():
    """By the test above: without donation an update copies."""
    x = jnp.zeros((64, 32))
    update = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x.at[i].set(1.0) + x[::-1], x))
    compiled = update.lower(x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes >= x.nbytes


# --- a round within its budget


def cache_bytes_alive():
    """Bytes on the first device of all arrays that are alive and have the axes of KV caches."""
    sizes = {}
    for array in jax.live_arrays():
        if array.ndim in (5, 7) and not array.is_deleted() and array.sharding.memory_kind == "device":
            for shard in array.addressable_shards:
                if shard.device == jax.devices()[0]:
                    sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(sizes.values())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_caches_of_a_round_stay_within_what_they_are_given(mesh):
    """All that are alive before each program and after it, while blocks wait for memory."""
    seen, before = [], cache_bytes_alive()

    def note(*_):
        seen.append(cache_bytes_alive() - before)

    parts = row_parts(placement(*mesh, SAMPLING_TABLE).mesh)
    e = dataclasses.replace(engine(mesh, ()), max_new=64, between=note, watch=note)
    params, q = placed(PARAMS, TINY, mesh), e.placement.place_rows(queries())
    room = e.room_for(TINY, (4, 3 * 16), MAX_PROMPT + 64, np.float32)
    least = least_bytes(TINY, e.placement, room, MAX_PROMPT + 64, np.float32)
    given = least + page_bytes(TINY, e.placement, room, np.float32) // 2  # no page more
    e = dataclasses.replace(e, cache_bytes=given)
    base, _ = e.sample(params, q, SEED_KEY, STEP, 32, POLICY)
    assert 0 < max(seen) <= given
    sampling, base = max(seen), jax.device_get(base)
    assert (base.length == 64).all()
    query, trajectory, real = e.arrange(np.eye(4, 32, dtype=bool))
    assert real.all() and len(query) == 4
    prefix = np.tile(np.array([[0, 5, 9]], np.int32), (4, 1))
    states = States(query, trajectory, base.token[query, trajectory], prefix, prefix >= 0)
    states, seen[:] = e.placement.place_rows(states), []
    partial, _ = e.explore(
        params, q, states, seed_key=SEED_KEY, step=STEP, rollouts=16, sampling=POLICY, after=32
    )
    assert (np.asarray(partial.length)[:, :16] == 64).all()
    # Exactly what was promised: the context, and the least pages, beside which one has room to move.
    one = page_bytes(TINY, e.placement, room, np.float32)
    assert set(seen) == {least - one} and sampling <= given
    # And of a decoding that does not wait, of base trajectories beside nothing else.
    laid = lay_out(begin(queries(), STEP, QueryRoom(32, 1, 3, 16, 64)), 32, 48, [4 // parts], parts)
    seen[:] = []
    late, running, _ = e.go_on(
        params,
        *e.placement.place_rows((laid.queries, laid.starts)),
        seed_key=SEED_KEY,
        sampling=POLICY,
        may_run=20,
        drawn=4 // parts * 32,
    )
    assert set(seen) == {least - one} and np.asarray(running).sum() <= 20
    assert np.asarray(late.length).sum() > 0.5 * base.length.sum()
    context = context_bytes(TINY, e.placement, room, MAX_PROMPT + 64, np.float32)
    shape = 2 * 4 * TINY.num_hidden_layers * (4 // parts) * TINY.num_key_value_heads * (MAX_PROMPT + 64)
    assert context == shape * TINY.head_dim // (mesh[2] if TINY.num_key_value_heads % mesh[2] == 0 else 1)


def test_less_than_one_block_needs_is_refused_with_what_to_change():
    e = engine((1, 1, 1))
    room = e.room_for(TINY, (4, COUNT), MAX_PROMPT, np.float32)
    least = least_bytes(TINY, e.placement, room, MAX_PROMPT, np.float32)
    q = e.placement.place_rows(queries())
    short = dataclasses.replace(e, cache_bytes=least - 1)
    with pytest.raises(CacheBudgetError, match=r"raise --rollout\.cache_gb, or lower --rollout\.queries, "):
        short.sample(PARAMS, q, SEED_KEY, STEP, COUNT, POLICY)
    enough = dataclasses.replace(e, cache_bytes=least)
    assert enough.room_for(TINY, (4, COUNT), MAX_PROMPT, np.float32).pages == room.most < room.useful


def test_pages_are_as_many_as_fit_and_no_more_than_are_useful():
    e = engine((2, 1, 2))
    room = e.room_for(TINY, (4, COUNT), MAX_PROMPT, np.float32)
    least = least_bytes(TINY, e.placement, room, MAX_PROMPT, np.float32)
    # By hand: keys and values of two layers or more, of one of two heads on each device, in float32.
    one = 2 * TINY.num_hidden_layers * SIZES.rows * SIZES.slots * TINY.head_dim * 4
    one *= TINY.num_key_value_heads // 2
    assert page_bytes(TINY, e.placement, room, np.float32) == one
    for more, pages in [(0, 0), (one - 1, 0), (one, 1), (3 * one + 5, 3), (10**9, 10**9)]:
        some = dataclasses.replace(e, cache_bytes=least + more)
        found = some.room_for(TINY, (4, COUNT), MAX_PROMPT, np.float32).pages
        assert found == min(room.most + pages, room.useful)


# --- rounds of a run


def run_of(cache_bytes, **settings):
    usual = {"queries": "auto", "max_queries": 64, "max_response": LONG}
    settings = {"evaluate__every": 0, **{f"rollout__{name}": x for name, x in usual.items()}, **settings}
    return changed(Config(), **settings), dataclasses.replace(engine((2, 1, 2)), cache_bytes=cache_bytes)


def test_rounds_are_no_larger_than_their_caches_allow():
    config, e = run_of(None)
    sizes = round_sizes(config.rollout, 2)
    assert fitting_sizes(config, e, TINY) == sizes and len(sizes) > 4
    needed = [least_cache(config, e, TINY, n) for n in sizes]
    assert needed == sorted(needed)
    for most, allowed in [(0, 0), (2, 2), (2, 2)]:
        _, some = run_of(needed[most])
        assert fitting_sizes(config, some, TINY) == tuple(
            n for n, bytes_ in zip(sizes, needed, strict=True) if bytes_ <= needed[allowed]
        )


@pytest.mark.parametrize("keep, kept", [("first_of_each", 2), ("all", 5)])
def test_a_round_of_the_size_that_is_allowed_does_decode(keep, kept):
    """As many queries as are allowed have room in both decodings; one size more has not."""
    config, e = run_of(None, explore__keep=keep, rollout__base_trajectories=5)
    sizes = round_sizes(config.rollout, 2)
    prompt, slots = config.rollout.max_prompt, config.rollout.max_prompt + LONG
    dtype = config.model.compute_dtype
    for at, n in enumerate(sizes[:-1]):
        given = least_cache(config, e, TINY, n)
        some = dataclasses.replace(e, cache_bytes=given)
        largest = fitting_sizes(config, some, TINY)[-1]
        assert largest >= n
        explored = 2 * 2 ** int(np.ceil(np.log2(largest // 2 * kept)))
        some.room_for(TINY, (largest, 5), prompt, dtype)
        some.room_for(TINY, (explored, 3), slots, dtype)
        if (beyond := sizes[sizes.index(largest) + 1 :]) and at < 3:
            explored = 2 * 2 ** int(np.ceil(np.log2(beyond[0] // 2 * kept)))
            with pytest.raises(CacheBudgetError):
                some.room_for(TINY, (explored, 3), slots, dtype)


def test_evaluations_and_pilots_have_to_fit_too():
    """An evaluation decodes rows of its own, and pilots may be more branches than a round has."""
    plain, e = run_of(None)
    evaluated, _ = run_of(None, evaluate__every=1, evaluate__rows=512)
    piloted, _ = run_of(None, explore__rule="mutual_information", explore__positions=1, explore__rollouts=2)
    smallest = round_sizes(plain.rollout, 2)[0]
    least = least_cache(plain, e, TINY, smallest)
    rows = e.room_for(TINY, (512, 1), plain.rollout.max_prompt, np.float32)
    alone = least_bytes(TINY, e.placement, rows, plain.rollout.max_prompt, np.float32)
    assert least_cache(evaluated, e, TINY, smallest) == alone > least
    one = dataclasses.replace(e, sizes=dataclasses.replace(SIZES, rows=64))
    without = changed(piloted, explore__rule="entropy")
    assert least_cache(piloted, one, TINY, smallest) > least_cache(without, one, TINY, smallest)
    with pytest.raises(ConfigError, match=r"--evaluate\.rows"):
        fitting_sizes(evaluated, dataclasses.replace(e, cache_bytes=least), TINY)


class Told:
    """Processes that all say what the first does, on devices of some kind."""

    def __init__(self, mesh):
        self.mesh = mesh

    def of_first(self, number, where):
        assert 0 <= number < 2**31
        return number


def test_the_memory_of_caches_is_what_is_given_or_a_share_of_the_machine():
    e = engine((1, 1, 1))
    hosts, config = Told(e.placement.mesh), Config()
    found = cache_bytes_here(config, TINY, hosts)
    assert 0 <= share_of_host() - found < 2**20
    assert cache_bytes_here(changed(config, rollout__cache_gb=1.5), TINY, hosts) == 1_500_000_000


class Chip:
    """A device whose memory is told, or not."""

    platform, device_kind = "gpu", "a card"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("stats", "found"), [(None, None), ({}, None), ({"bytes_limit": 1}, 0)], ids=["no", "empty", "full"]
)
def test_no_memory_that_is_left_is_not_memory_that_is_not_known(stats, found, monkeypatch):
    """Nothing left gives no page, so that the run is refused; not known gives as many as are of use."""
    chip = Chip(stats)
    mesh = engine((1, 1, 1)).placement.mesh
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    monkeypatch.setattr(cache_budget, "cache_bytes_of", lambda setup, usable: 0)
    monkeypatch.setattr(cache_budget, "slice_of", lambda devices: None)
    hosts = Told(type("Mesh", (), {"devices": np.array([[[chip]]], object), "shape": mesh.shape})())
    assert cache_bytes_here(Config(), TINY, hosts) == found


def test_a_run_none_of_whose_rounds_fits_is_refused():
    config, e = run_of(None)
    smallest = round_sizes(config.rollout, 2)[0]
    _, short = run_of(least_cache(config, e, TINY, smallest) - 1)
    with pytest.raises(
        ConfigError,
        match=rf"a round of {smallest} queries and of an evaluation take at least .* --rollout\.cache_gb",
    ):
        fitting_sizes(config, short, TINY)
