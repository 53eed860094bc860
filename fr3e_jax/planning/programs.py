"""All programs of a step, compiled for a slice one after the other."""

from collections.abc import Callable, Collection, Iterator

from fr3e_jax.planning.rollout_programs import compile_rollouts
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.stages import Stage, StageCompiler, compile_cast, state_bytes
from fr3e_jax.planning.update_programs import compile_updates
from fr3e_jax.planning.workload import Workload


def compile_step(
    setup: Setup,
    work: Workload,
    started: Callable[[str, str], None],
    finished: Callable[[Stage, float], None],
    wanted: Collection[tuple[str, str]] | None = None,
) -> Iterator[Stage]:
    """Compile the programs of a step in their order.

    Programs that need the results of one that is too large are left out.

    Args:
      started: called with phase and program before it is compiled.
      finished: called with the stage and the seconds that it took.
      wanted: the programs to compile, as (phase, program), and with them those whose results they need; by
        default all.
    """
    compiler = StageCompiler(setup, state_bytes(setup), started, finished, wanted)
    yield from compile_cast(compiler)
    yield from compile_rollouts(compiler, work)
    yield from compile_updates(compiler, work)
