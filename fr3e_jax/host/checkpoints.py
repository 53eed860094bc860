"""Checkpoints: what a run needs to go on as if nothing had happened.

A checkpoint is written beside the old ones and becomes visible in one rename, so a kill at any moment
leaves the last whole one.
"""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fr3e_jax.host.groups import as_dict, from_dict
from fr3e_jax.host.storage import absolute, writing
from fr3e_jax.learner.state import TrainState
from fr3e_jax.models.qwen2 import Params
from fr3e_jax.parallel.waiting import waiting
from fr3e_jax.types import StateGroups

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its arrays.

    Randomness is a function of (seed, step, query, branch, position), so that `step` and the seed are
    the whole random state. `seconds` is wall time, over all resumptions. `skipped` counts the updates that
    were skipped in a row up to here. `problems` is the checksum of the files that `data_position` counts in.
    `unreported` holds the metrics of `step` and a state to read until they are written: a run can be stopped
    in the evaluation that follows a step.
    """

    step: int = 0
    data_position: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    seed: int = 0
    skipped: int = 0
    problems: int = 0
    unreported: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of a run directory.

    The last `keep` are kept, and those of steps that `keep_every` divides. With None they are only read: none
    is deleted, and no directory is made.
    """

    def __init__(self, directory: epath.PathLike, keep: int | None, keep_every: int = 0) -> None:
        self.manager = ocp.CheckpointManager(
            absolute(directory) / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, create=keep is not None
            ),
        )

    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, carried: StateGroups, progress: Progress) -> None:
        """Start to save; returns when the arrays are copied, and writes in the background.

        Raises:
          StorageError: the bucket did not take this checkpoint, or the one before.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(as_leaves(state.params)),
            optimizer=ocp.args.StandardSave(as_leaves(state.optimizer)),
            carried=ocp.args.StandardSave(as_dict(carried)),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        )
        with writing(self.manager.directory), waiting("a save"):
            self.manager.save(progress.step, args=args)

    def save_last(self, state: TrainState, carried: StateGroups, progress: Progress) -> None:
        """Save where a run ends early, if that step is not saved yet, and wait for it."""
        if progress.step and progress.step != self.latest():
            self.save(state, carried, progress)
        self.close()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, StateGroups, Progress]:
        """Read a checkpoint into the layout of `like`, whatever mesh it was written from."""
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_leaves(like.params)),
                optimizer=ocp.args.StandardRestore(abstract_leaves(like.optimizer)),
                carried=ocp.args.StandardRestore(),
                progress=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            from_leaves(found.params, like.params), from_leaves(found.optimizer, like.optimizer)
        )
        return state, from_dict(found.carried), Progress(**found.progress)

    def parameter_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the parameters of a checkpoint."""
        # Not the manager's item_metadata, which knows only of items that it has saved or restored before.
        held = ocp.StandardCheckpointHandler().metadata(self.manager.directory / str(step) / "params")
        return {name: tuple(leaf.shape) for name, leaf in held.items()}

    def restore_params(self, step: int, like: Params) -> Params:
        """Read the parameters alone, into the shapes, types and shardings of `like`."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_leaves(like)))
        return from_leaves(self.manager.restore(step, args=args).params, like)

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          StorageError: the bucket did not take it.
        """
        with writing(self.manager.directory), waiting("a save"):
            self.manager.wait_until_finished()
            self.manager.close()


def as_leaves(tree: Any) -> dict[str, Any]:
    """Path -> array: names in the checkpoint do not depend on the libraries' container classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape."""
    return {name: tuple(leaf.shape) for name, leaf in as_leaves(tree).items()}


def abstract_leaves(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, type and sharding, as which a leaf is to be read."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in as_leaves(tree).items()
    }


def from_leaves(leaves: dict[str, Any], like: Any) -> Any:
    """The inverse of `as_leaves`, for a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in as_leaves(like)])
