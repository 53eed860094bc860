"""Sizes that arrays are rounded up to: each holds the count, is the least that does, and there are few."""

from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.parallel.sizes import (
    ceil_divide,
    eight_per_doubling,
    last_power_of_two,
    next_multiple,
    next_power_of_two,
)

POWERS = [2**i for i in range(40)]


def least(sizes, count):
    return min(size for size in sizes if size >= count)


@given(st.integers(0, 2**60), st.integers(1, 2**40))
def test_ceilings_are_exact_also_where_floats_are_not(count, divisor):
    quotient = ceil_divide(count, divisor)
    assert (quotient - 1) * divisor < count <= quotient * divisor
    assert next_multiple(count, divisor) == quotient * divisor


@given(st.integers(1, 2**39))
def test_powers_of_two_enclose_the_count(count):
    assert next_power_of_two(count) == least(POWERS, count)
    assert last_power_of_two(count) == max(power for power in POWERS if power <= count)


def test_nothing_has_a_size_too():
    assert [next_power_of_two(0), last_power_of_two(0), eight_per_doubling(0, 32)] == [1, 1, 32]


def test_eight_sizes_per_doubling_from_where_they_are_multiples_of_the_smallest():
    sizes = [*range(32, 512, 32), *range(512, 1024, 64), *range(1024, 2049, 128)]
    widths = [eight_per_doubling(count, 32) for count in range(1, 2049)]
    assert widths == [least(sizes, count) for count in range(1, 2049)]
