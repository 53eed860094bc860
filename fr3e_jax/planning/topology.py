"""Slices of TPUs by the names that people rent them under, and meshes on them. No TPU is needed: libtpu
compiles for chips that are not there.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fr3e_jax.config import ConfigError, MeshConfig
from fr3e_jax.cost import PEAK_FLOPS
from fr3e_jax.parallel.mesh import MESH_AXES, PlacementError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs, numbers of one chip.

    kind: as JAX names it. usable: bytes of memory that XLA gives to programs, of `installed`. memory: bytes a
    second of it. link: bytes a second of one link to a neighbour, one way. dimensions of the torus. cores:
    what the number in a slice's name counts, per chip. wraps: least size of a dimension whose ends are
    connected; on three dimensions all have to divide by it.
    """

    kind: str
    usable: float
    installed: float
    memory: float
    link: float
    dimensions: int
    cores: int
    wraps: int

    @property
    def flops(self) -> float:
        """FLOP/s of bfloat16 matrix products, its maker's number."""
        return PEAK_FLOPS[self.kind]


# usable: what XLA names in its message about a program that is too large. Rates: cloud.google.com/tpu/docs
# and jax-ml.github.io/scaling-book.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 32 * GIB, 1.2e12, 4.5e10, 3, 2, 4),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 16 * GIB, 8.1e11, 4.5e10, 2, 1, 16),
    "v5p": Chip("TPU v5", 95.74 * GIB, 96 * GIB, 2.765e12, 9e10, 3, 2, 4),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 32 * GIB, 1.64e12, 9e10, 2, 1, 16),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v5": "v5p"}
SIZES = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
}
SHAPES = {
    dimensions: {
        int(np.prod(shape)): shape for shape in (tuple(map(int, x.split("x"))) for x in sizes.split())
    }
    for dimensions, sizes in SIZES.items()
}
"""Chips -> shape of a slice, by dimensions of the torus."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice. name: as given. generation: key of `CHIPS`. shape: chips along each dimension."""

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What it is made of."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """How many."""
        return int(np.prod(self.shape))

    @property
    def topology(self) -> str:
        """As jax names it."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def ring(self) -> tuple[bool, ...]:
        """Which dimensions are closed to rings."""
        least = self.chip.wraps
        if len(self.shape) == 3:
            return (all(size % least == 0 for size in self.shape),) * 3
        return tuple(size >= least for size in self.shape)


def names() -> list[str]:
    """The names of all slices, as people rent them."""
    return [
        f"{'v5litepod' if alias else generation}-{chips * chip.cores}"
        for generation, chip in CHIPS.items()
        for alias in ([False, True] if generation == "v5e" else [False])
        for chips in SHAPES[chip.dimensions]
    ]


