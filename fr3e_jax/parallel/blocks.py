"""Reading and writing a sharded array block by block, each device its own part.

A block is a sharded array like the whole one, but with few rows on its first axis: every device holds
`rows` of its own rows. Nothing moves between devices. So this works on any number of hosts, in lockstep.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped


@functools.cache
def zeros_maker(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """Make a jitted function () -> a sharded array of zeros, allocated on its devices."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def block_writer(mesh: Mesh, spec: PartitionSpec) -> Any:
    """Make a jitted function (array, block, start) -> array that writes a block in place.

    `start` counts each device's own rows.
    """

    def write(
        array: Shaped[Array, " whole *rest"], block: Shaped[Array, " rows *rest"], start: Int[Array, ""]
    ) -> Shaped[Array, " whole *rest"]:
        return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=0)

    mapped = jax.shard_map(write, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    return jax.jit(mapped, donate_argnums=0)


@functools.cache
def block_reader(mesh: Mesh, spec: PartitionSpec, rows: int, dtype: Any) -> Any:
    """Make a jitted function (array, start) -> block of `rows` rows of each device, cast to `dtype`."""

    def read(array: Shaped[Array, " whole *rest"], start: Int[Array, ""]) -> Shaped[Array, " rows *rest"]:
        return jax.lax.dynamic_slice_in_dim(array, start, rows, axis=0).astype(dtype)

    mapped = jax.shard_map(read, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    return jax.jit(mapped)


def block_rows(index: slice, start: int, rows: int, device_rows: int) -> slice:
    """Find which rows of the whole array a device's rows of a block are.

    Args:
      index: the device's rows in the block.
      start: the first of each device's own rows in the block.
      rows, device_rows: rows of one device in the block, and in the whole array.
    """
    first = (index.start or 0) // rows * device_rows + start
    return slice(first, first + rows)
