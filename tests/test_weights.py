"""Weights between safetensors and the mesh: bit for bit, on any mesh, in pieces, or refused."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import TINY, mesh_of, placed, read, tiny_params, write

from fr3e_jax.models.decoder import abstract_params, logical_axes
from fr3e_jax.models.hf import read_config
from fr3e_jax.parallel.mesh import place_model
from fr3e_jax.pretrained import safetensors_files, weights
from fr3e_jax.pretrained.model import open_model
from fr3e_jax.pretrained.safetensors_files import INDEX_FILE, SINGLE_FILE
from fr3e_jax.pretrained.weights import CheckpointError, all_finite, read_params
from fr3e_jax.pretrained.write_weights import write_params

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
QWEN3 = dataclasses.replace(UNTIED, qkv_bias=False, qk_norm=True)
MESHES = [(1, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2), (2, 1, 4)]
NAME = "model.layers.1.mlp.up_proj.weight"


def by_hand(directory):
    """The parameters of a directory, tensor by tensor in plain numpy: the slow, obvious way."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    c = read_config(directory)

    def stack(name, turn):
        found = [tensors[f"model.layers.{i}.{name}"] for i in range(c.num_hidden_layers)]
        return np.stack([turn(x) for x in found])

    hidden, heads, kv, dim = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layers = {
        "attention_norm": {"scale": stack("input_layernorm.weight", lambda x: x)},
        "mlp_norm": {"scale": stack("post_attention_layernorm.weight", lambda x: x)},
        "o": stack("self_attn.o_proj.weight", lambda x: x.T.reshape(heads, dim, hidden)),
    }
    for name, count in (("q", heads), ("k", kv), ("v", kv)):
        weight = stack(f"self_attn.{name}_proj.weight", lambda x, n=count: x.T.reshape(hidden, n, dim))
        layers[name] = weight
        if c.qkv_bias:
            bias = stack(f"self_attn.{name}_proj.bias", lambda x, n=count: x.reshape(n, dim))
            layers[f"{name}_bias"] = bias
        if c.qk_norm and name != "v":
            layers[f"{name}_norm"] = {"scale": stack(f"self_attn.{name}_norm.weight", lambda x: x)}
    for name in ("gate", "up", "down"):
        layers[name] = stack(f"mlp.{name}_proj.weight", lambda x: x.T)
    params = {"embedding": tensors["model.embed_tokens.weight"], "layers": layers}
    params["norm"] = {"scale": tensors["model.norm.weight"]}
    return params if c.tie_word_embeddings else params | {"lm_head": tensors["lm_head.weight"]}


@pytest.fixture(params=[10**9, 20_000], ids=["one file", "several files"])
def checkpoint(request, tmp_path):
    """A small checkpoint of our own writing."""
    return write(tmp_path / "model", UNTIED, tiny_params(UNTIED), max_file_bytes=request.param)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("block_bytes", [1, 5_000, 10**9])
def test_every_mesh_and_block_size_reads_the_same_bits(tmp_path, monkeypatch, mesh, block_bytes):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    directory = write(tmp_path, QWEN3, tiny_params(QWEN3), max_file_bytes=20_000)
    params = read(directory, mesh)
    chex.assert_trees_all_equal(jax.device_get(params), by_hand(directory))
    training, _ = place_model(mesh_of(*mesh), logical_axes(QWEN3), params)
    expected = training.shardings(logical_axes(QWEN3), params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, expected))


def test_what_is_written_is_read_back_from_any_mesh(checkpoint, tmp_path):
    params = tiny_params(UNTIED)
    chex.assert_trees_all_equal(jax.device_get(read(checkpoint)), params)
    for mesh in MESHES:
        out = tmp_path / str(mesh)
        out.mkdir()
        write_params(out, placed(params, UNTIED, mesh), max_file_bytes=20_000)
        ours = sorted(file.name for file in out.iterdir())
        (out / "config.json").write_text((checkpoint / "config.json").read_text())
        chex.assert_trees_all_equal(by_hand(out), params)
        assert len(ours) > 3 and INDEX_FILE in ours
        sizes = [sum(x.nbytes for x in load_file(file).values()) for file in out.glob("*.safetensors")]
        assert max(sizes) <= 20_000


def test_a_bfloat16_file_holds_the_nearest_bfloat16(tmp_path):
    params = tiny_params(UNTIED)
    directory = write(tmp_path, UNTIED, params, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    chex.assert_trees_all_equal(by_hand(directory), rounded)
    widened = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    chex.assert_trees_all_equal(jax.device_get(read(directory, (1, 8, 1))), widened)
    chex.assert_trees_all_equal(jax.device_get(read(directory, (1, 8, 1), jnp.bfloat16)), rounded)


def test_a_float32_file_is_read_as_bfloat16(tmp_path):
    params = tiny_params(UNTIED)
    directory = write(tmp_path, UNTIED, params)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    chex.assert_trees_all_equal(jax.device_get(read(directory, (2, 2, 2), jnp.bfloat16)), rounded)


def test_a_process_reads_each_number_that_it_holds_once(tmp_path, monkeypatch):
    """Copies on several devices are read once, and nothing is read to be thrown away."""
    directory = write(tmp_path, UNTIED, tiny_params(UNTIED))
    read_tensor, sizes = weights.Source.read_tensor, []

    def counting(self, *arguments):
        piece = read_tensor(self, *arguments)
        sizes.append(piece.size)
        return piece

    monkeypatch.setattr(weights.Source, "read_tensor", counting)
    params = read(directory, (2, 2, 2))
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(params))
    assert max(sizes) <= max(x.size for x in jax.tree.leaves(params)) / 4


