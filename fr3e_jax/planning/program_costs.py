"""What a compiled program costs on one chip: FLOPs, memory traffic, and exchanges with other chips."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from fr3e_jax.parallel.mesh import MESH_AXES
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.hlo_flops import attention_flops


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of running a program, or a part of it, on one chip.

    flops: of matrix products, those of kernels included. bytes: read and written in main memory. wire: bytes
    that the chip receives, by kind of collective and the mesh axes that it goes over. calls: number of
    collectives.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wire: Mapping[tuple[str, tuple[str, ...]], float] = dataclasses.field(default_factory=dict)
    calls: float = 0.0

    def __add__(self, other: "Costs") -> "Costs":
        wire = {k: self.wire.get(k, 0.0) + other.wire.get(k, 0.0) for k in {**self.wire, **other.wire}}
        return Costs(self.flops + other.flops, self.bytes + other.bytes, wire, self.calls + other.calls)

    def times(self, factor: float) -> "Costs":
        """The costs of `factor` runs."""
        wire = {k: factor * v for k, v in self.wire.items()}
        return Costs(factor * self.flops, factor * self.bytes, wire, factor * self.calls)


def costs_by_loop(program: Program, mesh: Mesh) -> tuple[Costs, dict[str, Costs]]:
    """Costs of a compiled program in parts.

    Returns:
      (costs of a run in which no named loop runs, costs of one run of the body of each named loop, without
      the named loops in it).
    """
    found = program.loops()
    none = dict.fromkeys(found, 0.0)
    loops = {}
    for name, around in found.items():
        outside = none | dict.fromkeys(around, 1.0)
        loops[name] = costs_of(program, mesh, outside | {name: 1.0}) + costs_of(program, mesh, outside).times(
            -1
        )
    return costs_of(program, mesh, none), loops


def costs_of(program: Program, mesh: Mesh, trips: Mapping[str, float]) -> Costs:
    """Costs of one run of a compiled program.

    Args:
      trips: number of runs of its named loops, each time that they are come to.
    """
    wire: dict[tuple[str, tuple[str, ...]], float] = {}
    calls = 0.0
    for collective in program.collectives(trips):
        axes = axes_of(collective.group, mesh)
        if received := collective.received(mesh.size):
            wire[collective.kind, axes] = wire.get((collective.kind, axes), 0.0) + received
            calls += collective.times
    kernels = sum(times * attention_flops(kernel) for times, kernel in program.kernels(trips))
    return Costs(program.flops(trips) + kernels, float(program.bytes(trips)), wire, calls)


def axes_of(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that a group of chips, numbered in the order of the mesh, extends over."""
    sizes = tuple(mesh.shape[name] for name in MESH_AXES)
    if not group:
        return tuple(name for name in MESH_AXES if mesh.shape[name] > 1)
    places = np.array(np.unravel_index(np.array(group), sizes))
    return tuple(name for name, place in zip(MESH_AXES, places, strict=True) if len(set(place.tolist())) > 1)
