"""Checksums of arrays: the same in every layout, and another one where any element is another."""

import jax
import numpy as np
import pytest
from support import placement

from fr3e_jax.run.checksums import checksummed, element_sum, host_sum


def test_a_checksum_is_that_of_its_definition():
    """By hand, with Python's integers."""

    def mixed(bits, place):
        x = bits ^ ((place + 1) * 0x9E3779B1) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    x = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(np.float32)
    expected = sum(mixed(int(bits), place) for place, bits in enumerate(x.view(np.uint32).ravel())) % 2**32
    assert int(element_sum(x)) == expected
    assert checksummed({"x": jax.numpy.asarray(x)})["x"] == {
        "shape": [3, 5, 2],
        "dtype": "float32",
        "sum": expected,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_does_not_depend_on_the_layout_but_on_every_element(dtype):
    x = jax.numpy.asarray(np.random.default_rng(1).integers(-9, 9, (8, 4, 6))).astype(dtype)
    meshes = [
        ((2, 2, 2), ("embed", "mlp", None)),
        ((1, 8, 1), ("embed", None, None)),
        ((1, 1, 1), (None,) * 3),
    ]
    sums = {checksummed({"x": placement(*mesh).place(x, *axes)})["x"]["sum"] for mesh, axes in meshes}
    assert len(sums) == 1
    host = np.asarray(x)
    for index in np.ndindex(host.shape):
        other = host.copy()
        other[index] = ~other[index] if dtype == "bool" else other[index] + 1
        assert int(jax.jit(element_sum)(other)) not in sums


def test_lost_signs_and_places_do_not_cancel():
    x = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    whole = int(element_sum(x))
    assert int(element_sum(np.abs(x))) != whole
    assert int(element_sum(x[::-1])) != whole and int(element_sum(x * 0)) != whole
    assert host_sum(x) != host_sum(np.abs(x))
