"""Decodings of a plan: the engine's own, without a device."""

import dataclasses

import jax
import numpy as np
import pytest
from support import TINY, placement, tiny_params

from fr3e_jax.engine.budget import context_bytes, page_bytes
from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.rollout import Engine, last
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.schedule import Room
from fr3e_jax.engine.starts import root_branches
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.planning.decodes import decode_of
from fr3e_jax.types import Queries

CONFIG = dataclasses.replace(TINY, max_position_embeddings=1024)
AT = placement(2, 1, 1, SAMPLING_TABLE)
COUNT = 16


def engine_with(max_new, pages, ends):
    """(Engine, blocks and pages of its decoding of 2 queries of each part) with so many pages; None: all."""
    sizes = PageSizes(rows=16, slots=32, spans=(1, 4), context=512, fixed=32)
    engine = Engine(graph_of(CONFIG), AT, max_new, ends, sizes=sizes)
    room = engine.room_for(CONFIG, (4, COUNT), 4, np.float32)
    if pages is None:
        return engine, room
    assert pages < room.pages
    page, shared = (f(CONFIG, AT, room, *x, np.float32) for f, x in ((page_bytes, ()), (context_bytes, (4,))))
    engine = dataclasses.replace(engine, cache_bytes=shared + pages * page)
    return engine, dataclasses.replace(room, pages=pages)


def engine_arguments():
    """(Parameters, queries, key, step), as `Engine.sample` takes them."""
    params = jax.device_put(
        tiny_params(CONFIG, 2.0), AT.shardings(logical_axes(CONFIG), tiny_params(CONFIG, 2.0))
    )
    queries = Queries(np.full((4, 4), 5, np.int32), np.full(4, 4, np.int32), np.arange(4, dtype=np.int32))
    return params, AT.place_rows(queries), jax.random.key(0), 0


@pytest.mark.parametrize(
    ("max_new", "pages", "ends"), [(100, None, (3,)), (400, None, (3,)), (400, 16, (3,)), (200, 10, ())]
)
def test_the_legs_of_a_decoding_are_those_of_the_engine(max_new, pages, ends):
    """As many rows decoded, on lengths that the engine itself gave, in enough memory and in less."""
    engine, room = engine_with(max_new, pages, ends)
    rollouts, row_steps = engine.sample(*engine_arguments(), COUNT, Sampling())
    plan = decode_of(np.asarray(rollouts.length).reshape(2, 2, COUNT), room)
    assert plan.row_steps == int(row_steps)
    assert plan.tokens == int(rollouts.length.sum())
    assert not plan.left.any()
    assert len(plan.legs) > 2
    assert any(leg.moved for leg in plan.legs) == (not ends)  # where none ends, not all have pages


@pytest.mark.parametrize("wait_for", [0.6, 0.9])
@pytest.mark.parametrize(("max_new", "pages"), [(400, None), (400, 16)])
def test_a_decoding_that_does_not_wait_leaves_what_the_engine_leaves(max_new, pages, wait_for):
    """Each branch is left as it is there: the lengths are those that the engine gives it when it waits."""
    engine, room = engine_with(max_new, pages, (3,))
    params, queries, *randomness = engine_arguments()
    whole, all_rows = engine.sample(params, queries, *randomness, COUNT, Sampling())
    length = np.asarray(whole.length).reshape(2, 2, COUNT)
    may_run = round((1 - wait_for) * length.size)
    number = AT.place_rows(root_branches(queries, COUNT))
    branches, decoding = engine.open_queries(params, queries, number, *randomness)
    decoding = last(engine.decode(params, branches, decoding, Sampling(), may_run=may_run))
    plan = decode_of(length, room, may_run=may_run)
    assert (length - plan.left == np.asarray(decoding.rollouts.length).reshape(length.shape)).all()
    assert ((plan.left > 0) == np.asarray(decoding.running).reshape(length.shape)).all()
    assert 0 < (plan.left > 0).sum() <= may_run
    assert plan.tokens == int(decoding.rollouts.length.sum()) < int(whole.length.sum())
    assert plan.row_steps == int(decoding.row_steps) < int(all_rows)


def test_what_a_leg_computes_is_counted():
    """Two parts of 5 x 4 branches in blocks of 4 rows; pages of 2 tokens, and tiles of 8 of the context."""
    sizes = PageSizes(rows=4, slots=2, spans=(2,), context=8, fixed=4)
    room = Room(sizes, 5, 4, 6, 20)
    lengths = np.full((2, 5, 4), 6)
    lengths[:, 1:] = 3
    plan = decode_of(lengths, room, np.array([20, 9, 8, 8, 8])[None, :, None])
    first, *_, last = plan.legs
    assert (first.blocks, first.span, first.spans, first.rows) == (5, 2, 3, 24)
    assert (first.steps, first.pages) == (2, 5)
    # Trajectories are one strip; in each span, a tile goes as far as the longest context of its rows.
    assert (first.strips, first.tiles) == (3, 3 + 1 + 1)
    assert (last.blocks, last.steps, last.pages, last.tiles) == (1, 2, 3, 3)
    assert sum(leg.steps for leg in plan.legs) == 6
    assert plan.row_steps == 2 * (24 * 2 + 24 * 1 + 8 * 1 + 8 * 2)
    assert (first.times("pages"), first.times("spans")) == (2 * 5, 2 * 3)
