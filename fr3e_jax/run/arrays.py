"""Reading arrays as orbax lays them out: with tensorstore, in one OCDBT database for all arrays of an item.

orbax's own reading gives up at the first error while others are under way. These end later, with tracebacks
on stderr that nobody can catch. Here all have ended before an error is raised. Every process reads the parts
that its devices hold.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import tensorstore as ts
from etils import epath


def open_array(place: epath.Path, name: str) -> Any:
    """Open the stored array of a path in an item's folder.

    Raises:
      ValueError: it is not there, or damaged; the text begins with a status, such as NOT_FOUND.
    """
    base = str(place) if "://" in str(place) else f"file://{place}"
    database = {"driver": "ocdbt", "base": f"{base.rstrip('/')}/", "path": f"{name}/"}
    # What is missing is an error, and not zeros.
    spec = {"driver": "zarr", "kvstore": database, "fill_missing_data_reads": False}
    return ts.open(spec, open=True).result()


def stored_shapes(place: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read path -> shape of those arrays of `names` that an item's folder has.

    Raises:
      ValueError: one is damaged.
    """
    shapes = {}
    for name in names:
        try:
            shapes[name] = tuple(open_array(place, name).shape)
        except ValueError as error:
            if not str(error).startswith("NOT_FOUND"):
                raise
    return shapes


def read_arrays(place: epath.Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Read path -> array from an item's folder, one at a time, so that the host holds parts of one array.

    Args:
      place: the item's folder.
      like: path -> shape, type and sharding; an array without a sharding becomes one of numpy.

    Raises:
      ValueError: an array is not there, damaged, or has another shape.
    """
    return {name: read_array(place, name, each) for name, each in like.items()}


def read_array(place: epath.Path, name: str, like: jax.ShapeDtypeStruct) -> Any:
    """Read an array from an item's folder: a jax array where `like` has a sharding, otherwise a numpy array.

    Raises:
      ValueError: it is not there, damaged, or has another shape.
    """
    stored = open_array(place, name)
    if tuple(stored.shape) != tuple(like.shape):
        raise ValueError(f"{name} has the shape {tuple(stored.shape)}, not {tuple(like.shape)}")
    if like.sharding is None:
        return stored.read().result().astype(like.dtype, copy=False)
    indices = like.sharding.addressable_devices_indices_map(tuple(like.shape))
    # Each part once, though several devices may hold it.
    reads = {str(index): stored[index].read() for index in indices.values()}
    errors = [read.exception() for read in reads.values()]  # waits for all
    if error := next(filter(None, errors), None):
        raise error
    parts = {index: read.result().astype(like.dtype, copy=False) for index, read in reads.items()}
    shards = [jax.device_put(parts[str(index)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(tuple(like.shape), like.sharding, shards)
