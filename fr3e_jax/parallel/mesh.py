"""The mesh, the table of logical axes, and the placement of arrays by it.

The mesh has 3 axes. `data` repeats the parameters, `fsdp` splits parameters and optimizer state
along the hidden dimension, `tensor` splits heads, the MLP and the vocabulary. Rows of a batch are
split over `data` and `fsdp` together. The same constraints hold on every backend.

Updates may split the same devices otherwise than sampling: `update_mesh` moves parts from one of `fsdp` and
`tensor` to the other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

TRAINING_TABLE: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "length": None,
    "activation": None,
    "layer": None,
    "norm": None,
    "embed": "fsdp",
    "head_dim": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# While sampling, every token needs every weight: gathered over fsdp once a step, not once a token.
SAMPLING_TABLE: Mapping[str, MeshAxes] = {**TRAINING_TABLE, "embed": None}


class PlacementError(ValueError):
    """A mesh or a sharding is impossible; the message says which size to change."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with a table of logical axes."""

    mesh: Mesh
    table: Mapping[str, MeshAxes] = dataclasses.field(default_factory=lambda: TRAINING_TABLE)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Translate logical axis names into a PartitionSpec.

        Raises:
          PlacementError: an unknown name, or one mesh axis used by two of the names.
        """
        placed: list[MeshAxes] = []
        used: dict[str, str] = {}
        for axis in axes:
            if axis is not None and axis not in self.table:
                raise PlacementError(f"unknown logical axis {axis!r}; known: {', '.join(self.table)}")
            target = None if axis is None else self.table[axis]
            for name in (target,) if isinstance(target, str) else target or ():
                if name in used:
                    raise PlacementError(
                        f"logical axes {used[name]!r} and {axis!r} of {axes} are both placed on mesh "
                        f"axis {name!r}"
                    )
                used[name] = str(axis)
            placed.append(target)
        return PartitionSpec(*placed)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Translate logical axis names into a NamedSharding on this mesh."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def shard(self, x: Array, *axes: str | None) -> Array:
        """Constrain x to the sharding of its logical axes, inside a jitted function."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """Translate a tree of logical axes into NamedShardings, and check that they fit the shapes.

        Args:
          axes: tree of tuples of names.
          shapes: tree of the same structure with arrays or ShapeDtypeStructs.

        Raises:
          PlacementError: a dimension does not divide by its mesh axes; the message names both.
        """

        def one(names: tuple[str, ...], leaf: Any) -> NamedSharding:
            spec = self.spec(*names)
            for name, size, target in zip(names, leaf.shape, spec, strict=True):
                check_divides(f"{name} ({size})", size, self.mesh, target)
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(one, axes, shapes, is_leaf=is_axes)

    def place(self, x: Any, *axes: str | None) -> Array:
        """Put a host array on the mesh; where there are several processes, each passes the whole array."""
        whole, sharding = np.asarray(x), self.sharding(*axes)
        if sharding.is_fully_addressable:
            return jax.device_put(whole, sharding)
        # device_put would exchange the array between processes, to check that all have the same.
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    def place_rows(self, tree: Any, row_axis: int = 0) -> Any:
        """Put a tree of host arrays on the mesh, axis `row_axis` of each being rows of a batch."""
        axes = (*(None,) * row_axis, "batch")
        return jax.tree.map(lambda x: self.place(x, *axes), tree)


def check_divides(what: str, size: int, mesh: Mesh, target: MeshAxes) -> None:
    """Raise PlacementError unless `size` divides by the product of the mesh axes in `target`."""
    names = (target,) if isinstance(target, str) else target or ()
    parts = int(np.prod([mesh.shape[name] for name in names], dtype=int))
    if size % parts:
        fitting = [n for n in range(1, parts) if size % n == 0]
        raise PlacementError(
            f"{what} does not divide by mesh {' x '.join(names)} = {parts}; sizes up to {parts} that "
            f"divide it: {', '.join(map(str, fitting))}"
        )


def place_model(
    mesh: Mesh, axes: Any, shapes: Any, update_tensor: int | None = None
) -> tuple[Placement, Placement]:
    """Make the placements of a model, for training and for sampling.

    Where there are fewer key-value heads than parts of the tensor axis, every device holds all of them. The
    query heads, of which there are many more, are split.

    Args:
      mesh: from `make_mesh`; that of sampling.
      axes, shapes: the logical axes of the model's parameters, and the parameters or their shapes.
      update_tensor: as `mesh.update_tensor`; None trains on `mesh` as it is.

    Raises:
      PlacementError: the model does not divide by the mesh; the message names the sizes that work.
    """
    sizes = logical_sizes(axes, shapes)
    for mesh_axis in ("fsdp", "tensor"):
        parts = mesh.shape[mesh_axis]
        if odd := not_dividing(sizes, mesh_axis, parts):
            named = ", ".join(f"{name} ({sizes[name]})" for name in odd)
            fitting = [n for n in range(1, parts) if not not_dividing(sizes, mesh_axis, n)]
            raise PlacementError(
                f"{named} does not divide by --mesh.{mesh_axis} {parts}; smaller sizes that work for this "
                f"model: {', '.join(map(str, fitting))}"
            )
    if update_tensor is not None and update_tensor not in (fitting := update_tensors(mesh, axes, shapes)):
        raise PlacementError(
            f"--mesh.update_tensor {update_tensor} does not divide this model, or the {fsdp_x_tensor(mesh)} "
            f"devices of mesh.fsdp x mesh.tensor; sizes that do: {', '.join(map(str, fitting))}"
        )
    training = update_mesh(mesh, update_tensor)
    return table_placement(training, TRAINING_TABLE, sizes), table_placement(mesh, SAMPLING_TABLE, sizes)


def table_placement(mesh: Mesh, table: Mapping[str, MeshAxes], sizes: Mapping[str, int]) -> Placement:
    """Make the placement of a model of these logical sizes; few key-value heads lie on every device."""
    few = sizes["kv_heads"] < mesh.shape["tensor"]
    return Placement(mesh, {**table, "kv_heads": None} if few else table)


def update_mesh(mesh: Mesh, tensor: int | None) -> Mesh:
    """Lay the devices of a mesh out with another size of `tensor`; `fsdp` takes the other devices.

    The devices keep their order, so that a program may take arrays of both meshes.

    Args:
      mesh: of sampling.
      tensor: divides fsdp x tensor of `mesh`; None leaves the mesh as it is.
    """
    if tensor is None or tensor == mesh.shape["tensor"]:
        return mesh
    sizes = (mesh.shape["data"], fsdp_x_tensor(mesh) // tensor, tensor)
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def update_tensors(mesh: Mesh, axes: Any, shapes: Any) -> list[int]:
    """List the sizes of `tensor` with which a model can be updated on the devices of a mesh, ascending."""
    sizes, parts = logical_sizes(axes, shapes), fsdp_x_tensor(mesh)
    return [
        n
        for n in range(1, parts + 1)
        if parts % n == 0
        and not not_dividing(sizes, "tensor", n)
        and not not_dividing(sizes, "fsdp", parts // n)
    ]


def fsdp_x_tensor(mesh: Mesh) -> int:
    """Count the devices that hold one copy of the parameters in training."""
    return int(mesh.shape["fsdp"] * mesh.shape["tensor"])


def describe_mesh(mesh: Mesh) -> str:
    """Write the sizes of a mesh for people: `data 1 x fsdp 4 x tensor 4`."""
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items())


def widest_tensor(axes: Any, shapes: Any, devices: int) -> int:
    """Find the largest size of the tensor axis that divides the number of devices and fits a model."""
    sizes = logical_sizes(axes, shapes)
    return max(n for n in range(1, devices + 1) if devices % n == 0 and not not_dividing(sizes, "tensor", n))


def logical_sizes(axes: Any, shapes: Any) -> dict[str, int]:
    """Collect the size of every logical axis of a model's parameters."""
    leaves = zip(jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True)
    return {name: size for names, leaf in leaves for name, size in zip(names, leaf.shape, strict=True)}


