"""How many pages a decoding has within a budget of memory."""

import dataclasses
from typing import Any

import jax

from fr3e_jax.engine.pages import PAGE_AXES
from fr3e_jax.engine.schedule import Room
from fr3e_jax.models.decoder import DecoderConfig, cache_axes
from fr3e_jax.parallel.memory import bytes_on_device
from fr3e_jax.parallel.mesh import Placement, PlacementError, row_parts

GB = 10**9


class CacheBudgetError(PlacementError):
    """The least KV caches of a decoding are larger than allowed; the message says what to change."""


def bytes_of(placement: Placement, axes: tuple[str | None, ...], shape: tuple[int, ...], dtype: Any) -> int:
    """Count the bytes of a KV cache on a device."""
    return bytes_on_device(jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(*axes)))


def page_bytes(config: DecoderConfig, placement: Placement, room: Room, dtype: Any) -> int:
    """Count the bytes of a page on a device, keys and values."""
    part = (row_parts(placement.mesh), config.num_key_value_heads, room.sizes.rows, room.sizes.slots)
    shape = (config.num_hidden_layers, 1, *part, config.head_dim)
    return 2 * bytes_of(placement, PAGE_AXES, shape, dtype)


def context_bytes(config: DecoderConfig, placement: Placement, room: Room, slots: int, dtype: Any) -> int:
    """Count the bytes on a device of what the branches of n trajectories share, keys and values."""
    sequences = room.n * row_parts(placement.mesh)
    shape = (config.num_hidden_layers, sequences, config.num_key_value_heads, slots, config.head_dim)
    return 2 * bytes_of(placement, cache_axes("batch"), shape, dtype)


def needed_bytes(config: DecoderConfig, placement: Placement, room: Room, slots: int, dtype: Any) -> int:
    """Count the bytes on a device with which `pages_within` gives a decoding the pages of its room.

    Where these are fewer than can come to be useful, blocks are set aside: a page more is on its way to the
    host or back.
    """
    pages = room.pages + (room.pages < room.useful)
    shared = context_bytes(config, placement, room, slots, dtype)
    return shared + pages * page_bytes(config, placement, room, dtype)


def least_bytes(config: DecoderConfig, placement: Placement, room: Room, slots: int, dtype: Any) -> int:
    """Count the bytes on a device with which every branch of a decoding ends: one block to the limit."""
    least = dataclasses.replace(room, pages=room.most)
    return needed_bytes(config, placement, least, slots, dtype)


def pages_within(
    cache_bytes: int | None, config: DecoderConfig, placement: Placement, room: Room, slots: int, dtype: Any
) -> int:
    """Count the pages of a decoding: as many as can come to be useful, or as fit.

    Args:
      cache_bytes: most bytes on a device of all KV caches, of branches and of what they share; None: any.
      room: without its pages. slots: of what a trajectory's branches share.

    Raises:
      CacheBudgetError: a block would not reach the limit.
    """
    if cache_bytes is None:
        return room.useful
    least = least_bytes(config, placement, room, slots, dtype)
    if least > cache_bytes:
        raise CacheBudgetError(
            f"KV caches of {cache_bytes / GB:.2f} GB (rollout.cache_gb) do not hold {room.n} sequences of "
            f"{slots} tokens and {room.sizes.rows} rows of {room.max_new}: these take {least / GB:.2f} GB; "
            f"raise --rollout.cache_gb, or lower --rollout.queries, --evaluate.rows or --rollout.max_response"
        )
    left = cache_bytes - context_bytes(config, placement, room, slots, dtype)
    pages = left // page_bytes(config, placement, room, dtype)
    return room.useful if pages >= room.useful else pages - 1  # where blocks are set aside, a page moves
