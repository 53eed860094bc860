"""Collectives of a compiled program: which chips exchange how many bytes."""

import dataclasses
import math
import re

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between chips, as one chip takes part in it.

    kind: as XLA names it. times: number of times that it runs. size: bytes of the whole array that is
    gathered, reduced or exchanged. group: the chips that take part, numbered in the order of the mesh; ()
    stands for all chips.
    """

    kind: str
    times: float
    size: int
    group: tuple[int, ...]

    def received(self, chips: int) -> float:
        """Bytes that one chip receives over all runs, by the algorithms of a ring.

        Args:
          chips: number of chips that the program runs on.
        """
        n = len(self.group) or chips
        share = (n - 1) / n
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.size * factor.get(self.kind, share)


def group_of(line: str) -> tuple[int, ...]:
    """The first group of chips that an instruction's text names; () if it names none, which means all."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, iota = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        chips = np.arange(math.prod(iota)).reshape(iota)
        if match[3]:
            chips = chips.transpose(tuple(map(int, match[3].split(","))))
        return tuple(map(int, chips.reshape(shape)[0]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        together = re.findall(r"'([^']+)'", match[2])
        chips = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = chips[tuple(slice(None) if name in together else 0 for name in sizes)]
        return tuple(map(int, first.reshape(-1)))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(map(int, filter(None, match[1].split(","))))
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(match[1]), int(match[2])
    return ()
