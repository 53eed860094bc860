"""Weights between safetensors files and the mesh, a piece at a time.

Reading: every file's header is checked against the model before the first number is read. Then each
process reads, tensor by tensor, only the slices that its devices hold, converts them, and writes them into
the sharded arrays in place. Writing goes the other way, with one process that writes. Host memory beyond
the parameters is bounded by a few blocks for reading, and by one file for writing.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from huggingface_hub import split_state_dict_into_shards_factory
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fr3e_jax.models.decoder import Params, abstract_params
from fr3e_jax.models.hf import LAYOUTS, CheckpointError, Tensor, read_json, tensors_of
from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.parallel.blocks import block_reader, block_rows, block_writer, zeros_maker
from fr3e_jax.progress import bars

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BLOCK_BYTES = 64 * 2**20  # of one process, in the type on the devices
MAX_FILE_BYTES = 5 * 10**9  # what the hub recommends


def find_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single file.

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
    """Compare what the files' headers say with the model.

    Args:
      directory: of the checkpoint.
      files: tensor name -> file.
      params: the model's parameters, or their shapes.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of another shape, or of a type that is no weight's.
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
                found = tensors.get_slice(tensor.name)
                shape, kind = tuple(found.get_shape()), found.get_dtype()
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
    """A tied checkpoint may carry the shared matrix twice, but not two matrices; each process reads both."""
    embedding, lm_head = LAYOUTS["embedding"].name, LAYOUTS["lm_head"].name
    with open_safetensors(files[embedding]) as one, open_safetensors(files[lm_head]) as two:
        first, second = one.get_slice(embedding), two.get_slice(lm_head)
        shape = first.get_shape()
        rows = max(BLOCK_BYTES // (4 * math.prod(shape[1:])), 1)
        pieces = [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]
        if shape != second.get_shape() or not all(np.array_equal(first[i], second[i]) for i in pieces):
            raise CheckpointError(
                f"{files[lm_head]}: {lm_head} differs from {embedding}, and config.json says "
                "tie_word_embeddings: one of the two is wrong"
            )


def declared_type(directory: Path) -> Any:
    """The type of the weights that config.json declares, or None."""
    raw = read_json(directory / "config.json")
    return raw.get("dtype", raw.get("torch_dtype"))


def shortened(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_params(directory: Path, config: Qwen2Config, shardings: Params, dtype: Any = jnp.float32) -> Params:
    """Read the weights into their place on the mesh.

    On several hosts every process calls this, and reads only what its devices hold.

    Args:
      directory: Hugging Face directory.
      config: what `read_config` said of it.
      shardings: NamedShardings of the parameters.
      dtype: type of the parameters; files of float32, bfloat16 and float16 are converted.

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
            params[path] = read_leaf(files, path, abstract.shape, flat_shardings[path], dtype)
            progress.advance(bar, layers if path.startswith("layers.") else 1)
    return traverse_util.unflatten_dict(params, sep=".")


def progress_bar() -> Progress:
    """A bar over tensors on stderr, of the first process, where a person watches."""
    console = Console(stderr=True)
    shown = console.is_terminal and jax.process_index() == 0
    return bars(console, transient=True, disable=not shown)


def read_leaf(
    files: Mapping[str, Path], path: str, shape: tuple[int, ...], sharding: NamedSharding, dtype: Any
) -> Array:
    """Read one parameter, all its layers, block by block."""
    leaf = zeros_maker(shape, jnp.dtype(dtype), sharding)()
    device_shape = sharding.shard_shape(shape)
    write = block_writer(sharding.mesh, sharding.spec)
    for start, rows in blocks(device_shape, dtype):
        reader = BlockReader(files, path, shape, device_shape[0], start, rows, dtype)
        parts = shape[0] // device_shape[0]
        block = jax.make_array_from_callback((rows * parts, *shape[1:]), sharding, reader)
        # Waited for, so that no more than one block is on its way.
        leaf = jax.block_until_ready(write(leaf, block, start))
    return leaf


def blocks(device_shape: tuple[int, ...], dtype: Any) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the blocks that a device's rows are moved in, all of one size.

    The last one starts earlier than the one before ends, where the size does not divide the rows.
    """
    device_rows = device_shape[0]
    row_bytes = math.prod(device_shape[1:]) * jnp.dtype(dtype).itemsize * jax.local_device_count()
    rows = min(max(BLOCK_BYTES // row_bytes, 1), device_rows)
    for start in range(0, device_rows, rows):
        yield min(start, device_rows - rows), rows


class BlockReader:
    """Reads a device's part of a block, once for all devices that hold the same."""

    def __init__(
        self,
        files: Mapping[str, Path],
        path: str,
        shape: tuple[int, ...],
        device_rows: int,
        start: int,
        rows: int,
        dtype: Any,
    ) -> None:
        self.files, self.path, self.shape, self.dtype = files, path, shape, dtype
        self.device_rows, self.start, self.rows = device_rows, start, rows
        self.read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def __call__(self, index: Any) -> np.ndarray:
        """The numbers of `index`, slices of the block, in the type and the order of our parameter."""
        first = block_rows(index[0], self.start, self.rows, self.device_rows)
        others = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index[1:], self.shape[1:], strict=True))
        part = (first, *others)
        key = tuple((i.start, i.stop) for i in part)
        if key not in self.read:
            self.read[key] = self.read_part(part)
        return self.read[key]

    def read_part(self, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the whole parameter, all its layers."""
        layout = LAYOUTS[self.path]
        if not self.path.startswith("layers."):
            return self.read_tensor(layout.name, self.shape, part)
        layers = range(part[0].start, part[0].stop)
        return np.stack([self.read_tensor(layout.name.format(i), self.shape[1:], part[1:]) for i in layers])

    def read_tensor(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter without layers, or of one layer, whose whole shape is `shape`."""
        layout, file = LAYOUTS[self.path], self.files[name]
        # Opened anew for every piece: the pages of an open file count as this process's memory.
        with open_safetensors(file) as tensors:
            piece = tensors.get_slice(name)[layout.tensor_slices(shape, part)]
        if not all_finite(piece):
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite")
        size = tuple(i.stop - i.start for i in part)
        return layout.to_ours(piece, size).astype(self.dtype)


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or nan: no exponent has all bits set."""
    if not array.size:
        return True
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    sign = unsigned.type(1 << (8 * array.dtype.itemsize - 1))
    return bool((array.view(unsigned) & ~sign).max() < infinity)


def write_params(
    directory: Path, params: Params, dtype: Any = jnp.float32, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the weights as safetensors, in several files with an index where they are large.

    On several hosts every process calls this; the first one writes.

    Args:
      directory: exists on the first process.
      params: parameters of a `Qwen2`, with NamedShardings.
      dtype: float32, or bfloat16.
      max_file_bytes: most bytes of tensors in a file.
    """
    flat = traverse_util.flatten_dict(params, sep=".")

    def array_of(tensor: Tensor) -> np.ndarray:
        return LAYOUTS[tensor.path].to_tensor(fetch(flat[tensor.path], tensor.layer, dtype))

    write_tensors(directory, list(tensors_of(params)), array_of, dtype, max_file_bytes)


def write_tensors(
    directory: Path,
    tensors: Sequence[Tensor],
    array_of: Callable[[Tensor], np.ndarray],
    dtype: Any,
    max_file_bytes: int,
) -> None:
    """Write tensors in as many files as they need, asking for each when its turn comes.

    Args:
      directory: exists on the first process, the only one that writes.
      tensors: in the order in which they are written.
      array_of: the numbers of a tensor; every process asks.
      dtype: their type.
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
            held = {}
            for name in names:
                array = array_of(by_name[name])
                if writes:
                    held[name] = np.ascontiguousarray(array)
                progress.advance(bar)
            if writes:
                save_file(held, directory / file, metadata={"format": "pt"})
                (directory / file).chmod(0o644)  # others read models too
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def fetch(leaf: Array, layer: int | None, dtype: Any) -> np.ndarray:
    """A parameter, or one layer of it, on the host of every process."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding), sharding
    device_shape = sharding.shard_shape(leaf.shape)
    if layer is not None:
        read = block_reader(sharding.mesh, sharding.spec, 1, jnp.dtype(dtype))
        return gather(read(leaf, layer))[0]
    whole = np.empty(leaf.shape, dtype)
    for start, rows in blocks(device_shape, dtype):
        read = block_reader(sharding.mesh, sharding.spec, rows, jnp.dtype(dtype))
        block = gather(read(leaf, start))
        for first in range(0, len(block), rows):
            into = block_rows(slice(first, first + rows), start, rows, device_shape[0])
            whole[into] = block[first : first + rows]
    return whole


def gather(x: Array) -> np.ndarray:
    """A sharded array on the host of every process."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
