"""The splash kernel computes what `attend_sequence` does, on one device and on a mesh; and as TPUs run it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY, mesh_of, needs_compiler, square_arrays, tiny_params

from fr3e_jax.learner.splash_on_mesh import make_splash
from fr3e_jax.models.attention import Prefix, attend_sequence
from fr3e_jax.models.decoder import abstract_params, graph_of, logical_axes
from fr3e_jax.models.splash import block_of, splash_sequence
from fr3e_jax.parallel.mesh import BATCH_AXES, Placement, place_model
from fr3e_jax.planning.topology import slice_mesh

splash = functools.partial(splash_sequence, interpret=True)


def inputs_of(length, slots, heads=4, kv_heads=2, head_dim=64, prefixes=2):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    own = (
        normal(length, heads, head_dim),
        normal(kv_heads, length, head_dim),
        normal(kv_heads, length, head_dim),
    )
    before = [normal(prefixes, kv_heads, slots, head_dim) for _ in range(2)] if slots else [None, None]
    return *own, *before, normal(length, heads, head_dim)


def output_and_gradients(attend, real, which, seen, query, key, value, prefix_key, prefix_value, weight):
    """What real tokens get, and the gradients of a weighted sum of it."""

    def run(query, key, value, prefix_key, prefix_value):
        prefix = None if prefix_key is None else Prefix(prefix_key, prefix_value, which, seen)
        output = jnp.where(real[:, None, None], attend(query, key, value, real, prefix), 0.0)
        return jnp.sum(output * weight), output

    numbers = tuple(range(3 if prefix_key is None else 5))
    gradients, output = jax.jit(jax.grad(run, numbers, has_aux=True))(
        query, key, value, prefix_key, prefix_value
    )
    return output, gradients


def assert_close(got, expected, tolerance=2e-5):
    def one(got, expected):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)

    jax.tree.map(one, got, expected)


@pytest.mark.parametrize(
    ("length", "real", "slots", "seen", "sizes"),
    [
        (128, (0, 128), 0, 0, {}),
        (200, (0, 131), 0, 0, {"heads": 2, "kv_heads": 2, "head_dim": 128}),
        (200, (30, 170), 72, 72, {}),
        (100, (0, 77), 128, 0, {}),
        (200, (0, 190), 130, 53, {"heads": 6, "kv_heads": 2, "head_dim": 128}),
    ],
)
def test_output_and_gradients_are_those_of_plain_attention(monkeypatch, length, real, slots, seen, sizes):
    monkeypatch.setattr("fr3e_jax.models.splash.SPLASH_BLOCK", 128)  # so that there are several
    index = jnp.arange(length)
    mask = (real[0] <= index) & (index < real[1])
    inputs = inputs_of(length, slots, **sizes)
    got, expected = (
        output_and_gradients(attend, mask, jnp.int32(1), jnp.int32(seen), *inputs)
        for attend in (splash, attend_sequence)
    )
    assert_close(got, expected)


def test_bfloat16_loses_little():
    query, key, value, *_ = inputs_of(100, 0)
    real = jnp.arange(100) < 90
    narrow = splash(*(x.astype(jnp.bfloat16) for x in (query, key, value)), real, None)
    assert narrow.dtype == jnp.bfloat16
    expected = attend_sequence(query, key, value, real, None)
    assert_close(narrow[:90].astype(jnp.float32), expected[:90], 3e-2)


def test_padding_and_hidden_slots_reach_nothing():
    """Not even with outputs of padding in the loss; and these are finite."""
    real, prefix = jnp.arange(150) < 100, Prefix(None, None, jnp.int32(0), jnp.int32(40))
    query, key, value, prefix_key, prefix_value, _ = inputs_of(150, 64)

    def run(query, key, value, prefix_key, prefix_value, counted):
        held = prefix._replace(key=prefix_key, value=prefix_value)
        output = splash(query, key, value, real, held)
        return jnp.sum(jnp.where(counted[:, None, None], output, 0.0)), output

    differentiate = jax.jit(jax.grad(run, (0, 1, 2, 3, 4), has_aux=True))
    gradients, clean = differentiate(query, key, value, prefix_key, prefix_value, ~real)
    assert np.isfinite(clean).all() and all(np.isfinite(x).all() for x in gradients)
    for gradient, counted in zip(gradients[:3], (np.s_[:100], np.s_[:, :100], np.s_[:, :100]), strict=True):
        assert not np.any(gradient[counted])
    assert not np.any(gradients[3]) and not np.any(gradients[4])
    dirty = (
        query.at[100:].set(7.0),
        *(x.at[:, 100:].set(1e4) for x in (key, value)),
        *(x.at[:, :, 40:].set(1e4).at[1].set(1e4) for x in (prefix_key, prefix_value)),
    )
    gradients, soiled = differentiate(*dirty, real)
    np.testing.assert_array_equal(soiled[:100], clean[:100])
    assert not np.any(gradients[0][100:]) and not np.any(gradients[1][:, 100:])
    assert not np.any(gradients[3][:, :, 40:]) and not np.any(gradients[4][1])


def test_blocks_are_equal_and_not_longer_than_needed():
    assert [block_of(n) for n in (1, 128, 129, 512, 640, 768, 5120)] == [128, 128, 256, 512, 384, 384, 512]


# --- on a mesh, in the model


@pytest.mark.parametrize(
    ("sizes", "remat"), [((2, 2, 2), False), ((1, 2, 4), True)], ids=["split", "key-value heads copied"]
)
def test_gradient_of_a_model_on_a_mesh(sizes, remat):
    """Rows of a part share its prefixes; parts lie on `data` and `fsdp`, heads on `tensor`."""
    config = dataclasses.replace(TINY, num_hidden_layers=2, head_dim=64)
    kv_heads, mesh = config.num_key_value_heads, mesh_of(*sizes)
    params = tiny_params(config, scale=1.0)
    axes = logical_axes(config)
    placement, _ = place_model(mesh, axes, abstract_params(config))
    assert (placement.table["kv_heads"] is None) == (kv_heads < sizes[2])
    parts, rows, length, slots = sizes[0] * sizes[1], 3, 20, 16
    rng = np.random.default_rng(1)
    token = rng.integers(0, config.vocab_size, (parts, rows, length)).astype(np.int32)
    number = rng.integers(5, length + 1, (parts, rows)).astype(np.int32)
    which, seen = np.array([0, 1, 0], np.int32), np.array([0, 9, 16], np.int32)
    held = rng.standard_normal((2, parts, config.num_hidden_layers, 2, kv_heads, slots, 64))
    weight = rng.standard_normal((parts, rows, length, config.hidden_size)).astype(np.float32)

    def loss(params, held, attend):
        model = nnx.merge(graph_of(config), params)

        def row(token, number, which, seen, key, value):
            prefix = Prefix(key, value, which, seen)
            position = seen + jnp.arange(length)
            hidden, _ = model(token, position, number, placement.shard, remat, prefix=prefix, attend=attend)
            return jnp.where((jnp.arange(length) < number)[:, None], hidden, 0.0)

        def part(token, number, key, value):
            return jax.vmap(row, (0, 0, 0, 0, None, None))(token, number, which, seen, key, value)

        hidden = jax.vmap(part, spmd_axis_name=BATCH_AXES)(token, number, *held)
        return jnp.sum(hidden * weight)

    params = jax.tree.map(jax.device_put, params, placement.shardings(axes, params))
    held = [placement.place(x.astype(np.float32), "batch") for x in held]
    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    got = differentiate(params, held, make_splash(placement, interpret=True))
    assert_close(got, differentiate(params, held, attend_sequence), 3e-4)


# --- as TPUs would run it


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "head_dim"), [("v5e:2x2", 128), pytest.param("v5p:2x2x1", 64, marks=pytest.mark.slow)]
)
def test_scores_stay_within_the_kernel_on_a_tpu(topology, head_dim):
    """The gradient of the 7B model's attention to 1024 shared slots and 4096 own; and with smaller heads."""
    placement = Placement(slice_mesh(topology, (1, 2, 2)))
    parts, rows, length, slots, heads, kv_heads = 2, 3, 4096, 1024, 28, 4

    def array(dtype, *sizes, axes=()):
        return jax.ShapeDtypeStruct((parts, *sizes), dtype, sharding=placement.sharding("batch", *axes))

    query = array(jnp.bfloat16, rows, length, heads, head_dim, axes=(None, None, "heads"))
    key = array(jnp.bfloat16, rows, kv_heads, length, head_dim, axes=(None, "kv_heads"))
    before = array(jnp.bfloat16, 2, kv_heads, slots, head_dim, axes=(None, "kv_heads"))
    number, real = array(jnp.int32, rows), array(jnp.bool_, rows, length)
    attend = make_splash(placement)

    def loss(query, key, value, prefix_key, prefix_value, real, which, seen):
        def row(query, key, value, real, which, seen, prefix_key, prefix_value):
            return attend(query, key, value, real, Prefix(prefix_key, prefix_value, which, seen))

        part = jax.vmap(row, (0, 0, 0, 0, 0, 0, None, None))
        over_parts = jax.vmap(part, spmd_axis_name=BATCH_AXES)
        output = over_parts(query, key, value, real, which, seen, prefix_key, prefix_value)
        return jnp.sum(output.astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))
    text = gradient.lower(query, key, key, before, before, real, number, number).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and two backward
    assert square_arrays(text, length) == []
    assert "all-gather" not in text  # nor are heads or rows brought together for it


def test_square_arrays_are_seen():
    text = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x).lower(jnp.zeros((64, 8))).compile().as_text()
    assert square_arrays(text, 64)
