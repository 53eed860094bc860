"""The mesh and the table of logical axes: what cannot be is refused with the sizes that can."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support import TINY, mesh_of, placement

from fr3e_jax.models.decoder import abstract_params, logical_axes
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import (
    MESH_AXES,
    SAMPLING_TABLE,
    Placement,
    PlacementError,
    make_mesh,
    place_model,
    widest_tensor,
)


def test_a_dimension_that_does_not_divide_is_named_with_sizes_that_would():
    with pytest.raises(PlacementError, match=r"kv_heads \(2\).*tensor = 4.*1, 2"):
        Placement(mesh_of(2, 1, 4)).shardings(logical_axes(TINY), abstract_params(TINY))


def placed_shape(name, **sizes):
    """The placements of a model of the family on a mesh of any size, whose devices repeat, without memory."""
    config = PRESETS[name].config
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    mesh = Mesh(np.resize(np.array(jax.devices(), object), shape), MESH_AXES)
    return place_model(mesh, logical_axes(config), abstract_params(config))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        # 28 heads; 152,064 words divide by 8 and 16 and not by 7 or 14.
        ("qwen2.5-7b", {"tensor": 8}, r"heads \(28\) does not divide by --mesh.tensor 8.*: 1, 2, 4$"),
        ("qwen2.5-7b", {"tensor": 16}, r"heads \(28\).*--mesh.tensor 16.*: 1, 2, 4$"),
        ("qwen2.5-7b", {"tensor": 7}, r"vocab \(152064\).*--mesh.tensor 7.*: 1, 2, 4$"),
        ("qwen2.5-0.5b", {"tensor": 4}, r"heads \(14\).*--mesh.tensor 4.*: 1, 2$"),
        ("qwen2.5-14b", {"tensor": 16}, r"heads \(40\).*: 1, 2, 4, 8$"),
        ("qwen2.5-14b", {"tensor": 5}, r"kv_heads \(8\).*: 1, 2, 4$"),  # 8 are not fewer than 5
        ("qwen2.5-0.5b", {"fsdp": 256}, r"embed \(896\).*--mesh.fsdp 256.*1, 2, 4, 7, 8"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_with_the_sizes_that_work_for_all_of_it(name, sizes, message):
    with pytest.raises(PlacementError, match=message):
        placed_shape(name, **sizes)


@pytest.mark.parametrize(
    ("name", "tensor", "heads"),
    [
        ("qwen2.5-7b", 4, "tensor"),
        ("qwen2.5-1.5b", 2, "tensor"),
        ("qwen2.5-1.5b", 4, None),  # 12 heads on 4 devices, 2 key-value heads on each
        ("qwen2.5-3b", 16, None),
        ("qwen2.5-72b", 16, None),
    ],
)
def test_key_value_heads_fewer_than_the_tensor_axis_are_replicated(name, tensor, heads):
    for placement_ in placed_shape(name, tensor=tensor):
        assert placement_.table["kv_heads"] == heads
        assert placement_.table["heads"] == "tensor"


@pytest.mark.parametrize(
    ("name", "devices", "widest"),
    [("qwen2.5-7b", 8, 4), ("qwen2.5-0.5b", 8, 2), ("qwen2.5-72b", 8, 8), ("qwen2.5-14b", 6, 2)],
)
def test_the_widest_tensor_axis_fits_model_and_devices(name, devices, widest):
    config = PRESETS[name].config
    assert widest_tensor(logical_axes(config), abstract_params(config), devices) == widest


def test_a_mesh_axis_is_never_used_twice_in_one_array():
    with pytest.raises(PlacementError, match=r"'heads' and 'mlp'.*'tensor'"):
        placement(2, 2, 2).spec("heads", "mlp")


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(PlacementError, match="'hedas'"):
        placement().spec("hedas")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, -1, 1), (-1, -1, 1), (-2, -4, 1), (16, -1, 1)])
def test_a_mesh_must_cover_the_devices(sizes):
    named = " x ".join(map(str, sizes))
    with pytest.raises(PlacementError, match=rf"{named}.*8 cpu"):
        make_mesh(*sizes)


def test_minus_one_takes_all_devices_that_are_left():
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_sampling_gathers_over_fsdp_and_training_does_not():
    shape = (TINY.hidden_size, TINY.intermediate_size)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    training = placement(1, 4, 2)
    sampling = Placement(training.mesh, SAMPLING_TABLE)
    for place, rows in ((training, shape[0] // 4), (sampling, shape[0])):
        placed = place.place(array, "embed", "mlp")
        assert {shard.data.shape for shard in placed.addressable_shards} == {(rows, shape[1] // 2)}
        np.testing.assert_array_equal(jax.device_get(placed), array)
