"""Slices of TPUs by the names that they are rented under, and the chips that they are made of."""

import dataclasses
import difflib
import re

import numpy as np

from fr3e_jax.config import ConfigError
from fr3e_jax.cost import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs, in numbers of one chip.

    kind: as JAX names it. usable: bytes of memory that XLA gives to programs. installed: bytes of memory.
    memory: bandwidth of that memory, bytes/s. link: bandwidth of one link to a neighbour in one direction,
    bytes/s. dimensions: of the torus. cores: TensorCores of a chip that the number in a slice's name counts.
    wraps: least size of a dimension whose two ends are connected; on three dimensions, what all of them have
    to divide by.
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
        """Peak FLOP/s of bfloat16 matrix products, as its maker states it."""
        return PEAK_FLOPS[self.kind]


# usable: what XLA names in its message about a program that is too large. Rates: cloud.google.com/tpu/docs
# and jax-ml.github.io/scaling-book.
TWO_DIMENSIONS = {"dimensions": 2, "cores": 1, "wraps": 16}
THREE_DIMENSIONS = {"dimensions": 3, "cores": 2, "wraps": 4}
CHIPS = {
    "v4": Chip(
        kind="TPU v4",
        usable=30.75 * GIB,
        installed=32 * GIB,
        memory=1.2e12,
        link=4.5e10,
        **THREE_DIMENSIONS,
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        usable=15.75 * GIB,
        installed=16 * GIB,
        memory=8.1e11,
        link=4.5e10,
        **TWO_DIMENSIONS,
    ),
    "v5p": Chip(
        kind="TPU v5",
        usable=95.74 * GIB,
        installed=96 * GIB,
        memory=2.765e12,
        link=9e10,
        **THREE_DIMENSIONS,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        usable=31.25 * GIB,
        installed=32 * GIB,
        memory=1.64e12,
        link=9e10,
        **TWO_DIMENSIONS,
    ),
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
"""Number of chips -> shape of a slice, for each number of dimensions of the torus."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPUs. name: as the user gave it. generation: key of `CHIPS`. shape: chips on each axis."""

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The chip that the slice is made of."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return int(np.prod(self.shape))

    @property
    def topology(self) -> str:
        """The name that JAX has for the slice, such as `v5e:4x4`."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether the two ends of a dimension are connected, for each dimension."""
        least = self.chip.wraps
        if len(self.shape) == 3:
            return (all(size % least == 0 for size in self.shape),) * 3
        return tuple(size >= least for size in self.shape)


def slice_names() -> list[str]:
    """The names of all slices, as they are rented."""
    return [
        f"{'v5litepod' if alias else generation}-{chips * chip.cores}"
        for generation, chip in CHIPS.items()
        for alias in ([False, True] if generation == "v5e" else [False])
        for chips in SHAPES[chip.dimensions]
    ]


def other_slices(tpu: Slice) -> list[Slice]:
    """The slices that may do where one is too small, in the order in which to try them.

    Those of the same generation with more chips come first, then those of other generations by their memory.
    """

    def known(generation: str) -> list[Slice]:
        chip = CHIPS[generation]
        shapes = SHAPES[chip.dimensions].items()
        return [Slice(f"{generation}-{chips * chip.cores}", generation, shape) for chips, shape in shapes]

    larger = [other for other in known(tpu.generation) if other.chips > tpu.chips]
    foreign = [other for generation in CHIPS if generation != tpu.generation for other in known(generation)]
    return [*larger, *sorted(foreign, key=lambda other: other.chips * other.chip.usable)]


def find_slice(name: str) -> Slice:
    """The slice of a name: `v5litepod-16`, `v5e-16`, `v5p-128`, or as JAX has it, `v5p:2x2x1`.

    The number of v4 and v5p counts TensorCores, two to a chip; that of v5e and v6e counts chips.

    Raises:
      ConfigError: there is no such slice; the message lists similar names.
    """
    known, wanted = slice_names(), name.strip().lower()
    if match := re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", wanted):
        generation = ALIASES.get(match[1], match[1])
        shape = tuple(map(int, match[2].split("x")))
        if generation in CHIPS and len(shape) == CHIPS[generation].dimensions and min(shape) > 0:
            return Slice(name, generation, shape)
    if match := re.fullmatch(r"([a-z0-9]+)-(\d+)", wanted):
        generation, count = ALIASES.get(match[1], match[1]), int(match[2])
        if generation in CHIPS:
            chip = CHIPS[generation]
            shapes = SHAPES[chip.dimensions]
            if count % chip.cores == 0 and count // chip.cores in shapes:
                return Slice(name, generation, shapes[count // chip.cores])
            similar = [n for n in known if n.startswith(f"{generation}-")]
            raise ConfigError(f"there is no slice {name!r}; {generation} comes as {', '.join(similar)}")
    similar = difflib.get_close_matches(wanted, known, 6, 0.4) or ["v4-8", "v5e-16", "v5p-8", "v6e-16"]
    raise ConfigError(
        f"there is no slice {name!r}; names are such as {', '.join(similar)}, or {', '.join(CHIPS)} with a "
        "shape, such as v5p:2x2x1"
    )
