"""Errors that say that memory is short, and the sizes of arrays on one device."""

import math
import os
import re
from typing import Any

import jax

SHARE_OF_HOST = 0.25  # of the memory of a machine without accelerators, for the KV caches of all its devices


def out_of_memory(error: BaseException) -> str | None:
    """Return what says that memory is short, of an exception of Python, numpy or XLA; None of others."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return text or "Python has none left"
    found = re.search(r"RESOURCE_EXHAUSTED:? *(.{0,160})|(std::bad_alloc)", text)
    return (found[1] or found[2] or "of a device") if found else None


def share_of_host() -> int:
    """Bytes that the KV caches of a device may take where devices have the memory of the host."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(SHARE_OF_HOST * memory) // jax.local_device_count()


def device_memory() -> int:
    """Bytes that the smallest device of this process may hold; 0 where devices do not tell."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())


def bytes_on_device(array: Any) -> int:
    """Bytes that an array, or the shape of one with its sharding, takes on each of its devices."""
    shape = array.sharding.shard_shape(array.shape)
    return int(math.prod(shape)) * int(array.dtype.itemsize)