def not_dividing(sizes: Mapping[str, int], mesh_axis: str, parts: int) -> list[str]:
    """List the logical axes on a mesh axis whose sizes do not divide by `parts`."""
    split = [name for name in sizes if TRAINING_TABLE[name] == mesh_axis]
    few = {"kv_heads"} if sizes["kv_heads"] < parts else set()  # then held by every device
    return [name for name in split if sizes[name] % parts and name not in few]


def is_axes(x: Any) -> bool:
    """Tell whether a node of a tree is the tuple of logical axes of a parameter."""
    return isinstance(x, tuple)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Make the mesh over all devices, with axes that the compiler may propagate (Auto).

    Args:
      data, fsdp, tensor: sizes; one of them may be -1, for all devices that are left.

    Raises:
      PlacementError: the sizes do not multiply to the number of devices, of all hosts together, or cannot be
        laid on them.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.device_count()
    if sizes.count(-1) == 1 and 0 not in sizes:
        others = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = devices // others
    if min(sizes) < 1 or int(np.prod(sizes)) != devices:
        raise PlacementError(
            f"mesh {data} x {fsdp} x {tensor} (data x fsdp x tensor) does not cover the {devices} "
            f"{jax.default_backend()} device(s); change --mesh.data, --mesh.fsdp or --mesh.tensor"
        )
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    except NotImplementedError as error:  # on a torus of TPUs
        raise PlacementError(
            f"jax cannot lay the mesh {' x '.join(map(str, sizes))} (data x fsdp x tensor) on these devices; "
            f"`python -m fr3e_jax.plan` names sizes that it can: {error}"
        ) from None


def row_parts(mesh: Mesh) -> int:
    """Count the parts that the rows of a batch are split into."""
    return int(np.prod([mesh.shape[name] for name in BATCH_AXES]))
