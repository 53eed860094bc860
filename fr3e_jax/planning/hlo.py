"""Reading a compiled program: what it moves, how many bytes of memory it touches, its FLOPs and collectives.

XLA's own count has the body of a loop once and on-chip memory as if it were memory; here a loop is counted as
often as it runs, and only what lies in main memory is. The text of `jax.stages.Compiled.as_text` is read.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

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
    """An array: its sizes, elements, bytes, and whether it lies in main memory."""

    elements: int
    bytes: int
    in_memory: bool
    sizes: tuple[int, ...] = ()


def shapes_of(text: str) -> list[Shape]:
    """The arrays of a type, such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    found = []
    for kind, sizes, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text):
        if kind in ITEM_BYTES:
            each = tuple(int(size) for size in sizes.split(",") if size)
            elements = math.prod(each)
            in_memory = not re.search(r"S\([1-9]", layout)
            found.append(Shape(elements, elements * ITEM_BYTES[kind], in_memory, each))
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
        choices = re.findall(r"branch_computations=\{([^}]*)\}", self.line)
        single = re.findall(
            r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)", self.line
        )
        return single + re.findall(r"%([\w.\-]+)", "".join(choices))

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of numbers, such as `dimensions={0,1}`; () where it is not there."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.line)
        return tuple(int(x) for x in found[1].split(",") if x) if found else ()

    @property
    def stored(self) -> int:
        """Bytes that it returns in main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.in_memory)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between chips, of one chip.

    kind: as XLA names it. times: how often it runs. size: bytes of the whole array: what is gathered, reduced
    or exchanged. group: the chips that take part, as numbers in the mesh in its order; () if all.
    """

    kind: str
    times: float
    size: int
    group: tuple[int, ...]

    def received(self, chips: int) -> float:
        """Bytes that a chip receives in all, by the algorithms of a ring.

        Args:
          chips: of the program.
        """
        n = len(self.group) or chips
        share = (n - 1) / n
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.size * factor.get(self.kind, share)


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


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

    def runs(
        self, trips: Sequence[float] = (), computation: str = "", times: float = 1.0
    ) -> Iterator[tuple[float, Instruction, dict[str, Instruction]]]:
        """Every instruction that runs, how often it does, and the computation that it is in.

        What a fusion is made of is not gone into. Of a choice every branch is run.

        Args:
          trips: how often loops run whose text does not say so: the outermost, one within it, and so on;
            loops further in once.
        """
        instructions = self.computations[computation or self.entry]
        for instruction in instructions.values():
            if instruction.operation == "while":
                body = re.search(r"body=%([\w.\-]+)", instruction.line)
                assert body is not None
                known = self.known_trips(instruction, instructions)
                count = known if known is not None else (*trips, 1)[0]
                yield from self.runs(trips[1:], body[1], times * count)
            elif instruction.operation in ("call", "conditional"):
                for name in instruction.called:
                    yield from self.runs(trips, name, times)
            else:
                yield times, instruction, instructions

    def known_trips(self, loop: Instruction, others: dict[str, Instruction]) -> int | None:
        """How often a loop runs, if its text says so: it counts from a constant up to another."""
        if told := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(told[1])
        condition = re.search(r"condition=%([\w.\-]+)", loop.line)
        held = self.computations.get(condition[1], {}) if condition else {}
        root = next((x for x in held.values() if x.is_root), None)
        if root is None or root.operation != "compare" or "direction=LT" not in root.line:
            return None
        counter, end = (held.get(name) for name in root.operands)
        if counter is None or end is None or end.operation != "constant":
            return None
        limit = re.search(r"constant\((\d+)\)", end.line)
        place = re.search(r"index=(\d+)", counter.line)
        if limit is None or place is None:
            return None
        start = self.start_of(others.get(loop.operands[0]), int(place[1]), others)
        return max(int(limit[1]) - start, 0)

    def start_of(self, value: Instruction | None, place: int, others: dict[str, Instruction]) -> int:
        """The constant that a loop's counter starts from; 0 where the text does not lead to one."""
        if value is not None and value.operation == "tuple":
            value = others.get(value.operands[place])
        while value is not None and value.operation in ("copy", "bitcast") and value.operands:
            value = others.get(value.operands[0])
        found = re.search(r" constant\((\d+)\)", value.line) if value is not None else None
        return int(found[1]) if found else 0

    def within(self, instruction: Instruction) -> Iterator[tuple[Instruction, dict[str, Instruction], str]]:
        """An instruction, or what it is made of where it is a fusion or runs on its own: (instruction, the
        computation that it is in, its name).
        """
        if instruction.operation not in ("fusion", "async-start"):
            return
        for name in instruction.called:
            for inner in self.computations[name].values():
                yield inner, self.computations[name], name
                yield from self.within(inner)

    def flops(self, trips: Sequence[float] = ()) -> float:
        """Multiplications and additions of matrix products and convolutions, those of kernels left out."""
        total = 0.0
        for times, instruction, others in self.runs(trips):
            total += times * product_flops(instruction, others)
            for inner, siblings, _ in self.within(instruction):
                total += times * product_flops(inner, siblings)
        return total

    def kernels(self, trips: Sequence[float] = ()) -> Iterator[tuple[float, Instruction]]:
        """Calls of hand-written kernels, and how often they run."""
        for times, instruction, _ in self.runs(trips):
            if 'custom_call_target="tpu_custom_call"' in instruction.line:
                yield times, instruction

    def collectives(self, trips: Sequence[float] = ()) -> list[Collective]:
        """Exchanges between chips. One that is spread over several fusions is counted once."""
        found, seen = [], set()
        for times, instruction, others in self.runs(trips):
            inside = [(instruction, others, ""), *self.within(instruction)]
            for inner, siblings, name in inside:
                kind = inner.operation.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.line)
                mark = (id(others), channel[1] if channel else inner.name)
                if mark in seen:
                    continue
                seen.add(mark)
                given = [siblings[x] for x in inner.operands if x in siblings]
                size = max(sum(x.bytes for x in inner.shapes), sum(x.bytes for y in given for x in y.shapes))
                if inner.operation.endswith("-start"):  # of (sources, destinations)
                    size -= min(size, sum(x.bytes for y in given for x in y.shapes))
                    size = max(size, *(x.bytes for x in inner.shapes))
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                found.append(Collective(kind, times, size, group_of(inner.line)))
        return found

    def bytes(self, trips: Sequence[float] = ()) -> int:
        """Bytes read and written in main memory.

        Args:
          trips: as for `runs`.
        """
        total = 0.0
        for times, instruction, others in self.runs(trips):
            if instruction.operation in FREE or instruction.operation.endswith("-done"):
                continue
            touched = self.written(instruction, others)
            for place, operand in enumerate(instruction.operands):
                if operand in others:
                    touched += self.read(instruction, place, others[operand])
            total += times * touched
        return int(total)

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


