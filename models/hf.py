"""Hugging Face checkpoint directories <-> Flax parameters.

Reads and writes `config.json` and safetensors files. Nothing is unpickled and no code of a
checkpoint is run.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fr3e_jax.models.qwen2 import Params, Qwen2Config, abstract_params

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be read as a Qwen2 model; the message names file and cause."""


def read_config(directory: Path) -> Qwen2Config:
    """Read config.json.

    Raises:
      CheckpointError: no config.json, not a Qwen2 model, or a feature that is not supported.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no config.json; point at a Hugging Face directory")
    raw = read_json(file)

    def refuse(what: str) -> None:
        raise CheckpointError(f"{file}: {what} is not supported")

    if raw.get("model_type") != "qwen2":
        refuse(f"model_type {raw.get('model_type')!r} (supported: 'qwen2')")
    if raw.get("use_sliding_window"):
        refuse("use_sliding_window: true")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        refuse(f"rope scaling of type {rope_type!r}")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r}")
    if raw.get("auto_map"):
        refuse("auto_map (code in a checkpoint)")
    try:
        heads = int(raw["num_attention_heads"])
        config = Qwen2Config(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} has a field of the wrong type: {error}") from None
    for field, value in dataclasses.asdict(config).items():
        if field != "tie_word_embeddings" and value <= 0:
            raise CheckpointError(f"{file}: {field} is {value}, must be above 0")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      CheckpointError: it is none.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    return found


def config_json(config: Qwen2Config, eos: list[int], pad: int) -> dict[str, Any]:
    """What config.json says for `config`, in the form that transformers 4 and 5 both read."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


# Flax path of a layer's leaf -> (Hugging Face name within the layer, number of leading axes that are
# inputs of the matrix; Hugging Face stores [out, in], Flax [in, out], each with heads split out).
LAYER_NAMES = {
    "attention_norm.scale": ("input_layernorm.weight", 0),
    "mlp_norm.scale": ("post_attention_layernorm.weight", 0),
    "q": ("self_attn.q_proj.weight", 1),
    "k": ("self_attn.k_proj.weight", 1),
    "v": ("self_attn.v_proj.weight", 1),
    "q_bias": ("self_attn.q_proj.bias", 0),
    "k_bias": ("self_attn.k_proj.bias", 0),
    "v_bias": ("self_attn.v_proj.bias", 0),
    "o": ("self_attn.o_proj.weight", 2),
    "gate": ("mlp.gate_proj.weight", 1),
    "up": ("mlp.up_proj.weight", 1),
    "down": ("mlp.down_proj.weight", 1),
}
TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def to_flax(tensor: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
    """[out, in] (or a vector) -> `shape`, whose first `inputs` axes are the matrix's inputs."""
    return (tensor.T if inputs else tensor).reshape(shape)


def to_hf(array: np.ndarray, inputs: int) -> np.ndarray:
    """The inverse of `to_flax`: matrices [out, in], vectors flat."""
    if not inputs:
        return array.reshape(-1)
    return array.reshape(int(np.prod(array.shape[:inputs])), -1).T


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single file.

    Raises:
      CheckpointError: there are no safetensors files, or the index names a file that is not there.
    """
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map", {})
        files = {name: directory / file for name, file in weight_map.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise CheckpointError(f"{directory / INDEX_FILE} names {file.name}, which is absent")
        return files
    if not (directory / SINGLE_FILE).is_file():
        raise CheckpointError(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}")
    with open_safetensors(directory / SINGLE_FILE) as tensors:
        return dict.fromkeys(tensors.keys(), directory / SINGLE_FILE)


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file for reading as numpy arrays (bfloat16 through ml_dtypes)."""
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def read_params(directory: Path, config: Qwen2Config) -> Params:
    """Read the weights as float32, on the host.

    Returns:
      The parameters of `Qwen2(config)`.

    Raises:
      CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    files = tensor_files(directory)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    unread = set(files)

    def read(name: str, shape: tuple[int, ...], inputs: int) -> np.ndarray:
        if name not in files:
            raise CheckpointError(f"{directory} lacks tensor {name}")
        unread.discard(name)
        tensor = handles[files[name]].get_tensor(name)
        expected = to_hf(np.broadcast_to(np.float32(0), shape), inputs).shape
        if name in TOP_NAMES.values():
            expected = shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{files[name]}: {name} has shape {tensor.shape}, config.json asks for {expected}"
            )
        return to_flax(tensor.astype(np.float32), shape, inputs)

    params: dict[str, np.ndarray] = {}
    for name, abstract in traverse_util.flatten_dict(abstract_params(config), sep=".").items():
        shape = abstract.shape
        if name in TOP_NAMES:
            params[name] = read(TOP_NAMES[name], shape, 0)
            continue
        hf_name, inputs = LAYER_NAMES[name.removeprefix("layers.")]
        layers = [read(f"model.layers.{i}.{hf_name}", shape[1:], inputs) for i in range(shape[0])]
        params[name] = np.stack(layers)
    # A tied checkpoint may carry the shared matrix twice.
    unread -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unread:
        raise CheckpointError(f"{directory} holds unexpected tensors: {', '.join(sorted(unread))}")
    return traverse_util.unflatten_dict(params, sep=".")


def write_params(directory: Path, params: Params) -> None:
    """Write the weights as one float32 model.safetensors.

    Args:
      params: parameters of a `Qwen2`, addressable from this process.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in traverse_util.flatten_dict(params, sep=".").items():
        array = np.asarray(jax.device_get(leaf)).astype(np.float32)
        if name in TOP_NAMES:
            tensors[TOP_NAMES[name]] = np.ascontiguousarray(array)
            continue
        hf_name, inputs = LAYER_NAMES[name.removeprefix("layers.")]
        for i, layer in enumerate(array):
            tensors[f"model.layers.{i}.{hf_name}"] = np.ascontiguousarray(to_hf(layer, inputs))
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
