"""A vocabulary in parts, on one device and on several."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import FEW, clear_of_steps, drawn_many, random_logits, reference, uniforms
from support import placement

from fr3e_jax.engine import filters
from fr3e_jax.engine.sampler import Drawn, Sampling, draw
from fr3e_jax.parallel.mesh import BATCH_AXES


def check_same(ours, theirs):
    np.testing.assert_array_equal(ours.token, theirs.token)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FEW, ids=str)
@pytest.mark.parametrize("size, parts", [(1000, 2), (2408, 4)])
def test_parts_of_the_vocabulary_change_nothing(sampling, size, parts):
    """Parts of several blocks, the last not full."""
    logits = random_logits(size, 10)
    uniform = clear_of_steps(uniforms(2000, 10), reference(logits, sampling))
    check_same(drawn_many(logits, uniform, sampling, parts), drawn_many(logits, uniform, sampling))


WIDE = 8 * 604  # parts of several blocks, the last not full
over = pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 1, 8)], ids=["2x4", "8"])


@functools.cache
def compiled_over(mesh, sampling):
    """Two rows for each part of the batch, drawn as the engine does: `draw_part` of branches.py."""
    place = placement(*mesh)

    def draw_part(logits, uniform):
        return jax.vmap(lambda logits, u: draw(logits, u, sampling, mesh[2], place.shard))(logits, uniform)

    shape = (mesh[0], 2)
    logits = jax.ShapeDtypeStruct(
        (*shape, WIDE), jnp.float32, sharding=place.sharding("batch", None, "vocab")
    )
    uniform = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place.sharding("batch", None))
    return jax.jit(jax.vmap(draw_part, spmd_axis_name=BATCH_AXES)).lower(logits, uniform).compile()


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FEW, ids=str)
@over
def test_a_sharded_vocabulary_gives_what_one_device_gives(mesh, sampling):
    place, compiled = placement(*mesh), compiled_over(mesh, sampling)
    shape = (mesh[0], 2)
    for seed in range(4):
        logits = np.stack([random_logits(WIDE, 100 * seed + row) for row in range(2 * mesh[0])])
        uniform = np.float32(
            [clear_of_steps(uniforms(20, seed), reference(row, sampling))[0] for row in logits]
        )
        alone = [drawn_many(row, u[None], sampling) for row, u in zip(logits, uniform, strict=True)]
        many = compiled(
            place.place(logits.reshape(*shape, WIDE), "batch", None, "vocab"),
            place.place(uniform.reshape(shape), "batch", None),
        )
        check_same(Drawn(*(np.ravel(x) for x in many)), Drawn(*map(np.concatenate, zip(*alone, strict=True))))


@pytest.mark.parametrize("sampling", FEW, ids=str)
@over
def test_a_sharded_vocabulary_is_never_gathered(mesh, sampling):
    """No array of a device is as large as one vocabulary; two rows of its part are smaller."""
    text = compiled_over(mesh, sampling).as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert 2 * WIDE // mesh[2] <= largest < WIDE


BLOCKS = [
    ((2, 1, 4), Sampling(0.7, 7, 0.9)),
    ((1, 1, 8), Sampling(top_p=0.2)),
    pytest.param((2, 1, 4), Sampling(top_p=0.2), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), Sampling(0.7, 7, 0.9), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh, sampling", BLOCKS)
def test_choosing_blocks_gathers_no_sharded_vocabulary(mesh, sampling, monkeypatch):
    """With blocks so small that a filter has enough of them to choose from."""
    monkeypatch.setattr(filters, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(filters, "LIKELY", 9)
    compiled_over.cache_clear()  # what was compiled with the usual blocks
    try:
        test_a_sharded_vocabulary_gives_what_one_device_gives(mesh, sampling)
        test_a_sharded_vocabulary_is_never_gathered(mesh, sampling)
    finally:
        compiled_over.cache_clear()
