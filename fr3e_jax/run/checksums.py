"""Checksums of the arrays of a checkpoint, computed on the devices that hold them.

The checksum of an array on a mesh is a sum over its elements, modulo 2^32, so that it does not depend on the
array's layout. Each device adds up its own part, before a checkpoint is written and after it is read, on
whatever mesh. No host reads a file twice, or the files of another host.
"""

import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

Entry = dict[str, Any]
"""The `shape`, the `dtype` and the checksum `sum`, in [0, 2^32), of an array."""


def checksummed(leaves: Mapping[str, Any]) -> dict[str, Entry]:
    """Compute path -> shape, type and checksum of arrays on devices or on the host.

    Every process calls this; for arrays of a mesh all get the same numbers.
    """
    on_devices = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Array)}
    sums = {name: int(number) for name, number in device_sums(on_devices).items()}
    sums |= {name: host_sum(leaf) for name, leaf in leaves.items() if name not in sums}
    return {
        name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, "sum": sums[name]}
        for name, leaf in leaves.items()
    }


def device_sums(leaves: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Compute path -> checksum of arrays on devices, uint32 [] each, on the host."""
    if not leaves:
        return {}
    shardings = [leaf.sharding for leaf in leaves.values()]
    everywhere = {
        NamedSharding(sharding.mesh, PartitionSpec())
        for sharding in shardings
        if isinstance(sharding, NamedSharding)
    }
    # The sums lie on every process, where there are several.
    out = everywhere.pop() if len(everywhere) == 1 else None
    return jax.device_get(summing(out)(dict(leaves)))


@functools.cache
def summing(out: NamedSharding | None) -> Any:
    """Compile the function from a tree of arrays to a tree of their checksums, with the sharding `out`."""
    return jax.jit(lambda leaves: jax.tree.map(element_sum, leaves), out_shardings=out)


def element_sum(x: Array) -> Array:
    """Compute the checksum of an array, uint32 []: the sum of each element's bits mixed with its place."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place + along * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # The end of MurmurHash3, in which each bit of the input changes half of the bits of the output. A sum of
    # products would not do: two signs that are lost would cancel.
    mixed = bits ^ ((place + np.uint32(1)) * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> np.uint32(16)), dtype=jnp.uint32)


def host_sum(x: np.ndarray) -> int:
    """Compute the checksum of an array on the host: the CRC-32 of its bytes."""
    return zlib.crc32(np.ascontiguousarray(x).tobytes())


def differing_entries(saved: Mapping[str, Entry], read: Mapping[str, Entry]) -> list[str]:
    """List the paths of arrays that were not read as they were saved."""
    return [name for name in sorted(saved.keys() | read.keys()) if saved.get(name) != read.get(name)]


def json_sum(value: Any) -> int:
    """Compute the checksum of a JSON value, whatever the order of its keys: the CRC-32 of its text."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
