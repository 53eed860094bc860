"""The memory of an update does not grow with the number of branches; what never exists in it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support import TINY, needs_compiler, placement, square_arrays, tiny_params

from fr3e_jax.bench.compiled_update import UpdateShape, compile_update
from fr3e_jax.bench.update import TreeSizes, groups_of_tree
from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import abstract_params, graph_of, logical_axes
from fr3e_jax.types import Batch, Trunks

LENGTH = 2048  # above the tokens whose logits exist at a time; longer ones compile longer
MODEL = dataclasses.replace(
    TINY,
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
    num_hidden_layers=2,
    max_position_embeddings=2 * LENGTH,
)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_sixteen_chunks_run_the_programs_of_one(mesh):
    """So that nothing in a program, and so none of its temporaries, can grow with the branches."""
    axes, at = logical_axes(TINY), placement(*mesh)
    optimizer, parts = make_optimizer(OptimizerConfig(), axes), mesh[0] * mesh[1]
    learner = Learner(
        graph_of(TINY), at, optimizer, LossConfig(), compute_dtype=jnp.float32, logit_chunk=64, remat=True
    )
    programs = (
        learner.cast_and_zero_gradient,
        learner.prefill_and_zero_gradient,
        learner.add_chunk,
        learner.add_trunks,
        learner.norm,
    )
    params, compiled = jax.device_put(tiny_params(), at.shardings(axes, tiny_params())), []
    for chunks in (1, 16):
        groups = groups_of_tree(TreeSizes(prompt=8, response=32, positions=0, rollouts=4 * parts * chunks))
        groups = dataclasses.replace(groups, token=groups.token % 48, query=groups.query % 48)
        bundles = bundles_of(groups, parts, 128)
        assert [len(bundle.chunks) for bundle in bundles] == [chunks]
        gradient, _ = learner.gradient(params, bundles)
        compiled.append([program._cache_size() for program in programs])
    assert compiled[0] == compiled[1]
    # And no device holds more of the gradient than of the parameters.
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.mark.slow
@needs_compiler
def test_no_scores_and_no_logits_of_all_tokens_exist_on_a_tpu():
    """Of responses of 2,048 tokens and 8,192 words: no array has both, or the length twice, on any chip."""
    sizes = {"trunks": 1, "trunk": LENGTH, "rows": 2, "length": LENGTH, "window": LENGTH}
    shape = UpdateShape(topology="v5e:2x2", mesh=(1, 4, 1), **sizes)
    for name, program in compile_update(MODEL, shape).items():
        assert square_arrays(program.as_text(), LENGTH) == [], name


def test_no_scores_and_no_logits_of_all_tokens_exist_on_a_cpu():
    """The same of 1,024 tokens and as many words, in blocks of 256 queries and pieces of 64 logits."""
    length, at = 1024, placement(1, 1, 1)
    config = dataclasses.replace(TINY, vocab_size=length, max_position_embeddings=2 * length)
    optimizer = make_optimizer(OptimizerConfig(), logical_axes(config))
    learner = Learner(
        graph_of(config), at, optimizer, LossConfig(), compute_dtype=jnp.float32, logit_chunk=64, remat=True
    )

    def array(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    params, trunks = abstract_params(config), Trunks(array(jnp.int32, 1, 1, length), array(jnp.int32, 1, 1))
    caches, cache_gradient = jax.eval_shape(learner.prefill_and_zero_gradient, params, trunks)
    number, tokens = array(jnp.int32, 1), array(jnp.int32, 1, length + 1)
    old, advantage = array(jnp.float32, 1, length + 1), array(jnp.float32, 1)
    chunk = Batch(tokens, number, number, old, advantage, number, number)
    arguments = (params, cache_gradient, Prefilled(params, caches), None, chunk, array(jnp.float32))
    for lowered in (
        Learner.add_chunk.lower(learner, *arguments, window=length),
        Learner.add_trunks.lower(learner, params, cache_gradient, params, trunks),
    ):
        assert square_arrays(lowered.compile().as_text(), length) == []
