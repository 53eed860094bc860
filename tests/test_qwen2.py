"""The decoder against transformers' torch implementations: Qwen2, and by two flags Qwen3 and Llama."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY, logits, placement, read, tiny_params

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.models.attention import Part, attend
from fr3e_jax.models.decoder import abstract_params, graph_of, logical_axes, unsharded
from fr3e_jax.models.hf import read_config
from fr3e_jax.models.rope import Yarn, rotate
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.types import Queries

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 96,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2 head_dim of its own": ("Qwen2", {"head_dim": 12}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2 yarn with every field": (
        "Qwen2",
        {"rope_parameters": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 0.7}},
    ),
    "qwen2 yarn with mscale": (
        "Qwen2",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.5, "truncate": False}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3 untied yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "llama": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama untied": ("Llama", {"head_dim": 10}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def torch_model(request, tmp_path_factory):
    """A tiny random model of transformers with grouped heads, and its directory."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    import transformers

    torch.manual_seed(0)
    family, changes = VARIANTS[request.param]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, "rope_parameters": ROPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


def logits_of(directory, token, length=None, start=None):
    return logits(read_config(directory), read(directory), token, length, start)


@pytest.mark.optimised
def test_float32_logits_equal_torch(torch_model):
    import torch

    model, directory = torch_model
    token = np.random.default_rng(0).integers(0, VOCABULARY, (3, 40))
    with torch.no_grad():
        expected = model(torch.tensor(token)).logits.numpy()
    ours = logits_of(directory, token)
    assert np.abs(expected).max() > 1  # not a near-zero model, for which anything agrees
    np.testing.assert_allclose(ours, expected, atol=1e-4)


FEW = pytest.mark.parametrize("torch_model", ["qwen2 tied", "qwen3 untied yarn", "llama"], indirect=True)


@pytest.mark.optimised
@FEW
def test_padding_on_either_side_does_not_change_a_rows_logits(torch_model):
    _, directory = torch_model
    token = np.random.default_rng(1).integers(0, VOCABULARY, (1, 40))
    short = logits_of(directory, token[:, :25])
    rows = np.concatenate([token, np.roll(token, 15, axis=1)])
    right, left = logits_of(directory, rows, length=[25, 40], start=[0, 15])
    np.testing.assert_allclose(right[:25], short[0], atol=2e-5)
    np.testing.assert_allclose(left[15:], short[0], atol=2e-5)


@pytest.mark.optimised
@FEW
def test_cached_greedy_decoding_equals_generate(torch_model):
    import torch

    model, directory = torch_model
    config = read_config(directory)
    engine = Engine(graph_of(config), placement(table=SAMPLING_TABLE), 32, end_tokens=(96,))
    length = np.array([9, 4, 1], np.int32)
    token = np.random.default_rng(2).integers(1, 96, (3, 9)).astype(np.int32)
    token = np.where(np.arange(9) < length[:, None], token, 0).astype(np.int32)
    queries = engine.placement.place_rows(Queries(token, length, np.arange(3, dtype=np.int32)))
    rollouts, _ = engine.sample(read(directory), queries, jax.random.key(0), 0, 1, GREEDY)
    for row, size in enumerate(length):
        expected = model.generate(
            torch.tensor(token[row : row + 1, :size]),
            attention_mask=torch.ones(1, int(size), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=96,
        )[0, size:].numpy()
        generated = int(rollouts.length[row, 0])
        np.testing.assert_array_equal(rollouts.token[row, 0, :generated], expected[:generated])
        assert generated == 32 or expected[generated - 1] == 96


def test_an_export_is_what_transformers_reads_back(torch_model, tmp_path):
    """Every tensor of every variant, bit for bit, from a sharded state; and the same logits, YaRN and all."""
    import torch
    from transformers import AutoModelForCausalLM

    model, directory = torch_model
    export_model(directory, tmp_path / "out", read(directory, (1, 4, 1)), max_file_bytes=30_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    token = torch.arange(1, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(token).logits, model(token).logits, rtol=0, atol=1e-5)


def test_yarn_extends_the_context():
    yarn = Yarn(factor=4.0, original_max_position_embeddings=32768, attention_factor=1.1)
    config = dataclasses.replace(TINY, max_position_embeddings=32768)
    assert config.context == 32768
    assert dataclasses.replace(config, yarn=yarn).context == 131072
    # A file may name the extended context itself.
    assert dataclasses.replace(config, yarn=yarn, max_position_embeddings=200_000).context == 200_000


@pytest.mark.optimised
def test_rotation_depends_on_the_distance_alone():
    """A property of rotary embeddings, with and without YaRN: scores see how far apart tokens are."""
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.standard_normal((2, 1, 1, 16)).astype(np.float32))

    def score(at, distance, yarn):
        turned = [rotate(x, jnp.array([p]), 10_000.0, yarn) for x, p in ((query, at + distance), (key, at))]
        return float((turned[0] * turned[1]).sum())

    for yarn in (None, Yarn(4.0, 64, attention_factor=1.0)):
        near = [score(at, 7, yarn) for at in (0, 3, 100)]
        np.testing.assert_allclose(near, near[0], atol=1e-4)
        assert abs(score(0, 30, yarn) - near[0]) > 1e-3


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_every_parameter_has_as_many_logical_axes_as_dimensions(flags):
    config = dataclasses.replace(TINY, qkv_bias=flags[0], qk_norm=flags[1])
    jax.tree.map(
        lambda axes, leaf: (len(axes) == leaf.ndim) or pytest.fail(f"{axes} for {leaf.shape}"),
        logical_axes(config),
        abstract_params(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.optimised
def test_a_layer_sees_a_chain_as_it_sees_the_whole():
    """One token against [first part] + [its own] gives the hidden state of a whole forward pass."""
    config = dataclasses.replace(TINY, qkv_bias=False, qk_norm=True)
    model = nnx.merge(graph_of(config), tiny_params(config))
    token = jnp.arange(1, 8)
    whole, segment = model(token, jnp.arange(7), 7)
    graph, stacked = nnx.split(model.layers)
    x = model.embed(token[-1:], unsharded)
    for number in range(config.num_hidden_layers):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], stacked))
        query, key, value = block.project(x, jnp.array([6]), unsharded)
        chain = [
            Part(segment.key[number], segment.value[number], jnp.arange(7)[None] < 6),
            Part(jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1), jnp.ones((1, 1), bool)),
        ]
        x = block.finish(x, attend(query, chain), unsharded)
    np.testing.assert_allclose(model.norm(x)[0], whole[-1], atol=1e-5)
