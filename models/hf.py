"""config.json of Hugging Face checkpoints, read and written.

Nothing is unpickled, and no code of a checkpoint is run.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.models.rope import Yarn, attention_factor


class Kind(NamedTuple):
    """A model_type of config.json: two flags of the decoder, and the name of its class in transformers."""

    qkv_bias: bool
    qk_norm: bool
    architecture: str


KINDS = {
    "qwen2": Kind(True, False, "Qwen2ForCausalLM"),
    "qwen3": Kind(False, True, "Qwen3ForCausalLM"),
    "llama": Kind(False, False, "LlamaForCausalLM"),
}

# Fields of config.json that would change the computation in a way that this decoder does not have, unless
# they hold one of these values.
INERT: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),  # code in a checkpoint
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None, {}),
    "dual_chunk_attention_config": (None, {}),
}

PLAIN_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_FIELDS = {
    "default": PLAIN_ROPE_FIELDS,
    "yarn": PLAIN_ROPE_FIELDS
    | {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read; the message names file and cause."""


def read_config(directory: Path) -> Qwen2Config:
    """The architecture that config.json of a directory describes.

    Raises:
      CheckpointError: there is no config.json, it has an architecture or a feature that is not supported, or
        a field is missing, of the wrong type or out of range.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no config.json; point at a Hugging Face directory")
    raw = read_json(file)
    refuse_unsupported(raw, file)
    model_type = raw["model_type"]
    heads = number_of(raw, file, "num_attention_heads", int)
    # Where a field is absent, transformers derives these or has these defaults.
    kv_default = heads if model_type == "llama" else None
    hidden_size = number_of(raw, file, "hidden_size", int)
    derived_head_dim = hidden_size // heads if model_type != "qwen3" else None
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    config = Qwen2Config(
        vocab_size=number_of(raw, file, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=number_of(raw, file, "intermediate_size", int),
        num_hidden_layers=number_of(raw, file, "num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=number_of(raw, file, "num_key_value_heads", int, kv_default),
        head_dim=number_of(raw, file, "head_dim", int, derived_head_dim),
        max_position_embeddings=number_of(raw, file, "max_position_embeddings", int),
        rope_theta=number_of({**raw, **rope}, file, "rope_theta", float, 10_000.0),
        rms_norm_eps=number_of(raw, file, "rms_norm_eps", float, 1e-6),
        tie_word_embeddings=flag(raw, file, "tie_word_embeddings", False),
        qkv_bias=KINDS[model_type].qkv_bias,
        qk_norm=KINDS[model_type].qk_norm,
        yarn=read_yarn(rope, raw, file) if rope_type(rope) == "yarn" else None,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{file}: num_attention_heads {heads} does not divide by num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{file}: head_dim is {config.head_dim}; it is rotated in pairs, so it is even")
    if config.rope_theta <= 1:
        raise CheckpointError(f"{file}: rope_theta is {config.rope_theta}, must be above 1")
    return config


def refuse_unsupported(raw: dict[str, Any], file: Path) -> None:
    """Refuse fields that ask for a computation which this decoder does not have.

    Raises:
      CheckpointError: there is one; the message names it.
    """
    if raw.get("model_type") not in list(KINDS):
        raise CheckpointError(
            f"{file}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(KINDS)}"
        )
    for name, inert in INERT.items():
        if name == "attention_bias" and raw["model_type"] == "qwen2":
            continue  # no field of Qwen2, whose query, key and value have biases in any case
        if name in raw and raw[name] not in inert:
            what = " (code in a checkpoint)" if name == "auto_map" else ""
            raise CheckpointError(f"{file}: {name} {json.dumps(raw[name])[:80]}{what} is not supported")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(f"{file}: layer_types other than full_attention are not supported")
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{file}: {name} is {rope!r}, must be an object or null")
        if rope_type(rope) not in list(ROPE_FIELDS):
            raise CheckpointError(
                f"{file}: {name} of type {rope_type(rope)!r} is not supported; supported: "
                f"{', '.join(ROPE_FIELDS)}"
            )
        if rope.get("partial_rotary_factor") not in INERT["partial_rotary_factor"]:
            raise CheckpointError(f"{file}: {name} with a partial_rotary_factor is not supported")
        if unknown := set(rope) - ROPE_FIELDS[rope_type(rope)]:
            raise CheckpointError(
                f"{file}: {name} of type {rope_type(rope)!r} has fields that are not supported: "
                f"{', '.join(sorted(unknown))}"
            )
    refuse_two_ropes(raw, file)


def refuse_two_ropes(raw: dict[str, Any], file: Path) -> None:
    """Refuse a file whose fields for transformers 4 and for 5 describe different rotary embeddings.

    Raises:
      CheckpointError: they differ.
    """
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}

    def scaling(rope: dict[str, Any]) -> dict[str, Any]:
        plain = {"type", "rope_theta"}
        return {k: v for k, v in rope.items() if k not in plain} | {"rope_type": rope_type(rope)}

    if old and new and scaling(old) != scaling(new):
        raise CheckpointError(
            f"{file}: rope_scaling {json.dumps(old)[:80]} and rope_parameters {json.dumps(new)[:80]} are not "
            "the same; keep one of them (rope_parameters is the newer name, and holds rope_theta too)"
        )
    thetas = [rope["rope_theta"] for rope in (raw, old, new) if rope.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise CheckpointError(
            f"{file}: rope_theta is {thetas[0]!r} and, in rope_scaling or rope_parameters, {thetas[-1]!r}; "
            "one version of transformers reads the one and another the other, so make them the same"
        )


def rope_type(rope: dict[str, Any]) -> Any:
    """The type that a rope_scaling object names; older files call the field `type`."""
    return rope.get("rope_type", rope.get("type", "default"))


def read_yarn(rope: dict[str, Any], raw: dict[str, Any], file: Path) -> Yarn:
    """The YaRN settings of a rope_scaling object, with the defaults of transformers.

    Args:
      rope: the object. raw: config.json. file: its path, for messages.
    """
    fallback = raw.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    original = number_of(rope, file, "original_max_position_embeddings", int, fallback)
    factor = number_of(rope, file, "factor", float)
    mscale, mscale_all_dim = (
        number_of(rope, file, name, float, 0.0, least=0.0) for name in ("mscale", "mscale_all_dim")
    )
    recommended = attention_factor(factor)
    if mscale and mscale_all_dim:
        recommended = attention_factor(factor, mscale) / attention_factor(factor, mscale_all_dim)
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number_of(rope, file, "attention_factor", float, recommended),
        beta_fast=number_of(rope, file, "beta_fast", float, 32.0),
        beta_slow=number_of(rope, file, "beta_slow", float, 1.0),
        truncate=flag(rope, file, "truncate", True),
    )
    if yarn.factor < 1 or yarn.beta_fast <= yarn.beta_slow:
        raise CheckpointError(
            f"{file}: rope_scaling has factor {yarn.factor}, beta_fast {yarn.beta_fast}, beta_slow "
            f"{yarn.beta_slow}; factor must be at least 1 and beta_fast above beta_slow"
        )
    return yarn


def number_of(
    raw: dict[str, Any], file: Path, name: str, kind: type, default: Any = None, least: float | None = None
) -> Any:
    """A field that is a finite number above 0, or at least `least`; null counts as absent.

    Raises:
      CheckpointError: it is not such a number, or it is absent and there is no default.
    """
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{file} lacks {name!r}")
    types = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, types):
        raise CheckpointError(f"{file}: {name} is {value!r}, which has the wrong type; it is {kind.__name__}")
    in_range = value > 0 if least is None else value >= least
    if not (in_range and value < 2**53 and math.isfinite(value)):
        bound = "above 0" if least is None else f"of at least {least:g}"
        raise CheckpointError(f"{file}: {name} is {value}, must be a finite number {bound}")
    return kind(value)


def flag(raw: dict[str, Any], file: Path, name: str, default: bool) -> bool:
    """A field that is true or false; null counts as absent.

    Raises:
      CheckpointError: it is neither.
    """
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"{file}: {name} is {value!r}, which has the wrong type; it is true or false")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    return value


def config_json(
    config: Qwen2Config, eos: list[int], pad: int | None, bos: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """The content of config.json for an architecture, in the fields of transformers 4 and of 5.

    Version 4 knows `rope_theta`, `rope_scaling` and `torch_dtype`, version 5 `rope_parameters` and `dtype`.

    Args:
      config: of the decoder.
      eos: ids of the tokens that end an answer.
      pad, bos: ids of the tokens that pad and begin a text, or None.
      dtype: name of the weights' dtype.
    """
    flags = (config.qkv_bias, config.qk_norm)
    model_type = next(name for name, kind in KINDS.items() if (kind.qkv_bias, kind.qk_norm) == flags)
    rope_scaling = None
    if config.yarn is not None:
        rope_scaling = {"rope_type": "yarn", **dataclasses.asdict(config.yarn)}
    rope = rope_scaling or {"rope_type": "default"}
    return {
        "architectures": [KINDS[model_type].architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({} if config.qkv_bias else {"attention_bias": False}),
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "rope_scaling": rope_scaling,
        "bos_token_id": bos,
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
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
