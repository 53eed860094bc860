"""Writing a trained model as a Hugging Face directory."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from tokenizers import Tokenizer

from fr3e_jax.config import ConfigError
from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import config_json, read_config, read_json
from fr3e_jax.pretrained.hub import DESCRIPTION_FILES
from fr3e_jax.pretrained.tokenizer import (
    GENERATION_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    begin_token,
    end_tokens,
    pad_token,
    read_tokenizer,
    read_tokenizer_config,
)
from fr3e_jax.pretrained.write_weights import MAX_FILE_BYTES, write_params

# They are written anew, or are older places of fields of tokenizer_config.json.
NOT_COPIED = {
    "config.json",
    GENERATION_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
}
# Fields of tokenizer_config.json: code, and those in which version 5 notes the machine that wrote it.
LEFT_OUT = {"auto_map", "backend", "is_local", "local_files_only", "name_or_path"}
# Classes that both versions know and read alike for Qwen's own tokenizer.json.
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
ADDED_TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def export_model(
    source: Path,
    out: Path,
    params: Params,
    dtype: Any = jnp.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a Hugging Face directory with `params`, and with the configuration and tokenizer of `source`.

    The directory appears whole or not at all. On several hosts every process calls this; the first one
    writes, and the others wait for it.

    Args:
      source: Hugging Face directory that the model came from.
      out: directory to write. Its old content is replaced, so callers name one of their own.
      params: trained parameters, with NamedShardings.
      dtype: of the weights, float32 or bfloat16.
      max_file_bytes: most bytes of tensors in one file.
    """
    writes = jax.process_index() == 0
    out = out.resolve()  # the target of a link is replaced, not the link
    temporary = temporary_beside(out)
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            copy_description(source, temporary, dtype)
        write_params(temporary, params, dtype, max_file_bytes)
    except BaseException:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if writes:
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    multihost_utils.sync_global_devices(f"exported {out}")


def check_out(out: Path) -> None:
    """Refuse a directory that `export_model` could not write or would have to empty.

    Raises:
      ConfigError: it holds files, is a mount point or the working directory, or its parent cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out {out} exists and is not an empty directory; choose another")
    if out.is_mount() or out.resolve() == Path.cwd():
        raise ConfigError(f"out {out} cannot be replaced as a whole; name a directory in it")
    if temporary_beside(out.resolve()).exists():
        raise ConfigError(f"{temporary_beside(out.resolve())} is in the way, perhaps of a kill; delete it")
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error}") from None
    if not os.access(out.resolve().parent, os.W_OK):
        raise ConfigError(f"out {out} cannot be written: {out.resolve().parent} is read-only")


def copy_description(source: Path, out: Path, dtype: Any) -> None:
    """Write everything but the weights, in the fields of transformers 4 and of 5.

    Configuration and generation_config.json are written anew. The tokenizer's files, chat template and
    licence are copied, except for fields that the two versions would read differently. Code that a source
    names is left out.
    """
    for pattern in DESCRIPTION_FILES:
        for file in filter(Path.is_file, sorted(source.glob(pattern))):
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, out / file.name)
    config, ends = read_config(source), end_tokens(source)
    pad, bos = (
        token if token is not None and token < config.vocab_size else None
        for token in (pad_token(source), begin_token(source))
    )
    write_json(out / "config.json", config_json(config, list(ends), pad, bos, jnp.dtype(dtype).name))
    write_json(out / GENERATION_FILE, generation_json(ends, pad))
    if (source / TOKENIZER_FILE).is_file():
        tokenizer = read_tokenizer(source)
        write_json(out / TOKENIZER_CONFIG, tokenizer_json(read_tokenizer_config(source), tokenizer))
        write_post_processor(out / TOKENIZER_FILE, tokenizer)


def generation_json(ends: tuple[int, ...], pad: int | None) -> dict[str, Any]:
    """The content of generation_config.json: end tokens, and greedy decoding as in evaluations.

    Penalties and filters of the source are left out, since the run did not use them.
    """
    eos = ends[0] if len(ends) == 1 else list(ends)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": eos}
    return settings if pad is None else settings | {"pad_token_id": pad}


def tokenizer_json(source_fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The content of tokenizer_config.json: the source's fields, and the run's where versions differ.

    Args:
      source_fields: fields of the source's file.
      tokenizer: of the run.
    """
    fields = {name: value for name, value in source_fields.items() if name not in LEFT_OUT}
    if fields.get("tokenizer_class") not in QWEN_CLASSES:
        # The name that both know for "tokenizer.json as it is", which is what the run reads.
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        # An absent one would be a new token, <|endoftext|>, where transformers takes a tokenizer for Qwen's.
        token = getattr(tokenizer, name)
        fields[name] = None if token is None else str(token)
    if isinstance(fields.get("extra_special_tokens"), list):  # version 4 takes a mapping alone
        fields.pop("extra_special_tokens")
    if tokenizer.extra_special_tokens:
        fields["additional_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
    fields["added_tokens_decoder"] = {
        str(number): {name: getattr(token, name) for name in ADDED_TOKEN_FIELDS}
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    # Version 4 adds token_type_ids, which no model here takes.
    fields["model_input_names"] = ["input_ids", "attention_mask"]
    fields["clean_up_tokenization_spaces"] = tokenizer.clean_up_tokenization_spaces
    return fields


def write_post_processor(file: Path, tokenizer: Any) -> None:
    """Write the special tokens that the run's tokenizer puts around a text into a copied tokenizer.json.

    Version 5 may take them from tokenizer_config.json (`add_bos_token`), where version 4 does not look.
    """
    if Tokenizer.from_file(str(file)).encode("").ids != tokenizer.backend_tokenizer.encode("").ids:
        post_processor = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
        write_json(file, read_json(file) | {"post_processor": post_processor})


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with indentation."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def temporary_beside(out: Path) -> Path:
    """The directory `OUT.tmp`, which is renamed to `out` when it is complete."""
    return out.with_name(out.name + ".tmp")
