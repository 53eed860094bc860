"""Writing a trained model as a Hugging Face directory."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from fr3e_jax.config import ConfigError
from fr3e_jax.host.hub import DESCRIPTION_FILES
from fr3e_jax.host.text import GENERATION_FILE, end_tokens, pad_token
from fr3e_jax.host.weights import MAX_FILE_BYTES, write_params
from fr3e_jax.models.hf import read_json
from fr3e_jax.models.qwen2 import Params


def export_model(
    source: Path,
    out: Path,
    params: Params,
    dtype: Any = jnp.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `params` beside the configuration and tokenizer of `source`.

    The directory appears whole or not at all. On several hosts every process calls this; the first one
    writes, and the others wait for it.

    Args:
      source: Hugging Face directory that the model came from.
      out: directory to write; what lies there is replaced, so callers name one of their own.
      params: trained parameters, with NamedShardings.
      dtype: type of the weights, float32 or bfloat16.
      max_file_bytes: most bytes of tensors in one file.
    """
    writes = jax.process_index() == 0
    out = out.resolve()  # through a link, to what is replaced
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
    """Refuse a directory that `export_model` could not write, or would have to empty.

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
    """Everything but the weights: configuration, tokenizer, chat template, licence."""
    for pattern in DESCRIPTION_FILES:
        for file in filter(Path.is_file, sorted(source.glob(pattern))):
            shutil.copyfile(file, out / file.name)
    config = read_json(source / "config.json")
    config.pop("dtype", None)
    config["torch_dtype"] = jnp.dtype(dtype).name  # the name that transformers 4 and 5 both read
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (out / GENERATION_FILE).exists():
        ends = end_tokens(source)
        generation = {"eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
        if (pad := pad_token(source)) is not None:
            generation["pad_token_id"] = pad
        (out / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")


def temporary_beside(out: Path) -> Path:
    """The directory `OUT.tmp`, that becomes `out` when it is complete."""
    return out.with_name(out.name + ".tmp")
