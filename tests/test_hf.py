"""config.json: what is read, what is refused by name, and what is written."""

import dataclasses
import json

import numpy as np
import pytest
from support import TINY

from fr3e_jax.models.decoder import abstract_params
from fr3e_jax.models.hf import CheckpointError, config_json, read_config
from fr3e_jax.models.hf_tensors import LAYOUTS, tensors_of
from fr3e_jax.models.rope import Yarn, attention_factor

YARN = Yarn(4.0, 64, attention_factor(4.0))
KIN = {
    "qwen2": TINY,
    "qwen2 yarn": dataclasses.replace(TINY, yarn=YARN),
    "qwen3": dataclasses.replace(TINY, qkv_bias=False, qk_norm=True, tie_word_embeddings=False),
    "llama": dataclasses.replace(TINY, qkv_bias=False),
}


@pytest.fixture
def config_file(tmp_path):
    """Writes TINY's config.json with changes; a change to `...` takes the field out.

    Where the rotation is changed, in the words of transformers 4 alone or of 5 alone.
    """

    def write(config=TINY, **changes):
        if changes.keys() & {"rope_theta", "rope_scaling"}:
            changes = {"rope_parameters": ...} | changes
        elif "rope_parameters" in changes:
            changes |= {"rope_theta": ...}
        raw = config_json(config, [1], 0) | changes
        raw = {name: value for name, value in raw.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return write


@pytest.mark.parametrize("kin", KIN)
@pytest.mark.parametrize(
    "words", [("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")], ids=["4", "5"]
)
def test_a_written_config_says_all_in_the_words_of_transformers_4_and_in_those_of_5(tmp_path, kin, words):
    """Without the words of the other version, the same is read."""
    raw = config_json(KIN[kin], [1, 5], 0, 3, "bfloat16")
    both = {"rope_theta", "rope_scaling", "torch_dtype", "rope_parameters", "dtype"}
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in both - {*words}})
    )
    assert read_config(tmp_path) == KIN[kin]
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert (raw["eos_token_id"], raw["pad_token_id"], raw["bos_token_id"]) == ([1, 5], 0, 3)


@pytest.mark.parametrize("kin", KIN)
def test_a_written_config_is_read_back(config_file, kin):
    assert read_config(config_file(KIN[kin])) == KIN[kin]


# As the hub has them, the fields that matter here.
QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_a_config_of_the_hub_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B))
    config = read_config(tmp_path)
    assert (config.head_dim, config.rope_theta, config.tie_word_embeddings) == (64, 1e6, True)
    assert (config.qkv_bias, config.qk_norm, config.yarn, config.context) == (True, False, None, 32768)


def test_yarn_as_qwens_documentation_sets_it(tmp_path):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B | {"rope_scaling": scaling}))
    config = read_config(tmp_path)
    assert config.context == 131072
    assert config.yarn == Yarn(4.0, 32768, 0.1 * np.log(4.0) + 1)


def test_transformers_5_files_are_read_as_4s_are(config_file):
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "dtype": "float32"}
    assert read_config(config_file(rope_theta=..., rope_scaling=..., **new)).rope_theta == 777.0


def test_absent_fields_are_what_transformers_takes_them_for(config_file):
    optional = dict.fromkeys(("head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta"), ...)
    config = read_config(config_file(**optional))
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (8, 1e-6, False)
    llama = read_config(config_file(KIN["llama"], num_key_value_heads=..., head_dim=None))
    assert (llama.num_key_value_heads, llama.head_dim) == (4, 8)


@pytest.mark.parametrize(
    ("kin", "change", "message"),
    [
        ("qwen2", {"model_type": "mistral"}, "model_type 'mistral'.*supported: qwen2, qwen3, llama"),
        ("qwen2", {"model_type": ["qwen2"]}, "model_type"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear'.*default, yarn"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "llama3"),
        ("qwen2", {"rope_scaling": "yarn"}, "rope_scaling"),
        (  # as transformers 5 writes a file, with what Qwen's documentation says to add to it
            "qwen2",
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
            "rope_scaling.*and rope_parameters.*keep one",
        ),
        (  # as transformers 4 saves what 5 wrote
            "qwen2",
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0 and.*1000000.0.*make them the same",
        ),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn"}}, "lacks 'factor'"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "warp": 1}}, "not supported: warp"),
        ("qwen2", {"rope_scaling": {"factor": 4.0}}, "'default'.*not supported: factor"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        ("llama", {"attention_bias": True}, "attention_bias true"),
        ("qwen3", {"attention_bias": True}, "attention_bias true"),
        ("llama", {"mlp_bias": True}, "mlp_bias true"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ("qwen2", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*code in a checkpoint"),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention_config"),
        ("qwen2", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("qwen2", {"num_attention_heads": 3}, "num_attention_heads 3 does not divide"),
        ("qwen2", {"num_key_value_heads": ...}, "lacks 'num_key_value_heads'"),
        ("qwen3", {"head_dim": ...}, "lacks 'head_dim'"),
        ("qwen2", {"head_dim": 7}, "head_dim is 7"),
        ("qwen2", {"vocab_size": "many"}, "vocab_size is 'many'.*wrong type"),
        ("qwen2", {"hidden_size": 32.5}, "hidden_size is 32.5.*wrong type"),
        ("qwen2", {"num_hidden_layers": True}, "num_hidden_layers is True.*wrong type"),
        ("qwen2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1.*wrong type"),
        ("qwen2", {"rope_theta": float("nan")}, "rope_theta is nan"),
        ("qwen2", {"rope_theta": float("inf")}, "rope_theta is inf"),
        ("qwen2", {"rope_theta": 0.5}, "rope_theta is 0.5"),
        ("qwen2", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ("qwen2", {"hidden_size": 10**30}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config_file, kin, change, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_config(config_file(KIN[kin], **change))
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b"null"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read_config(tmp_path)


@pytest.mark.parametrize("kin", KIN)
def test_a_part_of_a_parameter_is_the_same_part_of_its_tensor(kin):
    """For every parameter, and a part cut on each of its axes but head_dim: reading the part equals
    cutting the whole."""
    shapes = abstract_params(KIN[kin])
    whole = {tensor.path: tensor for tensor in tensors_of(shapes)}
    rng = np.random.default_rng(0)
    for path, tensor in whole.items():
        layout = LAYOUTS[path]
        array = rng.standard_normal(tensor.shape)
        shape = leaf_shape(shapes, path)
        ours = layout.to_ours(array, shape)
        np.testing.assert_array_equal(layout.to_tensor(ours), array)
        for axis, size in enumerate(shape):
            if any(axis in group[1:] for group in layout.groups):
                continue
            index = tuple(slice(size // 4, size // 2) if a == axis else slice(0, n)
                          for a, n in enumerate(shape))  # fmt: skip
            piece = array[layout.tensor_slices(shape, index)]
            size_of_part = tuple(i.stop - i.start for i in index)
            np.testing.assert_array_equal(layout.to_ours(piece, size_of_part), ours[index])


def leaf_shape(shapes, path):
    for key in path.split("."):
        shapes = shapes[key]
    return shapes.shape[1:] if path.startswith("layers.") else shapes.shape