def find_slice(name: str) -> Slice:
    """A slice by its name: `v5litepod-16`, `v5e-16`, `v5p-128`, or as jax has it, `v5p:2x2x1`.

    The number of v4 and v5p counts TensorCores, two to a chip; that of v5e and v6e chips.

    Raises:
      ConfigError: there is no such slice; the message lists near names.
    """
    known, asked = names(), name.strip().lower()
    if found := re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", asked):
        generation = ALIASES.get(found[1], found[1])
        shape = tuple(map(int, found[2].split("x")))
        if generation in CHIPS and len(shape) == CHIPS[generation].dimensions and min(shape) > 0:
            return Slice(name, generation, shape)
    if found := re.fullmatch(r"([a-z0-9]+)-(\d+)", asked):
        generation, count = ALIASES.get(found[1], found[1]), int(found[2])
        if generation in CHIPS:
            chip = CHIPS[generation]
            shapes = SHAPES[chip.dimensions]
            if count % chip.cores == 0 and count // chip.cores in shapes:
                return Slice(name, generation, shapes[count // chip.cores])
            near = [n for n in known if n.startswith(f"{generation}-")]
            raise ConfigError(f"there is no slice {name!r}; {generation} comes as {', '.join(near)}")
    near = difflib.get_close_matches(asked, known, 6, 0.4) or ["v4-8", "v5e-16", "v5p-8", "v6e-16"]
    raise ConfigError(
        f"there is no slice {name!r}; names are such as {', '.join(near)}, or {', '.join(CHIPS)} with a "
        "shape, such as v5p:2x2x1"
    )


def available() -> bool:
    """Whether there is a compiler for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(at: Slice) -> list[Any]:
    """Its chips, to compile for.

    Raises:
      ConfigError: libtpu is not installed, or knows no such shape.
    """
    if not available():
        raise ConfigError("compiling for TPUs needs libtpu: pip install 'fr3e_jax[tpu]'")
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no server tells about a machine that has no TPU
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # else it warns that it finds none
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing is run: others may use libtpu meanwhile
    }.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if at.generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on Cloud TPU VMs
    if at.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=at.topology, **options)
    except Exception as error:  # whatever type jax has for it
        raise ConfigError(f"libtpu has no slice {at.topology}: {error}") from None
    return list(found.devices)


def slice_mesh(topology: str, sizes: tuple[int, int, int]) -> Mesh:
    """A mesh (data, fsdp, tensor) of the first chips of a slice that need not be there."""
    used: Any = np.array(devices_of(find_slice(topology))[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(used, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, chips: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of a configuration on so many chips, -1 being all that are left.

    Raises:
      PlacementError: they do not multiply to the chips.
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


def run_mesh(at: Slice, config: MeshConfig) -> Mesh:
    """The mesh as a run on the slice would have it, its devices in the same order.

    Raises:
      PlacementError: the sizes do not cover the chips, or cannot be laid on the slice.
    """
    sizes, devices = mesh_sizes(config, at.chips), devices_of(at)
    try:
        return laid(sizes, devices)
    except NotImplementedError:
        shape = "x".join(map(str, at.shape))
        fitting = [f"{f} x {t}" for f, t in splits(at.chips // sizes[0]) if lies((sizes[0], f, t), devices)]
        raise PlacementError(
            f"mesh {' x '.join(map(str, sizes))} (data x fsdp x tensor) cannot be laid on {at.name}, whose "
            f"chips are {shape}; with data {sizes[0]}, fsdp x tensor can be {', '.join(fitting)}"
        ) from None


def laid(sizes: tuple[int, int, int], devices: list[Any]) -> Mesh:
    """The mesh of jax, which puts neighbours on an axis next to one another."""
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def lies(sizes: tuple[int, int, int], devices: list[Any]) -> bool:
    """Whether jax can lay a mesh on the chips."""
    try:
        laid(sizes, devices)
    except NotImplementedError:
        return False
    return True


def splits(chips: int) -> list[tuple[int, int]]:
    """The pairs of sizes that multiply to it."""
    return [(chips // t, t) for t in range(1, chips + 1) if chips % t == 0]


@dataclasses.dataclass(frozen=True)
class Lane:
    """How a mesh axis, or some together, lies on the torus.

    size: chips along it. dimensions: of the torus that it covers. ring: they are closed. hops: links that two
    neighbours on it are apart at most; stride: on average.
    """

    size: int
    dimensions: int
    ring: bool
    hops: int
    stride: float

    def bandwidth(self, link: float) -> float:
        """Bytes a second that a chip can receive along it, in a ring or a line of collectives."""
        return link * max(self.dimensions, 1) * (2 if self.ring else 1) / max(self.stride, 1)


def lane_of(at: Slice, mesh: Mesh, axes: tuple[str, ...]) -> Lane:
    """Of mesh axes together."""
    index = tuple(slice(None) if name in axes else 0 for name in MESH_AXES)
    members = [device.coords for device in np.asarray(mesh.devices[index]).reshape(-1)]
    places = np.array([list(place)[: len(at.shape)] for place in members])
    extent = places.max(axis=0) - places.min(axis=0) + 1
    ring = all(
        closed and size == whole
        for size, whole, closed in zip(extent, at.shape, at.ring, strict=True)
        if size > 1
    )
    steps = np.abs(np.diff(places, axis=0))
    whole, closed = np.array(at.shape), np.array(at.ring)
    steps = np.where(closed, np.minimum(steps, whole - steps), steps)
    # Two axes together are gone through one after the other: their jumps are not hops of either.
    alone = len([name for name in axes if mesh.shape[name] > 1]) == 1
    hops = steps.sum(axis=1) if alone else np.ones(1, int)
    stride = float(hops.mean()) if hops.size else 1.0
    return Lane(
        len(members), int((extent > 1).sum()), ring and len(members) > 1, int(hops.max(initial=0)), stride
    )


def warnings_of(at: Slice, mesh: Mesh) -> list[str]:
    """What of a mesh does not suit the slice."""
    found = []
    for name in MESH_AXES:
        lane = lane_of(at, mesh, (name,))
        if lane.hops > 1:
            found.append(
                f"mesh.{name} {lane.size}: neighbours on it are up to {lane.hops} links apart on "
                f"{'x'.join(map(str, at.shape))}; sizes that are products of whole dimensions suit it better"
            )
    return found
