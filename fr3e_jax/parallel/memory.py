"""Errors that say that memory is short, and the sizes of arrays on one device."""

import math
import re

import jax


def out_of_memory(error: BaseException) -> str | None:
    """Return what says that memory is short, of an exception of Python, numpy or XLA; None of others."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return text or "Python has none left"
    found = re.search(r"RESOURCE_EXHAUSTED:? *(.{0,160})|(std::bad_alloc)", text)
    return (found[1] or found[2] or "of a device") if found else None


def bytes_on_device(array: jax.Array) -> int:
    """Bytes that an array takes on each of its devices."""
    shape = array.sharding.shard_shape(array.shape)
    return int(math.prod(shape)) * int(array.dtype.itemsize)
