"""The model on meshes: the same logits, nothing of the vocabulary gathered, key-value heads replicated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY, logits, mesh_of, placed, tiny_params

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.parallel.mesh import BATCH_AXES, place_model
from fr3e_jax.types import Queries

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
QWEN3 = dataclasses.replace(UNTIED, qkv_bias=False, qk_norm=True)
# 4 query heads and 2 key-value heads: with tensor 4, key-value heads are replicated.
MESHES = [(1, 8, 1), (1, 1, 4), (2, 2, 2), (2, 1, 4)]
ROWS = np.random.default_rng(0).integers(0, TINY.vocab_size, (8, 24))
LENGTH = np.arange(17, 25)


@pytest.mark.parametrize("config", [TINY, UNTIED, QWEN3], ids=["tied", "untied", "qwen3"])
def test_logits_do_not_depend_on_the_mesh(config):
    params = tiny_params(config, scale=1.0)  # larger weights amplify the rounding of sums in another order
    alone = logits(config, params, ROWS, LENGTH)
    assert np.abs(alone).max() > 1
    for mesh in MESHES:
        ours = logits(config, placed(params, config, mesh), ROWS, LENGTH, mesh=mesh)
        for row, length in enumerate(LENGTH):  # behind its end a row means nothing
            np.testing.assert_allclose(ours[row, :length], alone[row, :length], atol=1e-5, err_msg=str(mesh))


def test_rollouts_with_replicated_key_value_heads_are_those_of_one_device():
    params = tiny_params(QWEN3, scale=3.0)
    found = []
    for mesh in ((1, 1, 1), (2, 1, 4)):
        axes = logical_axes(QWEN3)
        _, sampling = place_model(mesh_of(*mesh), axes, params)
        at = jax.device_put(params, sampling.shardings(axes, params))
        engine = Engine(graph_of(QWEN3), sampling, 12, end_tokens=(3,))
        queries = Queries(
            ROWS[:2, :5].astype(np.int32), np.array([5, 3], np.int32), np.arange(2, dtype=np.int32)
        )
        placed_queries = sampling.place_rows(queries)
        found.append(engine.sample(at, placed_queries, jax.random.key(0), 0, 3, Sampling())[0])
    one, many = map(jax.device_get, found)
    np.testing.assert_array_equal(one.token, many.token)
    np.testing.assert_allclose(one.logprob, many.logprob, atol=1e-5)


def test_query_heads_are_split_where_key_value_heads_are_not():
    params = placed(tiny_params(), TINY, (1, 1, 4))
    assert params["layers"]["q"].addressable_shards[0].data.shape[2] == TINY.num_attention_heads // 4
    assert params["layers"]["k"].addressable_shards[0].data.shape[2] == TINY.num_key_value_heads


def test_embedding_and_lm_head_are_split_over_the_vocabulary_and_never_gathered():
    """In the compiled program for 4x tensor, no array has the whole vocabulary on an axis."""
    config = dataclasses.replace(UNTIED, vocab_size=1216)  # a size that nothing else has
    params, mesh = tiny_params(config), mesh_of(1, 1, 4)
    training, _ = place_model(mesh, logical_axes(config), params)
    at = placed(params, config, (1, 1, 4))
    assert at["embedding"].addressable_shards[0].data.shape[0] == 1216 // 4
    graph = graph_of(config)

    def loss(params, token, length):
        """A log-probability, as the learner computes it, and so a gradient."""
        model = nnx.merge(graph, params)

        def one(token, length):
            hidden, _ = model(token, jnp.arange(24), length, training.shard)
            wide = model.logits(hidden, training.shard)
            drawn = jnp.take_along_axis(wide, token[:, None], axis=1)[:, 0]
            return jnp.sum(drawn - jax.nn.logsumexp(wide, axis=1))

        return jnp.sum(jax.vmap(one, spmd_axis_name=BATCH_AXES)(token, length))

    rows = training.place_rows((ROWS, LENGTH))
    for function in (loss, jax.grad(loss)):
        text = jax.jit(function).lower(at, *rows).compile().as_text()
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
        sizes = {int(n) for shape in shapes for n in shape.split(",")}
        assert 1216 // 4 in sizes
        assert 1216 not in sizes
