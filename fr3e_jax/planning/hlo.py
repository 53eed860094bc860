"""Reading a compiled program: its FLOPs, the bytes of main memory that it touches, its collectives and moves.

XLA's own count takes the body of a loop once, and memory on the chip as if it were main memory. Here a loop
counts as often as it runs, and only arrays in main memory count.
"""

import re
from collections.abc import Iterator, Mapping

from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.planning.hlo_collectives import COLLECTIVES, Collective, group_of
from fr3e_jax.planning.hlo_flops import product_flops
from fr3e_jax.planning.hlo_text import Instruction

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

Computation = dict[str, Instruction]
"""The instructions of a computation by name."""


EVERY_LOOP_ONCE: Mapping[str, float] = {}


def loop_name(loop: Instruction) -> str:
    """The name that `jax.named_scope` gave a loop where it was written; "" where it has none.

    A loop in the body of another without a name of its own is `body/while`.
    """
    match = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/while"', loop.line)
    return match[1] if match and match[1] != "body" else ""


class Program:
    """The computations of a compiled program by name; `entry` names the one that starts."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
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
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.operation in MOVES
            and any(array.elements == elements for array in instruction.arrays)
        ]

    def runs(
        self, trips: Mapping[str, float] = EVERY_LOOP_ONCE, name: str = "", times: float = 1.0
    ) -> Iterator[tuple[float, Instruction, Computation]]:
        """Iterate over the instructions that run: (number of runs, instruction, its computation).

        The instructions inside of a fusion are not listed. Of a conditional, every branch is taken.

        Args:
          trips: number of runs of loops whose text does not state it, by their names. Others count once.
          name: of the computation; the entry by default.
          times: number of runs of the computation.
        """
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            if instruction.operation == "while":
                body = re.search(r"body=%([\w.\-]+)", instruction.line)
                assert body is not None
                known = self.known_trips(instruction, computation)
                count = known if known is not None else trips.get(loop_name(instruction), 1.0)
                yield from self.runs(trips, body[1], times * count)
            elif instruction.operation in ("call", "conditional"):
                for called in instruction.called:
                    yield from self.runs(trips, called, times)
            else:
                yield times, instruction, computation

    def loops(self, name: str = "", around: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
        """The named loops whose number of runs the text does not state -> names of those around each.

        Args:
          name: of the computation; the entry by default. around: names of the loops that it is in.
        """
        found: dict[str, tuple[str, ...]] = {}
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            if instruction.operation not in ("while", "call", "conditional"):
                continue
            inside = around
            if instruction.operation == "while" and self.known_trips(instruction, computation) is None:
                own = loop_name(instruction)
                if own:
                    found[own] = around
                    inside = (*around, own)
            for called in instruction.called:
                found |= self.loops(called, inside)
        return found

    def known_trips(self, loop: Instruction, computation: Computation) -> int | None:
        """Number of runs of a loop that counts from one constant up to another; None for other loops.

        XLA unrolls loops whose weights come shard by shard: their bodies have two products, and count by 2.
        """
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(match[1])
        name = re.search(r"condition=%([\w.\-]+)", loop.line)
        condition = self.computations.get(name[1], {}) if name else {}
        root = next((x for x in condition.values() if x.is_root), None)
        if root is None or root.operation != "compare" or "direction=LT" not in root.line:
            return None
        counter, end = (condition.get(operand) for operand in root.operands)
        if counter is None or end is None or end.operation != "constant":
            return None
        limit = re.search(r"constant\((\d+)\)", end.line)
        index = re.search(r"index=(\d+)", counter.line)
        if limit is None or index is None:
            return None
        start = self.start_of(computation.get(loop.operands[0]), int(index[1]), computation)
        return ceil_divide(max(int(limit[1]) - start, 0), self.step_of(loop, int(index[1])))

    def step_of(self, loop: Instruction, index: int) -> int:
        """The constant that a loop adds to its counter in each run; 1 if the text does not lead to one.

        Args:
          index: of the counter in the loop's tuple.
        """
        name = re.search(r"body=%([\w.\-]+)", loop.line)
        body = self.computations.get(name[1], {}) if name else {}
        root = next((x for x in body.values() if x.is_root), None)
        if root is None or root.operation != "tuple":
            return 1
        count = body.get(root.operands[index])
        if count is None or count.operation != "add":
            return 1
        steps = (body[operand].line for operand in count.operands if operand in body)
        found = [match[1] for line in steps if (match := re.search(r" constant\((\d+)\)", line))]
        return int(found[0]) if found else 1

    def start_of(self, value: Instruction | None, index: int, computation: Computation) -> int:
        """The constant that a loop's counter starts from; 0 if the text does not lead to a constant.

        Args:
          value: the loop's operand, a tuple.
          index: of the counter in the tuple.
        """
        if value is not None and value.operation == "tuple":
            value = computation.get(value.operands[index])
        while value is not None and value.operation in ("copy", "bitcast") and value.operands:
            value = computation.get(value.operands[0])
        match = re.search(r" constant\((\d+)\)", value.line) if value is not None else None
        return int(match[1]) if match else 0

    def within(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation, str]]:
        """Iterate over the instructions inside of a fusion or an asynchronous start.

        Yields:
          (instruction, its computation, the computation's name).
        """
        if instruction.operation not in ("fusion", "async-start"):
            return
        for name in instruction.called:
            for inner in self.computations[name].values():
                yield inner, self.computations[name], name
                yield from self.within(inner)

    def flops(self, trips: Mapping[str, float] = EVERY_LOOP_ONCE) -> float:
        """FLOPs of matrix products and convolutions, without those of kernels.

        Args:
          trips: as for `runs`.
        """
        total = 0.0
        for times, instruction, computation in self.runs(trips):
            total += times * product_flops(instruction, computation)
            for inner, siblings, _ in self.within(instruction):
                total += times * product_flops(inner, siblings)
        return total

    def kernels(self, trips: Mapping[str, float] = EVERY_LOOP_ONCE) -> Iterator[tuple[float, Instruction]]:
        """Iterate over calls of hand-written kernels: (number of runs, instruction)."""
        for times, instruction, _ in self.runs(trips):
            if 'custom_call_target="tpu_custom_call"' in instruction.line:
                yield times, instruction

    def collectives(self, trips: Mapping[str, float] = EVERY_LOOP_ONCE) -> list[Collective]:
        """Exchanges between chips. One that is spread over several fusions counts once."""
        collectives, seen = [], set()
        for times, instruction, computation in self.runs(trips):
            inside = [(instruction, computation, ""), *self.within(instruction)]
            for inner, siblings, name in inside:
                kind = inner.operation.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.line)
                key = (id(computation), channel[1] if channel else inner.name)
                if key in seen:
                    continue
                seen.add(key)
                operands = [siblings[x] for x in inner.operands if x in siblings]
                operand_bytes = sum(x.bytes for operand in operands for x in operand.arrays)
                size = max(sum(x.bytes for x in inner.arrays), operand_bytes)
                if inner.operation.endswith("-start"):  # of (sources, destinations)
                    size -= min(size, operand_bytes)
                    size = max(size, *(x.bytes for x in inner.arrays))
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                collectives.append(Collective(kind, times, size, group_of(inner.line)))
        return collectives

    def bytes(self, trips: Mapping[str, float] = EVERY_LOOP_ONCE) -> int:
        """Bytes that are read and written in main memory.

        Args:
          trips: as for `runs`.
        """
        total = 0.0
        for times, instruction, computation in self.runs(trips):
            if instruction.operation in FREE or instruction.operation.endswith("-done"):
                continue
            touched = self.written(instruction, computation)
            for index, operand in enumerate(instruction.operands):
                if operand in computation:
                    touched += self.read(instruction, index, computation[operand])
            total += times * touched
        return int(total)

    def written(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes that an instruction writes; for an update in place, the bytes of the update."""
        if instruction.operation == "dynamic-update-slice":
            update = instruction.operands[1]
            return computation[update].stored if update in computation else 0
        if instruction.operation == "copy-start":  # (destination, source, context)
            return sum(array.bytes for array in instruction.arrays[:1] if array.in_memory)
        if instruction.operation.endswith("-start"):  # ((sources), destination, context)
            results = instruction.arrays[len(instruction.operands) :]
            return sum(array.bytes for array in results if array.in_memory)
        if instruction.operation == "fusion":
            inner = self.computations[instruction.called[0]]
            updates = [x for x in inner.values() if x.operation == "dynamic-update-slice"]
            in_place = sum(x.stored for x in updates)
            changed = sum(inner[x.operands[1]].stored for x in updates if x.operands[1] in inner)
            return max(instruction.stored - in_place, 0) + changed
        return instruction.stored

    def read(self, instruction: Instruction, index: int, operand: Instruction) -> int:
        """Bytes that an instruction reads of operand number `index`; of a slice, the bytes of the slice."""
        size = operand.stored
        if instruction.operation == "dynamic-update-slice" and index == 0:
            return 0
        if instruction.operation == "slice-start":
            return min(size, instruction.arrays[-2].bytes)
        if instruction.operation in PARTS and index == 0:
            return min(size, sum(array.bytes for array in instruction.arrays))
        if instruction.operation == "fusion":
            return min(size, self.read_within(instruction.called[0], index, size))
        return size

    def read_within(self, name: str, index: int, size: int) -> int:
        """Bytes that a fused computation reads of its parameter number `index`, which has `size` bytes."""
        inner = self.computations[name]
        aliases = [x.name for x in inner.values() if re.search(rf" parameter\({index}\)", x.line)]
        total = 0
        for alias in aliases:  # grows while it is read
            for user in (x for x in inner.values() if alias in x.operands):
                place = user.operands.index(alias)
                if user.operation in VIEWS and not user.is_root:
                    aliases.append(user.name)
                elif user.operation == "dynamic-update-slice" and place == 0:
                    continue
                elif user.operation in PARTS and place == 0:
                    total += sum(array.bytes for array in user.arrays)
                elif user.operation == "fusion":
                    total += self.read_within(user.called[0], place, size)
                else:
                    return size
        return total
