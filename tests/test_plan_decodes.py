"""Decodings of a plan: the engine's own, without a device."""

import dataclasses

import jax
import numpy as np
import pytest
from support import TINY, placement, tiny_params

from fr3e_jax.engine.budget import context_bytes, page_bytes
from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.schedule import Room
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.planning.decodes import decode_of
from fr3e_jax.types import Queries


@pytest.mark.parametrize(
    ("max_new", "pages", "ends"), [(100, None, (3,)), (400, None, (3,)), (400, 16, (3,)), (200, 10, ())]
)
def test_the_legs_of_a_decoding_are_those_of_the_engine(max_new, pages, ends):
    """As many rows decoded, on lengths that the engine itself gave, in enough memory and in less."""
    config = dataclasses.replace(TINY, max_position_embeddings=1024)
    at = placement(2, 1, 1, SAMPLING_TABLE)
    sizes = PageSizes(rows=16, slots=32, spans=(1, 4), context=512, fixed=32)
    engine = Engine(graph_of(config), at, max_new, ends, sizes=sizes)
    room = engine.room_for(config, (4, 16), 4, np.float32)
    if pages is not None:
        assert pages < room.pages
        page, shared = (
            f(config, at, room, *x, np.float32) for f, x in ((page_bytes, ()), (context_bytes, (4,)))
        )
        engine = dataclasses.replace(engine, cache_bytes=shared + pages * page)
        room = dataclasses.replace(room, pages=pages)
    params = jax.device_put(
        tiny_params(config, 2.0), at.shardings(logical_axes(config), tiny_params(config, 2.0))
    )
    queries = Queries(np.full((4, 4), 5, np.int32), np.full(4, 4, np.int32), np.arange(4, dtype=np.int32))
    arguments = (params, at.place_rows(queries), jax.random.key(0), 0)
    rollouts, row_steps = engine.sample(*arguments, 16, Sampling())
    plan = decode_of(np.asarray(rollouts.length).reshape(2, 2, 16), room)
    assert plan.row_steps == int(row_steps)
    assert plan.tokens == int(rollouts.length.sum())
    assert len(plan.legs) > 2
    assert any(leg.moved for leg in plan.legs) == (not ends)  # where none ends, not all have pages


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
