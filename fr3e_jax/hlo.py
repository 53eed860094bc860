"""Reading a compiled program: what it moves, and how many bytes of memory it touches.

XLA's own count has the body of a loop once and on-chip memory as if it were memory; here a loop is counted as
often as it runs, and only what lies in main memory is. The text of `jax.stages.Compiled.as_text` is read.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import cached_property

ITEM_BYTES = {
    "pred": 1,
    **{f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8},
}
FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "while",
    "copy-done",
    "partition-id",
}
VIEWS = {"bitcast", "reshape", "copy-done", "get-tuple-element"}
PARTS = {"dynamic-slice", "slice", "gather"}
MOVES = {"copy", "copy-start", "transpose", "scatter", "concatenate", "all-gather", "all-to-all"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: elements, bytes, and whether it lies in main memory."""

    elements: int
    bytes: int
    in_memory: bool


def shapes_of(text: str) -> list[Shape]:
    """The arrays of a type, such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    found = []
    for kind, sizes, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text):
        if kind in ITEM_BYTES:
            elements = 1
            for size in filter(None, sizes.split(",")):
                elements *= int(size)
            found.append(Shape(elements, elements * ITEM_BYTES[kind], not re.search(r"S\([1-9]", layout)))
    return found


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @cached_property
    def shapes(self) -> list[Shape]:
        """What it returns."""
        return shapes_of(self.type)

    @property
    def called(self) -> list[str]:
        """Computations that it is made of, or runs."""
        return re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", self.line)

    @property
    def stored(self) -> int:
        """Bytes that it returns in main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.in_memory)


class Program:
    """The computations of a compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", ""
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
                current = re.sub(r"^(ENTRY )?%?", "", line).split(" ")[0]
                self.computations[current] = {}
                self.entry = current if line.startswith("ENTRY") else self.entry
            elif current and (match := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line)):
                root, name, rest = match.groups()
                if split := re.match(r"(\(.*?\)|\S+) ([\w\-]+)\((.*)", rest):
                    kind, operation, arguments = split.groups()
                    operands = tuple(re.findall(r"%([\w.\-]+)", arguments.split(")")[0]))
                    self.computations[current][name] = Instruction(
                        name, kind, operation, operands, line, bool(root)
                    )

    def moves(self, elements: int) -> list[str]:
        """Instructions that copy, transpose, scatter, join or exchange an array of that many elements."""
        return [
            f"{instruction.operation} {instruction.name}"
            for instructions in self.computations.values()
            for instruction in instructions.values()
            if instruction.operation in MOVES
            and any(shape.elements == elements for shape in instruction.shapes)
        ]

    def bytes(self, trips: Sequence[int]) -> int:
        """Bytes read and written in main memory.

        Args:
          trips: how often a loop runs: the outermost, one within it, and so on; loops further in once.
        """
        return self.bytes_of(self.entry, tuple(trips))

    def bytes_of(self, computation: str, trips: tuple[int, ...]) -> int:
        """Of one run of a computation."""
        total = 0
        instructions = self.computations[computation]
        for instruction in instructions.values():
            if instruction.operation == "while":
                body = re.search(r"body=%([\w.\-]+)", instruction.line)
                assert body is not None
                total += (trips or (1,))[0] * self.bytes_of(body[1], trips[1:])
            elif instruction.operation in ("call", "conditional"):
                total += sum(self.bytes_of(name, trips) for name in instruction.called)
            elif instruction.operation not in FREE and not instruction.operation.endswith("-done"):
                total += self.written(instruction, instructions)
                for place, operand in enumerate(instruction.operands):
                    if operand in instructions:
                        total += self.read(instruction, place, instructions[operand])
        return total

    def written(self, instruction: Instruction, others: dict[str, Instruction]) -> int:
        """Bytes that an instruction writes; of an update in place, the update."""
        if instruction.operation == "dynamic-update-slice":
            return others[instruction.operands[1]].stored if instruction.operands[1] in others else 0
        if instruction.operation == "copy-start":  # (destination, source, context)
            return sum(shape.bytes for shape in instruction.shapes[:1] if shape.in_memory)
        if instruction.operation.endswith("-start"):  # ((sources), destination, context)
            return sum(
                shape.bytes for shape in instruction.shapes[len(instruction.operands) :] if shape.in_memory
            )
        if instruction.operation == "fusion":
            inner = self.computations[instruction.called[0]]
            updates = [x for x in inner.values() if x.operation == "dynamic-update-slice"]
            in_place = sum(x.stored for x in updates)
            changed = sum(inner[x.operands[1]].stored for x in updates if x.operands[1] in inner)
            return max(instruction.stored - in_place, 0) + changed
        return instruction.stored

    def read(self, instruction: Instruction, place: int, operand: Instruction) -> int:
        """Bytes that an instruction reads of one operand: of what is sliced, the slice."""
        whole = operand.stored
        if instruction.operation == "dynamic-update-slice" and place == 0:
            return 0
        if instruction.operation == "slice-start":
            return min(whole, instruction.shapes[-2].bytes)
        if instruction.operation in PARTS and place == 0:
            return min(whole, sum(shape.bytes for shape in instruction.shapes))
        if instruction.operation == "fusion":
            return min(whole, self.read_within(instruction.called[0], place, whole))
        return whole

    def read_within(self, computation: str, place: int, whole: int) -> int:
        """Bytes that a fused computation reads of its parameter number `place`."""
        inner = self.computations[computation]
        names = [x.name for x in inner.values() if re.search(rf" parameter\({place}\)", x.line)]
        total = 0
        for name in names:
            for user in (x for x in inner.values() if name in x.operands):
                at = user.operands.index(name)
                if user.operation in VIEWS and not user.is_root:
                    names.append(user.name)
                elif user.operation == "dynamic-update-slice" and at == 0:
                    continue
                elif user.operation in PARTS and at == 0:
                    total += sum(shape.bytes for shape in user.shapes)
                elif user.operation == "fusion":
                    total += self.read_within(user.called[0], at, whole)
                else:
                    return whole
        return total
