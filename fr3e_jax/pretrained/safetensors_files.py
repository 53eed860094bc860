"""The safetensors files of a checkpoint directory: finding them, and comparing their headers with a model."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import CheckpointError, read_json
from fr3e_jax.models.hf_tensors import LAYOUTS, Tensor, tensors_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COMPARED_BYTES = 64 * 2**20  # of two matrices that are compared, in float32, held at a time


def find_tensors(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name, from the index or from the single file.

    Raises:
      CheckpointError: there are no safetensors files or two sets of them, or files and index disagree.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}; delete the one that is stale"
        )
    if single.is_file():
        with open_safetensors(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
        why = (
            f"; {', '.join(pickles)} is not read, since a pickle can run code: convert it to safetensors"
            if pickles
            else ""
        )
        raise CheckpointError(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}{why}")

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not map tensors to files")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file of its directory")
        if not os.path.isfile(directory / name):  # Path's raises on names that no file can have
            raise CheckpointError(f"{index} names {name[:100]}, which is absent")
    for name in sorted(set(weight_map.values())):
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        with open_safetensors(directory / name) as tensors:
            odd = sorted(listed ^ set(tensors.keys()))
        if odd:
            raise CheckpointError(f"{index} and {name} disagree on which tensors lie there: {shortened(odd)}")
    return {tensor: directory / name for tensor, name in weight_map.items()}


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading as numpy arrays (bfloat16 through ml_dtypes)."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cannot be read: {error}") from None


def check_tensors(directory: Path, files: Mapping[str, Path], params: Params) -> None:
    """Compare the headers of the files with the model.

    Args:
      directory: of the checkpoint.
      files: tensor name -> file.
      params: the model's parameters, or their shapes.

    Raises:
      CheckpointError: a tensor is missing or unexpected, or has another shape or a type that weights do not
        have.
    """
    declared = declared_type(directory)
    unread = set(files)
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in tensors_of(params):
        if tensor.name not in files:
            raise CheckpointError(f"{directory} lacks tensor {tensor.name}")
        unread.discard(tensor.name)
        by_file.setdefault(files[tensor.name], []).append(tensor)
    twice = "lm_head" not in params and LAYOUTS["lm_head"].name in unread
    if twice:
        unread.discard(LAYOUTS["lm_head"].name)
    if unread:
        raise CheckpointError(f"{directory} holds unexpected tensors: {shortened(sorted(unread))}")
    for file, expected in by_file.items():
        with open_safetensors(file) as tensors:
            for tensor in expected:
                header = tensors.get_slice(tensor.name)
                shape, kind = tuple(header.get_shape()), header.get_dtype()
                if shape != tensor.shape:
                    raise CheckpointError(
                        f"{file}: {tensor.name} has shape {shape}, config.json asks for {tensor.shape}"
                    )
                if kind not in FLOAT_TYPES:
                    raise CheckpointError(
                        f"{file}: {tensor.name} has type {kind}; weights are {', '.join(FLOAT_TYPES)}"
                    )
                # Two types of 16 bits cannot be told apart by their bytes: a header that contradicts
                # config.json would be read as other numbers.
                if (FLOAT_TYPES[kind], declared) in (("bfloat16", "float16"), ("float16", "bfloat16")):
                    raise CheckpointError(
                        f"{file}: {tensor.name} has type {kind}, config.json says {declared}; correct the "
                        "one that is wrong"
                    )
    if twice:
        check_tied(files)


def check_tied(files: Mapping[str, Path]) -> None:
    """Refuse a tied checkpoint that has two different matrices for embedding and LM head.

    The same matrix twice is allowed. Each process reads both.

    Raises:
      CheckpointError: they differ.
    """
    embedding, lm_head = LAYOUTS["embedding"].name, LAYOUTS["lm_head"].name
    with open_safetensors(files[embedding]) as one, open_safetensors(files[lm_head]) as two:
        first, second = one.get_slice(embedding), two.get_slice(lm_head)
        shape = first.get_shape()
        rows = max(COMPARED_BYTES // (4 * math.prod(shape[1:])), 1)
        pieces = [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]
        if shape != second.get_shape() or not all(np.array_equal(first[i], second[i]) for i in pieces):
            raise CheckpointError(
                f"{files[lm_head]}: {lm_head} differs from {embedding}, and config.json says "
                "tie_word_embeddings: one of the two is wrong"
            )


def declared_type(directory: Path) -> Any:
    """The dtype of the weights that config.json declares, or None."""
    raw = read_json(directory / "config.json")
    return raw.get("dtype", raw.get("torch_dtype"))


def shortened(names: list[str], most: int = 4) -> str:
    """The first names of a list in one text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
