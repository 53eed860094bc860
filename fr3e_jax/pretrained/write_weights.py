"""Writing weights from the mesh to safetensors files, by one process, which holds one file at a time."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from huggingface_hub import split_state_dict_into_shards_factory
from jax import Array
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf_tensors import LAYOUTS, Tensor, tensors_of
from fr3e_jax.parallel.blocks import block_reader, block_rows
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.pretrained.safetensors_files import INDEX_FILE
from fr3e_jax.pretrained.weights import blocks, progress_bar

MAX_FILE_BYTES = 5 * 10**9  # what the hub recommends


def write_params(
    directory: Path, params: Params, dtype: Any = jnp.float32, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write parameters as safetensors, in several files with an index if they are large.

    On several hosts every process calls this; the first one writes.

    Args:
      directory: exists on the first process.
      params: parameters of a `Qwen2`, with NamedShardings.
      dtype: of the weights, float32 or bfloat16.
      max_file_bytes: most bytes of tensors in a file.
    """
    flat = traverse_util.flatten_dict(params, sep=".")

    def array_of(tensor: Tensor) -> np.ndarray:
        return LAYOUTS[tensor.path].to_tensor(to_host(flat[tensor.path], tensor.layer, dtype))

    write_tensors(directory, list(tensors_of(params)), array_of, dtype, max_file_bytes)


def write_tensors(
    directory: Path,
    tensors: Sequence[Tensor],
    array_of: Callable[[Tensor], np.ndarray],
    dtype: Any,
    max_file_bytes: int,
) -> None:
    """Write tensors in as many files as they need.

    Args:
      directory: exists on the first process, the only one that writes.
      tensors: in the order in which they are written.
      array_of: returns the numbers of a tensor; every process calls it when the tensor's turn comes.
      dtype: of the numbers.
      max_file_bytes: most bytes of tensors in a file.
    """
    writes = jax.process_index() == 0
    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: math.prod(tensor.shape) * jnp.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    with progress_bar() as progress:
        bar = progress.add_task("writing weights", total=len(tensors))
        for file, names in split.filename_to_tensors.items():
            arrays = {}
            for name in names:
                array = array_of(by_name[name])
                if writes:
                    arrays[name] = np.ascontiguousarray(array)
                progress.advance(bar)
            if writes:
                save_file(arrays, directory / file, metadata={"format": "pt"})
                (directory / file).chmod(0o644)  # others read models too
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def to_host(leaf: Array, layer: int | None, dtype: Any) -> np.ndarray:
    """A parameter, or one layer of it, as an array on the host of every process."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding), sharding
    device_shape = sharding.shard_shape(leaf.shape)
    if layer is not None:
        read = block_reader(sharding.mesh, sharding.spec, 1, jnp.dtype(dtype))
        return np.asarray(gather(read(leaf, layer))[0])
    host = np.empty(leaf.shape, dtype)
    for start, rows in blocks(device_shape, dtype):
        read = block_reader(sharding.mesh, sharding.spec, rows, jnp.dtype(dtype))
        block = gather(read(leaf, start))
        for first in range(0, len(block), rows):
            into = block_rows(slice(first, first + rows), start, rows, device_shape[0])
            host[into] = block[first : first + rows]
    return host
