"""The shapes of the family: exact parameter counts, without memory."""

import re

import jax
import pytest
from environment import REPOSITORY

from fr3e_jax.models.decoder import abstract_params
from fr3e_jax.models.hf_tensors import tensors_of
from fr3e_jax.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_exactly_the_parameters_that_the_hub_counts(name):
    """By eval_shape, as the tensors of a checkpoint, and by the formula of the architecture."""
    preset = PRESETS[name]
    c = preset.config
    shapes = abstract_params(c)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == preset.parameters
    counted = 0
    for tensor in tensors_of(shapes):
        size = 1
        for dimension in tensor.shape:
            size *= dimension
        counted += size
    assert counted == preset.parameters
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (q + 2 * kv) + q * c.hidden_size
    attention += (q + 2 * kv if c.qkv_bias else 0) + (2 * c.head_dim if c.qk_norm else 0)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    assert c.num_hidden_layers * layer + tables + c.hidden_size == preset.parameters


def test_the_family_is_whole():
    """Every size of Qwen2.5, in the variants that were released of it."""
    names = {name for preset in PRESETS.values() for name in preset.checkpoints}
    sizes = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    expected = {f"Qwen/Qwen2.5-{size}{kind}" for size in sizes for kind in ("", "-Instruct")}
    expected |= {f"Qwen/Qwen2.5-Coder-{size}{kind}" for size in sizes[:6] for kind in ("", "-Instruct")}
    expected |= {
        f"Qwen/Qwen2.5-Math-{size}{kind}" for size in ("1.5B", "7B", "72B") for kind in ("", "-Instruct")
    }
    assert {name for name in names if "Qwen2.5" in name} == expected


def test_the_page_of_models_says_the_same_counts():
    text = (REPOSITORY / "models" / "README.md").read_text()
    counts = {int(number.replace(",", "")) for number in re.findall(r"\b\d{1,3}(?:,\d{3}){2,3}\b", text)}
    assert {preset.parameters for preset in PRESETS.values()} <= counts
