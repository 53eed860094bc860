"""Writing a trained model as a Hugging Face directory."""

import json
import shutil
from pathlib import Path

from fr3e_jax.models.hf import write_params
from fr3e_jax.models.qwen2 import Params

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def export_model(source: Path, out: Path, params: Params) -> None:
    """Write `params` as float32 beside the configuration and tokenizer of `source`.

    The directory appears whole or not at all.

    Args:
      source: Hugging Face directory that the run started from.
      out: directory to write; what lies there is replaced, so callers name one of their own.
      params: trained parameters.
    """
    temporary = temporary_beside(out)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS and "safetensors" not in file.name:
            shutil.copyfile(file, temporary / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    config["torch_dtype"] = "float32"
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_params(temporary, params)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def temporary_beside(out: Path) -> Path:
    """A fresh directory `OUT.tmp`, that becomes `out` when it is complete."""
    temporary = out.absolute().with_name(out.absolute().name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary
