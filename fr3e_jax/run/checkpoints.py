"""Checkpoints: what a run needs to go on as if nothing had happened.

A checkpoint is written beside the old ones and becomes visible in one rename, so a kill at any moment
leaves the last whole one. `saved` lists and reads them, and `resume` chooses one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fr3e_jax.engine.unfinished import QueryRoom, as_arrays, begin, from_arrays
from fr3e_jax.learner.groups import LATER_FIELDS, as_dict, empty_groups, from_dict
from fr3e_jax.learner.state import TrainState
from fr3e_jax.parallel.waiting import waiting
from fr3e_jax.problems.difficulty import SuccessRates, unseen
from fr3e_jax.run.checksums import checksummed
from fr3e_jax.run.quiet import quiet_orbax
from fr3e_jax.run.saved import CHECKPOINTS, RECORD, DamagedError, Progress, Record, Saved
from fr3e_jax.run.storage import StorageError, absolute, writing
from fr3e_jax.types import Queries, StateGroups

NO_QUERIES = begin(
    Queries(*(np.zeros(shape, np.int32) for shape in ((0, 1), 0, 0))), 0, QueryRoom(1, 1, 1, 1, 1)
)


class Checkpoints:
    """Writes the checkpoints of a run directory."""

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int,
        keep_every: int = 0,
        settings: str | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the checkpoints of a run to write more. Every process does it together.

        Args:
          directory: of the run.
          keep: last checkpoints that are kept.
          keep_every: checkpoints of steps that this divides are kept too; 0 keeps none of them.
          settings: text of the run's config.yaml, which is saved in each checkpoint.
          before: called before each save, which must not be ahead of what it writes.

        Raises:
          StorageError: the directory cannot be made.
        """
        quiet_orbax()
        self.settings, self.before = settings, before
        place = absolute(directory) / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            lightweight_initialize=True,  # without orbax's notes on a checkpoint, which may be damaged
        )
        with writing(place):
            self.manager = ocp.CheckpointManager(place, options=options)

    def latest(self) -> int | None:
        """Return the step of the last checkpoint that is complete; None without any."""
        return max(self.manager.all_steps(), default=None)

    def save(self, state: TrainState, carried: StateGroups, progress: Progress) -> None:
        """Start to save: return when the arrays are copied, and write them in the background.

        Raises:
          StorageError: this checkpoint could not be written, or the one before.
        """
        if self.latest() == progress.step:
            return  # saved already by a run that was stopped in the evaluation after this step
        self.before()
        items = {
            "params": as_leaves(state.params),
            "optimizer": as_leaves(state.optimizer),
            "carried": as_dict(carried),
        }
        if progress.rates is not None:
            items["rates"] = vars(progress.rates)
        if progress.unfinished is not None:
            items["unfinished"] = as_arrays(progress.unfinished)
        sums = {item: checksummed(leaves) for item, leaves in items.items()}
        args = {item: ocp.args.StandardSave(leaves) for item, leaves in items.items()}
        args[RECORD] = ocp.args.JsonSave(Record(progress, self.settings, sums, mesh_under(state)).as_json())
        with writing(self.manager.directory), waiting("a save"):
            if not self.manager.save(progress.step, args=ocp.args.Composite(**args)):
                raise StorageError(
                    f"{self.manager.directory} holds a checkpoint of a later step than {progress.step}, "
                    "so that this one is not saved; move it away"
                )

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written in the background, if there is one.

        Raises:
          StorageError: it could not be written.
        """
        if not self.manager.is_saving_in_progress():
            with writing(self.manager.directory), waiting("a save"):
                self.manager.wait_until_finished()

    def save_last(self, state: TrainState, carried: StateGroups, progress: Progress) -> None:
        """Save where a run ends early, if that step is not saved yet, and wait for it.

        Raises:
          StorageError: it could not be written.
        """
        if progress.step and progress.step != self.latest():
            self.save(state, carried, progress)
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          StorageError: it could not be written.
        """
        with writing(self.manager.directory), waiting("a save"):
            self.manager.wait_until_finished()
            self.manager.close()


def read_items(saved: Saved, like: TrainState) -> dict[str, dict[str, Any]]:
    """Read item -> path -> array of a checkpoint into the layout of `like`, without verifying it.

    Raises:
      DamagedError: it is damaged.
      StorageError: it cannot be read now.
    """
    types = {name: x.dtype for name, x in as_dict(empty_groups(1, 1, 1)).items()}
    shapes = saved.shapes("carried", types)
    if not types.keys() - LATER_FIELDS <= shapes.keys() <= types.keys():
        raise DamagedError("carried has other arrays than states have")
    carried = {name: jax.ShapeDtypeStruct(shapes[name], types[name]) for name in shapes}
    items = {
        "params": saved.read("params", abstract_leaves(like.params)),
        "optimizer": saved.read("optimizer", abstract_leaves(like.optimizer)),
        "carried": saved.read("carried", carried),
    }
    kinds = {
        "rates": {name: x.dtype for name, x in vars(unseen(0)).items()},
        "unfinished": {name: x.dtype for name, x in as_arrays(NO_QUERIES).items()},
    }
    for item, types in kinds.items():
        if saved.record.arrays is not None and item in saved.record.arrays:
            found = saved.shapes(item, ())
            if found.keys() != types.keys():
                raise DamagedError(f"{item} holds other arrays than it should")
            like_found = {name: jax.ShapeDtypeStruct(found[name], kind) for name, kind in types.items()}
            items[item] = saved.read(item, like_found)
    return items


def assemble(items: dict[str, dict[str, Any]], like: TrainState) -> tuple[TrainState, StateGroups]:
    """Build the state and the carried states from what `read_items` returns."""
    params = from_leaves(items["params"], like.params)
    optimizer = from_leaves(items["optimizer"], like.optimizer)
    return TrainState(params, optimizer), from_dict(items["carried"])


def with_arrays(progress: Progress, items: dict[str, dict[str, Any]]) -> Progress:
    """Add the success rates and the unfinished queries of `read_items` to a checkpoint's progress."""
    if "rates" in items:
        rates = SuccessRates(**{name: np.asarray(x) for name, x in items["rates"].items()})
        progress = dataclasses.replace(progress, rates=rates)
    if "unfinished" in items:
        response = items["carried"]["token"].shape[2]
        progress = dataclasses.replace(progress, unfinished=from_arrays(items["unfinished"], response))
    return progress


def mesh_under(tree: Any) -> dict[str, int] | None:
    """Read axis -> size of the mesh that a tree's arrays lie on; None where they lie on none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(sharding := getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
            return dict(sharding.mesh.shape)
    return None


def as_leaves(tree: Any) -> dict[str, Any]:
    """Flatten a tree to path -> array, with paths that do not depend on the libraries' container classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Flatten a tree to path -> shape of its arrays."""
    return {name: tuple(leaf.shape) for name, leaf in as_leaves(tree).items()}


def abstract_leaves(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Flatten a tree to path -> shape, type and sharding, with which each array is to be read."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in as_leaves(tree).items()
    }


def from_leaves(leaves: dict[str, Any], like: Any) -> Any:
    """Undo `as_leaves` for a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in as_leaves(like)])
