"""Loading weights onto a mesh piece by piece, against reading them whole and then placing them."""

import json
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from fr3e_jax.bench.process import in_fresh_process
from fr3e_jax.config import ConfigError
from fr3e_jax.config.values import Count, PositiveNumber
from fr3e_jax.models.decoder import abstract_params, logical_axes
from fr3e_jax.models.hf import config_json, read_config
from fr3e_jax.models.hf_tensors import LAYOUTS, Tensor, tensors_of
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import make_mesh, place_model
from fr3e_jax.planning.slices import GIB
from fr3e_jax.pretrained.safetensors_files import find_tensors
from fr3e_jax.pretrained.weights import read_params
from fr3e_jax.pretrained.write_weights import write_tensors


class Load(NamedTuple):
    """The cost of loading: seconds, and the peak of host memory beyond the parameters, bytes."""

    seconds: float
    beyond: int


def measure_loading(
    shape: str = "qwen2.5-1.5b",
    devices: Count = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    file_gb: PositiveNumber = 0.5,
    repeats: Count = 3,
) -> list[dict[str, Any]]:
    """Measure loading from safetensors onto a mesh: piece by piece, against whole and then placed.

    Args:
      shape: name of a preset, of which a checkpoint with random bfloat16 weights is written first.
      devices: CPU devices, over which the parameters are sharded.
      dtype: type of the parameters.
      file_gb: most gigabytes in a file of the checkpoint.
      repeats: measurements of each side, in turns; medians are shown.

    Returns:
      What is printed, an object a line.
    """
    if shape not in PRESETS:
        raise ConfigError(f"no shape {shape!r}; there are {', '.join(PRESETS)}")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_random_checkpoint(directory, shape, file_gb)
        files = len(set(find_tensors(directory).values()))
        sides: dict[str, list[Load]] = {"streamed": [], "whole": []}
        for _ in range(repeats):
            sides["streamed"].append(in_fresh_process(load_streamed, directory, dtype, devices=devices))
            sides["whole"].append(in_fresh_process(load_whole, directory, dtype, devices=devices))
    medians = {
        name: Load(*(statistics.median(column) for column in zip(*loads, strict=True)))
        for name, loads in sides.items()
    }
    streamed, whole = medians["streamed"], medians["whole"]
    parameters = PRESETS[shape].parameters
    table = Table(
        title=f"{shape}: {parameters:,} parameters in {files} files, to {dtype} on {devices} devices"
    )
    for column in ("side", "seconds", "peak host memory beyond the parameters"):
        table.add_column(column)
    for name, side in medians.items():
        table.add_row(name, f"{side.seconds:.1f}", f"{side.beyond / GIB:.2f} GiB")
    ratios = {"memory": whole.beyond / streamed.beyond, "seconds": whole.seconds / streamed.seconds}
    table.add_row("whole / streamed", f"{ratios['seconds']:.2f}", f"{ratios['memory']:.1f}")
    Console(stderr=True).print(table)
    sides_measured = {
        name: {"seconds": side.seconds, "beyond_gib": side.beyond / GIB} for name, side in medians.items()
    }
    return [{"shape": shape, "devices": devices, "dtype": dtype, "ratios": ratios} | sides_measured]


def write_random_checkpoint(directory: Path, shape: str, file_gb: float) -> None:
    """Write a checkpoint of random bfloat16 numbers between 0.5 and 1 and their negatives."""
    config = PRESETS[shape].config
    rng = np.random.default_rng(0)

    def array_of(tensor: Tensor) -> np.ndarray:
        bits = rng.integers(2**16, size=tensor.shape, dtype=np.uint16)
        return ((bits & 0x807F) | 0x3F00).view(jnp.bfloat16)  # a random sign and mantissa

    tensors = list(tensors_of(abstract_params(config)))
    write_tensors(directory, tensors, array_of, jnp.bfloat16, int(file_gb * 10**9))
    raw = config_json(config, [1], 0, dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(raw))


def load_streamed(directory: Path, dtype: str) -> Load:
    """Load piece by piece, as this project does."""
    config, shardings = sharded(directory)
    return timed(lambda: read_params(directory, config, shardings, jnp.dtype(dtype)))


def load_whole(directory: Path, dtype: str) -> Load:
    """Load whole: every tensor on the host in its final type, layers stacked, then placed."""
    config, shardings = sharded(directory)
    shapes = traverse_util.flatten_dict(abstract_params(config), sep=".")

    def whole() -> Any:
        tensors: dict[str, np.ndarray] = {}
        for file in sorted(set(find_tensors(directory).values())):
            tensors |= {name: array.astype(dtype) for name, array in load_file(file).items()}
        params = {}
        for path, abstract in shapes.items():
            layout = LAYOUTS[path]
            if path.startswith("layers."):
                names = [layout.name.format(i) for i in range(abstract.shape[0])]
                arrays = [layout.to_ours(tensors.pop(name), abstract.shape[1:]) for name in names]
                params[path] = np.stack(arrays)
            else:
                params[path] = layout.to_ours(tensors.pop(layout.name), abstract.shape)
        return jax.device_put(traverse_util.unflatten_dict(params, sep="."), shardings)

    return timed(whole)


def sharded(directory: Path) -> tuple[Any, Any]:
    """Read the architecture of a checkpoint: (it, its parameters' shardings over all devices)."""
    config = read_config(directory)
    axes, shapes = logical_axes(config), abstract_params(config)
    training, _ = place_model(make_mesh(1, -1, 1), axes, shapes)
    return config, training.shardings(axes, shapes)


def timed(function: Callable[[], Any]) -> Load:
    """Time a function that returns parameters, and measure how much more memory it needed than they do."""
    jax.block_until_ready(jnp.ones(1) + 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    params = jax.block_until_ready(function())
    seconds = time.perf_counter() - start
    # Not getrusage, whose maximum a process inherits from the one that started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return Load(seconds, int(peak) * 1024 - before - sum(x.nbytes for x in jax.tree.leaves(params)))
