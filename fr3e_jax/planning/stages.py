"""The programs of a step in their order, compiled for a slice, with the memory that is in use meanwhile."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from fr3e_jax.learner.state import sampling_cast
from fr3e_jax.planning.compiled import CompiledProgram, compile_program
from fr3e_jax.planning.decodes import LegWork
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.setup import Setup, bytes_on_chip
from fr3e_jax.planning.workload import Chunk

FREE_OF_COSTS = Costs()
NO_LOOPS: Mapping[str, Costs] = {}
ResultsStage = tuple["Stage", Any]
"""A stage, and the results of its program as abstract arrays; None if the program is too large."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A program in its place in the step.

    phase: of the step. held: bytes on a chip that are in use and not arguments of the program, by name. own:
    bytes of its arguments, by name. leg, chunk: what it was compiled for, if it decodes or runs rows of the
    update.
    """

    phase: str
    program: CompiledProgram
    held: Mapping[str, int]
    own: Mapping[str, int]
    leg: LegWork | None = None
    chunk: Chunk | None = None

    @property
    def total(self) -> int:
        """Bytes on a chip while the program runs. Arguments that it does not read are in use too."""
        unread = max(sum(self.own.values()) - self.program.arguments, 0)
        return self.program.peak + unread + sum(self.held.values())


@dataclasses.dataclass(frozen=True)
class StageCompiler:
    """Compiles the programs of a step, one at a time.

    always: bytes on a chip that are in use during the whole step, by name. started: called with phase and
    program before it is compiled. finished: called with the stage and the seconds that it took. wanted: the
    programs to compile, as (phase, program); None stands for all.
    """

    setup: Setup
    always: Mapping[str, int]
    started: Callable[[str, str], None]
    finished: Callable[[Stage, float], None]
    wanted: Collection[tuple[str, str]] | None = None

    def wants(self, phase: str, name: str = "") -> bool:
        """Whether a program is to be compiled; without a name, whether any of the phase is."""
        if self.wanted is None:
            return True
        return (phase, name) in self.wanted if name else phase in {wanted for wanted, _ in self.wanted}

    def __call__(
        self,
        phase: str,
        name: str,
        lower: Callable[[], Any],
        *,
        held: Mapping[str, int],
        own: Mapping[str, int],
        leg: LegWork | None = None,
        chunk: Chunk | None = None,
    ) -> ResultsStage:
        """Compile a program.

        Args:
          lower: returns the lowered program.
          Others: as in `Stage`.
        """
        self.started(phase, name)
        start = time.perf_counter()
        program, results = compile_program(name, lower(), self.setup.mesh)
        if program.refusal is not None:
            arguments = sum(own.values())
            rest = max(program.temporary - arguments, 0)
            program = dataclasses.replace(program, arguments=arguments, temporary=rest)
        stage = Stage(phase, program, held, own, leg, chunk)
        self.finished(stage, time.perf_counter() - start)
        return stage, results


def state_bytes(setup: Setup) -> dict[str, int]:
    """Bytes on a chip that are in use during the whole step, by name."""
    always = {
        "parameters": bytes_on_chip(setup.state.params),
        "optimizer": bytes_on_chip(setup.state.optimizer),
    }
    if setup.config.loss.kl_coefficient > 0:
        always["reference"] = bytes_on_chip(setup.params(jnp.float32))
    return always


def compile_cast(compiler: StageCompiler) -> Iterator[Stage]:
    """Compile the cast of the parameters to the copy for sampling."""
    if not compiler.wants("reshard", "cast"):
        return
    setup, params = compiler.setup, compiler.setup.state.params
    cast: Any = sampling_cast(setup.placements[1], setup.axes, setup.shapes, setup.dtype)
    stage, _ = compiler(
        "reshard",
        "cast",
        lambda: cast.lower(params),
        held=without(compiler.always, "parameters"),
        own={"parameters": compiler.always["parameters"]},
    )
    yield stage


def without(sizes: Mapping[str, int], *names: str) -> dict[str, int]:
    """The sizes but for those of some names."""
    return {name: size for name, size in sizes.items() if name not in names}


def stage_of(
    phase: str,
    name: str,
    held: dict[str, int],
    own: dict[str, int],
    *,
    results: float = 0.0,
    temporary: float = 0.0,
    once: Costs = FREE_OF_COSTS,
    loops: Mapping[str, Costs] = NO_LOOPS,
    leg: LegWork | None = None,
    chunk: Chunk | None = None,
) -> Stage:
    """A stage whose program is not compiled. results: bytes that do not take the place of arguments."""
    program = CompiledProgram(
        name,
        arguments=sum(own.values()),
        results=int(results),
        temporary=int(temporary),
        once=once,
        loops=loops,
        estimated=True,
    )
    return Stage(phase, program, held, own, leg, chunk)
