"""Compiling one program; its memory and costs on a chip."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.program_costs import Costs, costs_by_loop
from fr3e_jax.planning.setup import abstract


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """Memory and costs of a program, compiled or estimated. Bytes are those of one chip.

    arguments, results: bytes of arrays that go in and come out. aliased: bytes of results that take the place
    of arguments. temporary: bytes beside these, code included. once: costs of a run without its named loops;
    loops: costs of one run of the body of each, without the named loops in it. seconds: that compiling took.
    refusal: XLA's message if the program alone is too large, else None; then results and costs are not known,
    and `temporary` is all that XLA asked for beside the arguments. estimated: whether the numbers are
    arithmetic, not XLA's.
    """

    name: str
    arguments: int = 0
    results: int = 0
    aliased: int = 0
    temporary: int = 0
    once: Costs = dataclasses.field(default_factory=Costs)
    loops: Mapping[str, Costs] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    refusal: str | None = None
    estimated: bool = False

    @property
    def each(self) -> Costs:
        """Costs of a run in which every loop runs once, its named loops' alone."""
        return sum(self.loops.values(), Costs())

    @property
    def peak(self) -> int:
        """Bytes that are in use while the program runs."""
        return self.arguments + self.results - self.aliased + self.temporary


def compile_program(name: str, lowered: Any, mesh: Mesh) -> tuple[CompiledProgram, Any]:
    """Compile a lowered program, and read its memory and costs.

    Returns:
      (the program, its results as ShapeDtypeStructs with shardings, or None if it is too large).

    Raises:
      JaxRuntimeError: the compiler fails for another reason than memory.
    """
    started = time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        wanted, seconds = requested_bytes(message) or 0, time.perf_counter() - started
        return CompiledProgram(name, temporary=wanted, seconds=seconds, refusal=message), None
    seconds, text, memory = time.perf_counter() - started, executable.as_text(), executable.memory_analysis()
    assert text is not None and memory is not None
    once, loops = costs_by_loop(Program(text), mesh)
    results = jax.tree.map(
        lambda x, sharding: abstract(x.shape, x.dtype, sharding),
        lowered.out_info,
        executable.output_shardings,
    )
    compiled = CompiledProgram(
        name,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        once=once,
        loops=loops,
        seconds=seconds,
    )
    return compiled, results


def requested_bytes(message: str) -> int | None:
    """Bytes that XLA asked for, from its message that a program is too large; None if it does not say."""
    match = re.search(r"\(([\d.]+)([KMGT]?)\)? exceeds available", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message
    )
    if match is None:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
