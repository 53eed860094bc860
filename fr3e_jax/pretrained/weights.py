"""Reading weights from safetensors files onto the mesh, a piece at a time.

Every file's header is compared with the model before the first number is read. Then each process reads,
tensor by tensor, only the slices that its devices hold, converts them, and writes them into the sharded
arrays in place. Host memory beyond the parameters is bounded by a few blocks.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import Progress

from fr3e_jax.models.decoder import Params, abstract_params
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.models.hf_tensors import LAYOUTS
from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.parallel.blocks import block_rows, block_writer, zeros_maker
from fr3e_jax.pretrained.safetensors_files import check_tensors, find_tensors, open_safetensors
from fr3e_jax.progress import bars

BLOCK_BYTES = 64 * 2**20  # of one process, in the dtype on the devices


def read_params(directory: Path, config: Qwen2Config, shardings: Params, dtype: Any = jnp.float32) -> Params:
    """The parameters of a checkpoint, read into their place on the mesh.

    On several hosts every process calls this, and reads only what its devices hold.

    Args:
      directory: Hugging Face directory.
      config: of the directory, from `read_config`.
      shardings: NamedShardings of the parameters.
      dtype: of the parameters; files of float32, bfloat16 and float16 are converted.

    Returns:
      The parameters of `Qwen2(config)`, sharded.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of another shape or type, or holds numbers that are
        not finite, or a file is damaged. safetensors has no checksum: a flipped bit that leaves a finite
        number cannot be seen.
    """
    shapes = abstract_params(config)
    files = find_tensors(directory)
    check_tensors(directory, files, shapes)
    flat_shapes = traverse_util.flatten_dict(shapes, sep=".")
    flat_shardings = traverse_util.flatten_dict(shardings, sep=".")
    layers = config.num_hidden_layers
    total = sum(layers if path.startswith("layers.") else 1 for path in flat_shapes)
    params = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"reading {directory.name}", total=total)
        for path, abstract in flat_shapes.items():
            source = Source(files, path, abstract.shape, dtype)
            params[path] = read_leaf(source, flat_shardings[path])
            progress.advance(bar, layers if path.startswith("layers.") else 1)
    return traverse_util.unflatten_dict(params, sep=".")


def progress_bar() -> Progress:
    """A progress bar over tensors on stderr, shown by the first process if stderr is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and jax.process_index() == 0
    return bars(console, transient=True, disable=not shown)


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter to read.

    files: the file of each tensor, by its name. path: of the parameter, as in `LAYOUTS`. shape: of the whole
    parameter, all its layers. dtype: to convert it to.
    """

    files: Mapping[str, Path]
    path: str
    shape: tuple[int, ...]
    dtype: Any

    def read(self, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter, all its layers."""
        layout = LAYOUTS[self.path]
        if not self.path.startswith("layers."):
            return self.read_tensor(layout.name, self.shape, part)
        layers = range(part[0].start, part[0].stop)
        return np.stack([self.read_tensor(layout.name.format(i), self.shape[1:], part[1:]) for i in layers])

    def read_tensor(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the axes of our parameter.

        Args:
          name: of the tensor.
          shape: of the parameter, or of one layer of it.
          part: slices of that shape.

        Raises:
          CheckpointError: it holds numbers that are not finite.
        """
        layout, file = LAYOUTS[self.path], self.files[name]
        # Opened anew for every piece: the pages of an open file count as this process's memory.
        with open_safetensors(file) as tensors:
            piece = tensors.get_slice(name)[layout.tensor_slices(shape, part)]
        if not all_finite(piece):
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite")
        size = tuple(i.stop - i.start for i in part)
        return layout.to_ours(piece, size).astype(self.dtype)


def read_leaf(source: Source, sharding: NamedSharding) -> Array:
    """One parameter, all its layers, read block by block."""
    shape, dtype = source.shape, jnp.dtype(source.dtype)
    leaf = zeros_maker(shape, dtype, sharding)()
    device_shape = sharding.shard_shape(shape)
    write = block_writer(sharding.mesh, sharding.spec)
    for start, rows in blocks(device_shape, dtype):
        reader = BlockReader(source, device_rows=device_shape[0], start=start, rows=rows)
        parts = shape[0] // device_shape[0]
        block = jax.make_array_from_callback((rows * parts, *shape[1:]), sharding, reader)
        # Waited for, so that no more than one block is on its way.
        leaf = jax.block_until_ready(write(leaf, block, start))
    return leaf


def blocks(device_shape: tuple[int, ...], dtype: Any) -> Iterator[tuple[int, int]]:
    """Iterate over the blocks that a device's rows are moved in: (first row, number of rows).

    All have one size; where it does not divide the rows, the last block overlaps the one before it.
    """
    device_rows = device_shape[0]
    row_bytes = math.prod(device_shape[1:]) * jnp.dtype(dtype).itemsize * jax.local_device_count()
    rows = min(max(BLOCK_BYTES // row_bytes, 1), device_rows)
    for start in range(0, device_rows, rows):
        yield min(start, device_rows - rows), rows


@dataclasses.dataclass(frozen=True)
class BlockReader:
    """Reads a device's part of a block, once for all devices that hold the same part.

    device_rows: rows of a device in the whole array. start: first of these that the block holds. rows: of a
    device in the block.
    """

    source: Source
    device_rows: int
    start: int
    rows: int
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = dataclasses.field(default_factory=dict)

    def __call__(self, index: Any) -> np.ndarray:
        """The numbers at `index`, slices of the block, in the dtype and the axes of our parameter."""
        first = block_rows(index[0], self.start, self.rows, self.device_rows)
        shape = self.source.shape
        others = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index[1:], shape[1:], strict=True))
        part = (first, *others)
        key = tuple((i.start, i.stop) for i in part)
        if key not in self.parts:
            self.parts[key] = self.source.read(part)
        return self.parts[key]


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of an array is infinite or nan, that is, no exponent has all bits set."""
    if not array.size:
        return True
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    sign = unsigned.type(1 << (8 * array.dtype.itemsize - 1))
    return bool((array.view(unsigned) & ~sign).max() < infinity)
