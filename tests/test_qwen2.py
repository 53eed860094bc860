"""The model against transformers' torch implementation, and its checkpoint format."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support import TINY, placement, tiny_params

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.models.hf import CheckpointError, config_json, read_config, read_params, write_params
from fr3e_jax.models.qwen2 import abstract_params, graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries


@pytest.fixture(scope="module", params=["tied", "untied"])
def torch_model(request, tmp_path_factory):
    """A tiny random Qwen2 of transformers with grouped heads and biases, and its directory."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=50_000.0,
        max_position_embeddings=256,
        tie_word_embeddings=request.param == "tied",
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def logits_of(directory, token, length):
    config = read_config(directory)
    graph, params = graph_of(config), read_params(directory, config)

    @jax.jit
    def forward(params, token, length):
        model = nnx.merge(graph, params)
        position = jnp.arange(token.shape[1])
        return jax.vmap(lambda t, n: model.logits(model(t, position, n)[0]))(token, length)

    return np.asarray(forward(params, token, length))


def test_float32_logits_equal_torch(torch_model):
    import torch

    model, directory = torch_model
    token = np.random.default_rng(0).integers(0, 97, (3, 40))
    with torch.no_grad():
        expected = model(torch.tensor(token)).logits.numpy()
    ours = logits_of(directory, token, np.array([40, 40, 40]))
    assert np.abs(expected).max() > 1  # not a near-zero model, for which anything agrees
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_padding_does_not_change_a_rows_logits(torch_model):
    _, directory = torch_model
    token = np.random.default_rng(1).integers(0, 97, (1, 40))
    short = logits_of(directory, token[:, :25], np.array([25]))
    padded = logits_of(directory, token, np.array([25]))
    np.testing.assert_allclose(padded[:, :25], short, atol=1e-5)


def test_cached_greedy_decoding_equals_generate(torch_model):
    import torch

    model, directory = torch_model
    config = read_config(directory)
    engine = Engine(graph_of(config), placement(table=SAMPLING_TABLE), 32, end_tokens=(96,))
    length = np.array([9, 4, 1], np.int32)
    token = np.random.default_rng(2).integers(1, 96, (3, 9)).astype(np.int32)
    token = np.where(np.arange(9) < length[:, None], token, 0).astype(np.int32)
    queries = engine.placement.place_rows(Queries(token, length, np.arange(3, dtype=np.int32)))
    rollouts, _ = engine.first_return(read_params(directory, config), queries, jax.random.key(0), 0, 1, 0.0)
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


def test_written_weights_are_what_torch_reads_back(torch_model, tmp_path):
    import torch
    from transformers import Qwen2ForCausalLM

    model, directory = torch_model
    config = read_config(directory)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    write_params(tmp_path, read_params(directory, config))
    again = Qwen2ForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint directory of our own writing."""
    write_params(tmp_path, tiny_params())
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY, [1], 0)))
    return tmp_path


def test_config_round_trips(checkpoint):
    assert read_config(checkpoint) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": "many"}, "wrong type"),
    ],
)
def test_unsupported_features_are_refused_by_name(checkpoint, change, message):
    raw = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        read_config(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_config_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read_config(checkpoint)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "truncated", "no file"])
def test_damaged_weights_are_refused(checkpoint, fault):
    file = checkpoint / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.layers.3.mlp.up_proj.weight"] = tensors[name]
    elif fault == "shape":
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "no file":
        file.unlink()
    named = {"missing": name, "unexpected": "layers.3", "shape": name, "truncated": "damaged"}
    with pytest.raises(CheckpointError, match=named.get(fault, "holds no model.safetensors")):
        read_params(checkpoint, TINY)


def test_every_parameter_has_as_many_logical_axes_as_dimensions():
    jax.tree.map(
        lambda axes, leaf: (len(axes) == leaf.ndim) or pytest.fail(f"{axes} for {leaf.shape}"),
        logical_axes(TINY),
        abstract_params(TINY),
        is_leaf=lambda x: isinstance(x, tuple),
    )