def product_flops(instruction: Instruction, others: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product or convolution, 0 of anything else."""
    if instruction.operation not in ("dot", "convolution"):
        return 0.0
    operands = [others[name].shapes[0].sizes for name in instruction.operands if name in others]
    if len(operands) < 2:
        return 0.0
    if instruction.operation == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * instruction.shapes[0].elements * math.prod(operands[0][i] for i in contracted)
    return convolution_flops(instruction, operands[0], operands[1])


def convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Of a convolution, in which form TPUs have matrix products; what falls on padding is not counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    result = instruction.shapes[0].sizes
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    spatial = [x for x in out if x.isdigit()]
    told = re.search(r"window=\{([^}]*)\}", instruction.line)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", told[1] if told else ""))
    for place, name in enumerate(spatial):
        sizes = left[lhs.index(name)], right[rhs.index(name)], result[out.index(name)]
        total *= valid_pairs(window, place, *sizes)
    return total


def valid_pairs(window: dict[str, str], place: int, size: int, kernel: int, result: int) -> int:
    """Pairs of a result and a place of the kernel that fall on the input, on one axis."""

    def part(name: str, otherwise: str) -> str:
        return window[name].split("x")[place] if name in window else otherwise

    stride, low = int(part("stride", "1")), int(part("pad", "0_0").split("_")[0])
    spread, apart = int(part("lhs_dilate", "1")), int(part("rhs_dilate", "1"))
    # For each place k: the results r with 0 <= r * stride - start <= end, and spread divides that. A batch of
    # products is a convolution with a kernel as long as the batch, too long for a table of all pairs.
    start = low - np.arange(kernel, dtype=np.int64) * apart
    common = math.gcd(stride, spread)
    period = spread // common
    first = start // common * pow(stride // common, -1, period) % period
    least = np.maximum(-(-start // stride), 0)
    most = np.minimum((start + (size - 1) * spread) // stride, result - 1)
    count = (most - first) // period - (least - 1 - first) // period
    return int(np.where((start % common == 0) & (most >= least), count, 0).sum())


def group_of(line: str) -> tuple[int, ...]:
    """The chips of the first group of a collective, () where it says none, which means all."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, iota = (tuple(map(int, found[i].split(","))) for i in (1, 2))
        chips = np.arange(math.prod(iota)).reshape(iota)
        if found[3]:
            chips = chips.transpose(tuple(map(int, found[3].split(","))))
        return tuple(map(int, chips.reshape(shape)[0]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        together = re.findall(r"'([^']+)'", found[2])
        chips = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = chips[tuple(slice(None) if name in together else 0 for name in sizes)]
        return tuple(map(int, first.reshape(-1)))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(map(int, filter(None, found[1].split(","))))
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(found[1]), int(found[2])
    return ()
