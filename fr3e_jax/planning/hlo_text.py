"""The text of a compiled program as data: array types and instructions (`jax.stages.Compiled.as_text`)."""

import dataclasses
import math
import re
from functools import cached_property

ITEM_BYTES = {
    "pred": 1,
    **{f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8},
}


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """The type of an array: number of elements, bytes, and size of each axis.

    in_memory: whether it lies in main memory, not in memory on the chip.
    """

    elements: int
    bytes: int
    in_memory: bool
    sizes: tuple[int, ...] = ()


def array_types(text: str) -> list[ArrayType]:
    """The arrays of a type, such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    arrays = []
    for kind, axes, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text):
        if kind in ITEM_BYTES:
            sizes = tuple(int(size) for size in axes.split(",") if size)
            elements = math.prod(sizes)
            in_memory = not re.search(r"S\([1-9]", layout)
            arrays.append(ArrayType(elements, elements * ITEM_BYTES[kind], in_memory, sizes))
    return arrays


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation, in parts.

    type: text of the result's type. operands: names of the instructions that it reads. line: the whole line.
    is_root: whether its result is the computation's.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @cached_property
    def arrays(self) -> list[ArrayType]:
        """Array types of the result."""
        return array_types(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction is fused from, or runs."""
        choices = re.findall(r"branch_computations=\{([^}]*)\}", self.line)
        single = re.findall(
            r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)", self.line
        )
        return single + re.findall(r"%([\w.\-]+)", "".join(choices))

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of numbers, such as `dimensions={0,1}`; () if it is absent."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.line)
        return tuple(int(x) for x in match[1].split(",") if x) if match else ()

    @property
    def stored(self) -> int:
        """Bytes of the result that lie in main memory."""
        return sum(array.bytes for array in self.arrays if array.in_memory)
