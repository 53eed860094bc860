"""Slices of TPUs by the names under which they are rented, and meshes on them."""

import pytest
from support import needs_compiler

from fr3e_jax.config import ConfigError, MeshConfig
from fr3e_jax.parallel.mesh import PlacementError
from fr3e_jax.planning.slices import find_slice, slice_names
from fr3e_jax.planning.topology import devices_of, lane_of, mesh_sizes, mesh_warnings, run_mesh


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-8", "v5e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-64", "v4:2x4x4", 32),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("V5E-4", "v5e:2x2", 4),
    ],
)
def test_a_slice_is_found_by_the_name_that_it_is_rented_under(name, topology, chips):
    """v4 and v5p count TensorCores, two to a chip."""
    at = find_slice(name)
    assert (at.topology, at.chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("v5p-12", "v5p-8, v5p-16"),
        ("v5e-3", "v5e-4, v5e-8"),
        ("v5e16", "v5e-16"),
        ("v7-8", "v"),
        ("a100", "v5e-16"),
        ("v5e:2x2x2", "v5e"),
    ],
)
def test_an_unknown_slice_is_refused_with_those_that_are_near(name, similar):
    with pytest.raises(ConfigError, match="there is no slice") as error:
        find_slice(name)
    assert similar in str(error.value)
    assert "\n" not in str(error.value)


@needs_compiler
@pytest.mark.parametrize("name", [n for n in slice_names() if int(n.rpartition("-")[2]) <= 64])
def test_libtpu_knows_every_slice_with_as_many_chips(name):
    at = find_slice(name)
    devices = devices_of(at)
    assert len(devices) == at.chips
    assert {device.device_kind for device in devices} == {at.chip.kind}


def test_a_mesh_that_does_not_cover_the_chips_is_refused():
    assert mesh_sizes(MeshConfig(1, -1, 4), 16) == (1, 4, 4)
    for config in (MeshConfig(1, 3, 4), MeshConfig(1, -1, 5), MeshConfig(2, 2, 2)):
        with pytest.raises(PlacementError, match="does not cover the 16 chip"):
            mesh_sizes(config, 16)


@needs_compiler
def test_a_mesh_that_jax_cannot_lay_on_the_torus_is_refused_with_those_that_it_can():
    at = find_slice("v5p-128")
    with pytest.raises(PlacementError, match="fsdp x tensor can be 64 x 1, 16 x 4"):
        run_mesh(at, MeshConfig(1, 8, 8))
    assert dict(run_mesh(at, MeshConfig(1, 16, 4)).shape) == {"data": 1, "fsdp": 16, "tensor": 4}


@needs_compiler
def test_axes_are_known_to_be_rings_or_lines_or_neither():
    whole = find_slice("v5e-256")
    mesh = run_mesh(whole, MeshConfig(1, 16, 16))
    assert lane_of(whole, mesh, ("tensor",)) == lane_of(whole, mesh, ("fsdp",))
    ring = lane_of(whole, mesh, ("tensor",))
    assert (ring.size, ring.dimensions, ring.ring, ring.hops) == (16, 1, True, 1)
    part = find_slice("v5e-16")
    line = lane_of(part, run_mesh(part, MeshConfig(1, 4, 4)), ("tensor",))
    assert (line.ring, line.hops) == (False, 1)
    assert ring.bandwidth(1.0) == 2 * line.bandwidth(1.0) == 2
    assert mesh_warnings(part, run_mesh(part, MeshConfig(1, 4, 4))) == []
    assert "mesh.fsdp 2" in mesh_warnings(part, run_mesh(part, MeshConfig(1, 2, 8)))[0]
