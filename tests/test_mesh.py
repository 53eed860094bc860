"""The mesh and the table of logical axes: what cannot be is refused with the sizes that can."""

import jax
import numpy as np
import pytest
from support import TINY, placement

from fr3e_jax.models.qwen2 import abstract_params, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE, Placement, PlacementError, make_mesh


def test_a_dimension_that_does_not_divide_is_named_with_sizes_that_would():
    with pytest.raises(PlacementError, match=r"kv_heads \(2\).*tensor = 4.*1, 2"):
        placement(2, 1, 4).shardings(logical_axes(TINY), abstract_params(TINY))


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
