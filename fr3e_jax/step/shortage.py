"""The end of a run whose memory does not suffice: in which stage, what was alive, and what to lower.

Each process finds this out by itself. Where one of several runs out of memory alone, it ends with this
message; the others wait for it, and end with the message that one of them is gone (`parallel/waiting`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from fr3e_jax.config import Config
from fr3e_jax.parallel.memory import bytes_on_device, out_of_memory
from fr3e_jax.parallel.waiting import HostError, blocks_of
from fr3e_jax.run.saved import saved_steps
from fr3e_jax.run.storage import StorageError
from fr3e_jax.step.machine import host_memory

GIBIBYTE = 2**30
KV_CACHE_AXES = (5, 7)  # of what branches share, and of pages; no parameter has so many
LIKE_PARAMETERS = "copies or gradients"  # of parameters: the sampling copy, and what an update works on
OPTIONS_OF_SAMPLING = ("rollout.cache_gb", "rollout.queries")
OPTIONS_OF_UPDATES = ("optimizer.micro_tokens", "optimizer.logit_chunk")


class OutOfMemoryError(RuntimeError):
    """The memory does not suffice; the message says where, and what to lower."""


class StageOptions(NamedTuple):
    """A stage for people, and the options that lower its memory, all of which may change on resume."""

    name: str
    options: Sequence[str]


STAGES: Mapping[str, StageOptions] = {
    "first_return": StageOptions("first return", OPTIONS_OF_SAMPLING),
    "positions": StageOptions("the pass over kept trajectories", OPTIONS_OF_SAMPLING),
    "pilots": StageOptions("the pilot rollouts", OPTIONS_OF_SAMPLING),
    "explore": StageOptions("exploration", OPTIONS_OF_SAMPLING),
    "verify": StageOptions("the verdicts", OPTIONS_OF_SAMPLING),
    "mismatch": StageOptions("the forward pass before the update", OPTIONS_OF_UPDATES),
    "update": StageOptions("the update", OPTIONS_OF_UPDATES),
    "an evaluation": StageOptions("the evaluation", ("evaluate.rows",)),
}
"""Name of a block of `waiting` -> what it is. Other blocks are named as they are."""
OPTIONS_OF_ALL = (*OPTIONS_OF_SAMPLING, *OPTIONS_OF_UPDATES, "evaluate.rows")


def raise_shortage(
    error: BaseException,
    config: Config,
    directory: epath.Path,
    known: Mapping[str, Any],
    mesh: Mesh,
    settle: Callable[[], None],
) -> None:
    """Raise what a run ends with if an error says that memory is short; return otherwise.

    The arrays are counted before the error is gone, which holds those of the functions that it went through.

    Args:
      error: of the run.
      config: resolved.
      directory: of the run, with its checkpoints.
      known: what the arrays are -> a tree of them.
      mesh: of all devices.
      settle: waits until a checkpoint that is being written is on the disk.

    Raises:
      OutOfMemoryError: with one line.
    """
    if isinstance(error, HostError | StorageError) or (shortage := out_of_memory(error)) is None:
        return
    if jax.process_count() == 1:  # others may be gone, and a save needs all of them
        with contextlib.suppress(StorageError):
            settle()
    stage, step = stage_and_step(blocks_of(error))
    where = f"{stage.name}{f' of {step}' if step else ''}"
    alive = ", ".join(f"{name} {size / GIBIBYTE:.3g}" for name, size in arrays_alive(known).items())
    options = ", ".join(f"{name} ({option_value(config, name)})" for name in lowered(config, stage.options))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    raise OutOfMemoryError(
        f"the memory does not suffice ({shortage.rstrip('. ')}) for {where}; alive were, GiB of a device: "
        f"{alive or 'nothing'}{device_limit()}; this process holds {host_memory() / GIBIBYTE:.2f} GiB; "
        f"lower {options}, or spread the arrays over more devices or another mesh (now {shape}); "
        f"{way_on(directory)}"
    ) from error


def stage_and_step(places: Sequence[str]) -> tuple[StageOptions, str]:
    """Find (the stage, `step N` or nothing) in the names of the blocks that an error was raised in."""
    step = next((place for place in places if place.startswith("step ")), "")
    inner = places[-1] if places else "the start"
    if inner == step:
        return StageOptions("the work between stages", OPTIONS_OF_ALL), step
    return STAGES.get(inner, StageOptions(inner.replace("_", " "), OPTIONS_OF_ALL)), step


def lowered(config: Config, options: Sequence[str]) -> list[str]:
    """Name the options to lower as they are set: where rollout.queries is `auto`, what bounds it."""
    auto = config.rollout.queries == "auto"
    return ["rollout.max_queries" if auto and name == "rollout.queries" else name for name in options]


def option_value(config: Config, name: str) -> Any:
    """Read the value of `section.option`."""
    section, _, option = name.partition(".")
    return getattr(getattr(config, section), option)


def arrays_alive(known: Mapping[str, Any]) -> dict[str, int]:
    """Add up the bytes on a device of all arrays that are alive, by what they are.

    Args:
      known: what they are -> a tree of arrays, the first of which is that of the parameters; an update may
        have used them up.
    """
    group_of = {id(x): group for group, tree in known.items() for x in jax.tree.leaves(tree)}
    shapes = {x.shape for x in jax.tree.leaves(next(iter(known.values()), None))}
    sizes = dict.fromkeys((*known, LIKE_PARAMETERS, "KV caches", "other arrays"), 0)
    for array in jax.live_arrays():
        if array.is_deleted() or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        other = LIKE_PARAMETERS if array.shape in shapes else "other arrays"
        group = group_of.get(id(array), "KV caches" if array.ndim in KV_CACHE_AXES else other)
        sizes[group] += bytes_on_device(array)
    return {group: size for group, size in sizes.items() if size}


def device_limit() -> str:
    """Say how much the fullest device of this process holds, and may hold, where devices tell it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = "bytes_in_use", "bytes_limit"
    pairs = [tuple(one[name] for name in names) for one in stats if one.keys() >= set(names)]
    if not pairs:
        return ""
    used, limit = max(pairs)
    return f" ({used / GIBIBYTE:.2f} of {limit / GIBIBYTE:.2f} in use)"


def way_on(directory: epath.Path) -> str:
    """Say from which checkpoint the run goes on."""
    try:
        steps = saved_steps(directory)
    except StorageError:  # the shortage is what must be told
        return f"--run_dir {directory} goes on from its last checkpoint, with such a change"
    if not steps:
        return f"no step is saved in {directory}, so that the same command begins it anew"
    stands = f"the checkpoint of step {steps[-1]} stands"
    return f"{stands}, and --run_dir {directory} goes on from it with such a change"
