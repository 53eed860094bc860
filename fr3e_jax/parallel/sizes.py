"""Rules that round sizes up, so that few programs are compiled.

XLA compiles a program for every shape that it meets. Numbers of rows, slots and tokens differ from step to
step, so each is rounded up to one of few sizes. The rest of an array is padding.
"""


def ceil_divide(count: int, divisor: int) -> int:
    """Divide, and round up to a whole number."""
    return -(-count // divisor)


def next_multiple(count: int, factor: int) -> int:
    """Round up to a multiple of `factor`."""
    return ceil_divide(count, factor) * factor


def next_power_of_two(count: int) -> int:
    """Round up to a power of 2; 0 and less become 1."""
    return 1 << max(count - 1, 0).bit_length()


def last_power_of_two(count: int) -> int:
    """Round down to a power of 2; 0 and less become 1."""
    return 1 << max(count, 1).bit_length() - 1


def eight_per_doubling(count: int, smallest: int) -> int:
    """Round up to one of 8 sizes per doubling, each a multiple of `smallest`, which is a power of 2."""
    return next_multiple(max(count, 1), max(smallest, last_power_of_two(count - 1) // 8))


def two_per_doubling_below(most: int) -> tuple[int, ...]:
    """Sizes from about an eighth of `most` up to it, ascending, at most 2 per doubling: 7 at most."""
    return tuple(sorted({ceil_divide(most * share, 16) for share in (2, 3, 4, 6, 8, 12, 16)}))
