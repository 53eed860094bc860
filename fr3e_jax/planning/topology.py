"""Meshes on slices of TPUs that are not there: libtpu compiles for them, and arithmetic needs even less."""

import dataclasses
import importlib.util
import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fr3e_jax.config import ConfigError, MeshConfig
from fr3e_jax.parallel.mesh import MESH_AXES, PlacementError
from fr3e_jax.planning.slices import Slice, find_slice


def available() -> bool:
    """Whether libtpu, the compiler for TPUs, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(tpu: Slice) -> list[Any]:
    """The chips of a slice as JAX devices that programs can be compiled for.

    Raises:
      ConfigError: libtpu is not installed, or knows no slice of this shape.
    """
    if not available():
        raise ConfigError(
            "compiling for TPUs needs libtpu: pip install 'fr3e_jax[tpu]', or estimate with --quick"
        )
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no server to ask on a machine without a TPU
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # else it warns that it finds none
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing is run: others may use libtpu meanwhile
    }.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if tpu.generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on Cloud TPU VMs
    if tpu.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=tpu.topology, **options)
    except Exception as error:  # whatever type jax has for it
        raise ConfigError(f"libtpu has no slice {tpu.topology}: {error}") from None
    return list(description.devices)


@dataclasses.dataclass(frozen=True)
class ChipPosition:
    """The place of a chip in a slice, with the fields of a JAX device that a mesh is laid out by.

    coords: on the three axes of the torus.
    """

    id: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0
    slice_index: int = 0


def positions_in(tpu: Slice) -> list[Any]:
    """The chips of a slice for estimates without libtpu; nothing can be compiled for them."""
    shape = (*tpu.shape, *(1,) * (3 - len(tpu.shape)))
    places = np.ndindex(*reversed(shape))  # the first axis moves fastest
    return [ChipPosition(i, tuple(reversed(place)), tpu.chip.kind) for i, place in enumerate(places)]


def slice_mesh(topology: str, sizes: tuple[int, int, int]) -> Mesh:
    """A mesh (data, fsdp, tensor) of the first chips of a slice, to compile for."""
    used: Any = np.array(devices_of(find_slice(topology))[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(used, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, chips: int) -> tuple[int, int, int]:
    """The sizes (data, fsdp, tensor) of a mesh on a number of chips; -1 takes all chips that are left.

    Raises:
      PlacementError: the sizes do not multiply to the number of chips.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = chips // -int(np.prod(sizes))
    if min(sizes) < 1 or int(np.prod(sizes)) != chips:
        raise PlacementError(
            f"mesh {config.data} x {config.fsdp} x {config.tensor} (data x fsdp x tensor) does not cover the "
            f"{chips} chip(s); change --mesh.data, --mesh.fsdp or --mesh.tensor"
        )
    return sizes[0], sizes[1], sizes[2]


def run_mesh(tpu: Slice, config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh that a run would make on a slice, its devices in the same order.

    Args:
      devices: chips of the slice; by default those that can be compiled for.

    Raises:
      ConfigError: as `devices_of`.
      PlacementError: the sizes do not cover the chips, or jax cannot lay them on the torus.
    """
    sizes = mesh_sizes(config, tpu.chips)
    devices = devices_of(tpu) if devices is None else devices
    try:
        return mesh_on(sizes, devices)
    except NotImplementedError:
        shape = "x".join(map(str, tpu.shape))
        data = sizes[0]
        possible = ", ".join(
            f"{f} x {t}" for f, t in splits(tpu.chips // data) if fits_torus((data, f, t), devices)
        )
        raise PlacementError(
            f"mesh {' x '.join(map(str, sizes))} (data x fsdp x tensor) cannot be laid on {tpu.name}, whose "
            f"chips are {shape}; with data {data}, fsdp x tensor can be {possible}"
        ) from None


def mesh_on(sizes: tuple[int, int, int], devices: list[Any]) -> Mesh:
    """JAX's mesh of the devices, which puts neighbours on a mesh axis next to one another.

    Raises:
      NotImplementedError: jax cannot lay a mesh of these sizes on the torus.
    """
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def fits_torus(sizes: tuple[int, int, int], devices: list[Any]) -> bool:
    """Whether jax can lay a mesh of these sizes on the chips."""
    try:
        mesh_on(sizes, devices)
    except NotImplementedError:
        return False
    return True


def splits(chips: int) -> list[tuple[int, int]]:
    """The pairs of sizes that multiply to a number of chips."""
    return [(chips // t, t) for t in range(1, chips + 1) if chips % t == 0]


@dataclasses.dataclass(frozen=True)
class Lane:
    """The path on the torus along which a mesh axis, or several together, exchange data.

    size: number of chips on it. dimensions: of the torus that it covers. ring: whether its ends are
    connected. hops: most links between two neighbours on it. stride: mean number of links between them.
    """

    size: int
    dimensions: int
    ring: bool
    hops: int
    stride: float

    def bandwidth(self, link: float) -> float:
        """Bytes/s that a chip can receive along it, given the bandwidth of a link in one direction."""
        return link * max(self.dimensions, 1) * (2 if self.ring else 1) / max(self.stride, 1)


def lane_of(tpu: Slice, mesh: Mesh, axes: tuple[str, ...], joined: Collection[str] = ()) -> Lane:
    """The lane of some mesh axes, taken together.

    Args:
      joined: mesh axes that are made of parts of two.
    """
    index = tuple(slice(None) if name in axes else 0 for name in MESH_AXES)
    members = [device.coords for device in np.asarray(mesh.devices[index]).reshape(-1)]
    places = np.array([list(place)[: len(tpu.shape)] for place in members])
    extent = places.max(axis=0) - places.min(axis=0) + 1
    ring = all(
        closed and size == full
        for size, full, closed in zip(extent, tpu.shape, tpu.rings, strict=True)
        if size > 1
    )
    steps = np.abs(np.diff(places, axis=0))
    shape, closed = np.array(tpu.shape), np.array(tpu.rings)
    steps = np.where(closed, np.minimum(steps, shape - steps), steps)
    # Two axes together are gone through one after the other: their jumps are not hops of either.
    alone = len([name for name in axes if mesh.shape[name] > 1]) == 1 and not set(axes) & set(joined)
    hops = steps.sum(axis=1) if alone else np.ones(1, int)
    stride = float(hops.mean()) if hops.size else 1.0
    return Lane(
        len(members), int((extent > 1).sum()), ring and len(members) > 1, int(hops.max(initial=0)), stride
    )


def mesh_warnings(tpu: Slice, mesh: Mesh) -> list[str]:
    """Warnings on mesh axes whose neighbours are not neighbours on the slice; one line each."""
    lines = []
    for name in MESH_AXES:
        lane = lane_of(tpu, mesh, (name,))
        if lane.hops > 1:
            lines.append(
                f"mesh.{name} {lane.size}: neighbours on it are up to {lane.hops} links apart on "
                f"{'x'.join(map(str, tpu.shape))}; sizes that are products of whole dimensions suit it better"
            )
    return lines