def test_a_tied_checkpoint_may_carry_the_shared_matrix_twice(tmp_path):
    directory = write(tmp_path, TINY, tiny_params())
    file = directory / SINGLE_FILE
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    chex.assert_trees_all_equal(jax.device_get(read(directory)), tiny_params())


@pytest.mark.parametrize("block_bytes", [1, 10**9])
def test_a_tied_checkpoint_with_a_second_matrix_is_refused(tmp_path, monkeypatch, block_bytes):
    """One number that differs is a model that is not tied; transformers would not tie it either."""
    monkeypatch.setattr(safetensors_files, "COMPARED_BYTES", block_bytes)
    directory = write(tmp_path, TINY, tiny_params())
    file = directory / SINGLE_FILE
    tensors = load_file(file)
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, file)
    refused(directory, "lm_head.weight", "tie_word_embeddings")


# --- refusals


def refused(directory, *named):
    with pytest.raises(CheckpointError) as refusal:
        read(directory)
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message, message


def changed(directory, change):
    """Rewrite the file that holds NAME."""
    file = next(f for f in sorted(directory.glob("*.safetensors")) if NAME in load_file(f))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file.name


FAULTS = {
    "missing": lambda t: t.pop(NAME),
    "shape": lambda t: t.update({NAME: np.ascontiguousarray(t[NAME].T)}),
    "integers": lambda t: t.update({NAME: t[NAME].astype(np.int32)}),
    "doubles": lambda t: t.update({NAME: t[NAME].astype(np.float64)}),
    "not a number": lambda t: t[NAME].__setitem__((3, 5), np.nan),
    "infinite": lambda t: t[NAME].__setitem__((3, 5), -np.inf),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_is_refused_by_file_and_name(checkpoint, fault):
    file = changed(checkpoint, FAULTS[fault])
    refused(checkpoint, NAME, str(checkpoint) if fault == "missing" else file)


def test_an_unexpected_tensor_is_refused(checkpoint):
    name = "model.layers.3.mlp.up_proj.weight"
    changed(checkpoint, lambda t: t.update({name: t[NAME]}))
    refused(checkpoint, name)


def test_a_truncated_file_is_refused(checkpoint):
    file = sorted(checkpoint.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(checkpoint, file.name, "damaged")


def test_a_type_that_contradicts_config_json_is_refused(tmp_path):
    """float16 and bfloat16 cannot be told apart by their bytes."""
    directory = write(tmp_path, UNTIED, tiny_params(UNTIED), dtype=jnp.bfloat16)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": "float16"}))
    refused(directory, "BF16", "float16")
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    read(directory)


def test_nothing_is_read_before_every_header_is_checked(checkpoint, monkeypatch):
    changed(checkpoint, FAULTS["shape"])
    monkeypatch.setattr(weights, "read_leaf", lambda *_: pytest.fail("a weight was read"))
    refused(checkpoint, NAME)


def edited(directory, **weight_map):
    file = directory / INDEX_FILE
    index = json.loads(file.read_text())
    index["weight_map"] |= weight_map
    file.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "model", UNTIED, tiny_params(UNTIED), max_file_bytes=20_000)


def test_an_index_that_names_an_absent_file_is_refused(sharded):
    edited(sharded, **{NAME: "model-00099.safetensors"})
    refused(sharded, INDEX_FILE, "model-00099.safetensors", "absent")
    edited(sharded, **{NAME: f"{'x' * 400}.safetensors"})
    refused(sharded, INDEX_FILE, "absent")


def test_an_index_that_names_the_wrong_file_is_refused(sharded):
    edited(sharded, **{NAME: "model-00001-of-00008.safetensors"})
    refused(sharded, INDEX_FILE, NAME)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin"])
def test_an_index_that_leaves_the_directory_or_names_a_pickle_is_refused(sharded, name):
    (sharded / "pytorch_model.bin").write_bytes(b"\x80")
    edited(sharded, **{NAME: name})
    refused(sharded, INDEX_FILE, name)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    refused(sharded, INDEX_FILE)


def test_two_sets_of_weights_are_refused(sharded):
    """transformers would take one, others the other."""
    save_file({"x": np.zeros(3)}, sharded / SINGLE_FILE)
    refused(sharded, SINGLE_FILE, INDEX_FILE, "stale")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(tmp_path, pickle):
    directory = write(tmp_path, TINY, tiny_params())
    (directory / SINGLE_FILE).rename(directory / pickle)
    refused(directory, pickle, "can run code")


def test_no_weights_are_refused(tmp_path):
    directory = write(tmp_path, TINY, tiny_params())
    (directory / SINGLE_FILE).unlink()
    refused(directory, SINGLE_FILE, INDEX_FILE)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_is_every_number_but_infinities_and_nan(dtype):
    info = ml_dtypes.finfo(dtype)
    finite = np.array([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal, 1.0], dtype)
    assert all_finite(finite) and all_finite(finite[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for at in range(len(finite)):
            spoiled = finite.copy()
            spoiled[at] = bad
            assert not all_finite(spoiled)


def test_parameters_that_claim_more_layers_than_can_be_listed_are_refused_at_once(tmp_path):
    directory = write(tmp_path, TINY, tiny_params())
    huge = dataclasses.replace(TINY, num_hidden_layers=10**12)
    shapes = abstract_params(huge)
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.3\."):
        read_params(directory, huge, shapes)


def test_a_snapshot_folder_of_the_hubs_cache_given_as_a_directory_is_a_directory(tmp_path):
    """Its weights are read from there, not looked up again under a name with a commit."""
    directory = write(tmp_path / "snapshots" / ("a" * 40), TINY, tiny_params())
    model = open_model(str(directory)).place(mesh_of(1, 1, 1))
    chex.assert_trees_all_equal(jax.device_get(model.read_params(model.training)), tiny_params())
