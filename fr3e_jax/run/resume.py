"""The choice of the checkpoint that a run goes on from: the newest one that is whole.

A damaged one is reported with what is damaged in it, and the one before it is tried. All processes take the
same one: each says whether it could read its part, and what one of them could not read is damaged for all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from fr3e_jax.config import Config, ConfigError, as_written
from fr3e_jax.engine.unfinished import as_arrays, begin
from fr3e_jax.learner.groups import as_dict
from fr3e_jax.learner.state import TrainState
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.problems.difficulty import SuccessRates
from fr3e_jax.run.checkpoints import assemble, mesh_under, read_items, with_arrays
from fr3e_jax.run.queries import query_room
from fr3e_jax.run.run_dir import (
    LostSettingsError,
    MissingSettingsError,
    arrows,
    changes,
    numbered,
    parse_settings,
    refuse_differing,
)
from fr3e_jax.run.saved import (
    CHECKPOINTS,
    UNVERIFIED,
    DamagedError,
    Progress,
    Record,
    Saved,
    saved_at,
    saved_steps,
)
from fr3e_jax.run.storage import move, writing
from fr3e_jax.types import Queries, StateGroups

NOT_TOLD = {"run_dir", "resume", "compilation_cache", "mesh.data", "mesh.fsdp", "mesh.tensor"}
"""Settings whose changes are not told: those of the mesh follow from its shape, which is."""
DAMAGED = "damaged"  # the folder of a run directory that damaged checkpoints are moved to

Items = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A checkpoint that is whole.

    items: item -> path -> array, of the arrays that were asked for. damaged: step of a newer checkpoint ->
    what is damaged in it.
    """

    step: int
    record: Record
    items: Items
    damaged: dict[int, str]

    def messages(self, run: epath.PathLike) -> list[str]:
        """Lines for people on damaged and unverified checkpoints."""
        lines = [
            f"warning: the checkpoint of step {step} of {run} is damaged: {why}"
            for step, why in self.damaged.items()
        ]
        if self.damaged:
            lines.append(f"warning: that of step {self.step} is taken, the newest that is whole")
        if self.record.arrays is None:
            lines.append(f"the checkpoint of step {self.step}: {UNVERIFIED}")
        return lines


def newest_whole(run: epath.Path, steps: list[int], read: Callable[[Saved], Items], hosts: Hosts) -> Whole:
    """Find the newest of the checkpoints of `steps` that is whole. Every process calls this.

    Args:
      run: directory.
      steps: of the checkpoints to choose from; at least one.
      read: reads what is wanted of a checkpoint, without verifying it.
      hosts: all processes.

    Raises:
      ConfigError: none is whole.
      StorageError: one cannot be read now.
    """
    left, damaged = sorted(steps), dict[int, str]()
    while True:
        # As the first process sees the directory: another's listing may be older.
        following = str(left.pop()) if left and is_first() else ""
        following = hosts.said(following, "a checkpoint is chosen")
        if not following:
            break
        step = int(following)
        saved, why = None, ""
        items: Items = {}
        try:
            saved = saved_at(run, step)
            items = read(saved)
        except DamagedError as error:
            why = str(error)
        # Before what all do together, in which they would wait for one that could not read its part.
        why = hosts.said(why, f"the checkpoint of step {step} is read")
        if not why and saved is not None:
            try:
                saved.verify(items)
            except DamagedError as error:
                why = str(error)
            why = hosts.said(why, f"the checkpoint of step {step} is verified")
            if not why:
                return Whole(step, saved.record, items, damaged)
        damaged[step] = why
    reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
    which = " of that step" if len(damaged) == 1 else ""
    raise ConfigError(f"{run} holds no whole checkpoint{which} ({reasons}); restore one, or choose another")


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The point that a run goes on from.

    messages: lines for people. damaged: steps of the damaged checkpoints, which are not used.
    """

    state: TrainState
    carried: StateGroups
    progress: Progress
    messages: list[str]
    damaged: list[int]


def resume(
    run: epath.Path,
    config: Config,
    fresh: tuple[TrainState, StateGroups, Progress],
    hosts: Hosts,
    lost: LostSettingsError | None,
) -> Resumed:
    """Find where the run in a directory goes on: at its beginning where it has no checkpoint yet.

    Args:
      run: directory, which need not be there yet.
      config: settings of the run that is to go on.
      fresh: state, carried states and progress of its beginning; arrays are read into their layout.
      hosts: all processes.
      lost: why config.yaml does not say what the run was started with (`refuse_other_settings`).

    Raises:
      ConfigError: no checkpoint is whole, or it is of another run.
      StorageError: one cannot be read now.
    """
    state, carried, progress = fresh
    place = run / CHECKPOINTS
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{place} is not a directory; move it away, or choose another --run_dir")
    steps = saved_steps(run)
    if not hosts.said("some" if steps and is_first() else "", "whether there are checkpoints"):
        if lost is not None and not isinstance(lost, MissingSettingsError):
            raise ConfigError(f"{lost}; restore it, or delete it to begin this run anew")
        return Resumed(state, carried, progress, [], [])

    def read(saved: Saved) -> Items:
        # Before the arrays, whose shapes follow from the settings.
        refuse_other_run(saved.record, config, progress, str(run), lost)
        items = read_items(saved, state)
        usual = as_dict(carried)
        refuse_misshapen(items["carried"], {name: usual[name] for name in items["carried"]})
        refuse_other_questions(items.get("rates"), progress.rates)
        refuse_other_trees(items.get("unfinished"), config)
        return items

    whole = newest_whole(run, steps, read, hosts)
    messages = whole.messages(run)
    if lost is not None:
        known = (
            "only its seed and its problems are known"
            if whole.record.settings is None
            else "it is written again, with the settings that the checkpoint has"
        )
        messages.append(f"warning: {lost}: {known}")
    messages.extend(changed_settings(whole.record, config, mesh_under(state) or dict(hosts.mesh.shape)))
    reached = with_arrays(whole.record.progress, whole.items)
    return Resumed(*assemble(whole.items, state), reached, messages, sorted(whole.damaged))


def changed_settings(record: Record, config: Config, mesh: dict[str, int]) -> list[str]:
    """Say in a line what differs from the settings that a checkpoint was written with; no line without any.

    Args:
      record: of the checkpoint.
      config: settings that the run goes on with, which may go on from it.
      mesh: axis -> size, that its parameters lie on, which is that of updates.
    """
    changed = {}
    if record.settings is not None:
        changed = changes(parse_settings(record.settings), as_written(config), allowed=True)
    if record.mesh not in (None, mesh):
        changed["mesh"] = (record.mesh, mesh)
    changed = {name: values for name, values in changed.items() if name not in NOT_TOLD}
    return [f"settings changed since the checkpoint: {arrows(changed)}"] if changed else []


def refuse_other_run(
    record: Record, config: Config, progress: Progress, run: str, lost: LostSettingsError | None
) -> None:
    """Refuse a checkpoint that is not of the run that is to go on.

    Args:
      record: of the checkpoint.
      config: settings of the run.
      progress: its beginning, with its seed and the checksum of its problems.
      run: directory, for messages.
      lost: why config.yaml does not say what the run was started with.

    Raises:
      ConfigError: it is of another run.
    """
    if record.settings is not None:
        holder = f"{run} (as the checkpoint of step {record.progress.step} says)"
        refuse_differing(parse_settings(record.settings), config, holder, "that run had")
    if record.progress.seed != progress.seed:
        raise ConfigError(
            f"{run} was started with seed {record.progress.seed}, not {progress.seed}; restore it, or choose "
            "another --run_dir"
        )
    if record.progress.problems != progress.problems:
        raise ConfigError(
            f"the problems of data.source are not those that {run} was started with; restore them, "
            "or choose another --run_dir"
        )
    if record.settings is None and lost is not None and not isinstance(lost, MissingSettingsError):
        raise ConfigError(
            f"{lost}, and its checkpoints, of an earlier version, do not hold the settings; restore it, or "
            "delete it to go on with the settings that are given"
        )


def refuse_misshapen(carried: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Refuse carried states whose shapes, but for their number, or types are not those of the run.

    Raises:
      DamagedError: they are not.
    """
    shapes = [{name: (x.shape[1:], str(x.dtype)) for name, x in fields.items()} for fields in (carried, like)]
    if shapes[0] != shapes[1] or len({len(x) for x in jax.tree.leaves(dict(carried))}) != 1:
        raise DamagedError("carried is not of the shapes that the settings give")


def refuse_other_questions(found: Mapping[str, Any] | None, fresh: SuccessRates | None) -> None:
    """Refuse success rates that are not those of the run's questions.

    Args:
      found: arrays of the checkpoint by name, None where it has none.
      fresh: those of the beginning, None where the run remembers none.

    Raises:
      DamagedError: they are missing, or of another number of questions.
    """
    wanted = None if fresh is None else {name: x.shape for name, x in vars(fresh).items()}
    if wanted != (None if found is None else {name: x.shape for name, x in found.items()}):
        raise DamagedError("rates are not those of the run's questions")


def refuse_other_trees(found: Mapping[str, Any] | None, config: Config) -> None:
    """Refuse unfinished queries whose shapes are not those of the run.

    Args:
      found: arrays of the checkpoint by name, None where it has none.
      config: of the run.

    Raises:
      DamagedError: they are not.
    """
    if found is None:
        return
    queries = Queries(np.zeros((1, config.rollout.max_prompt), np.int32), *np.zeros((2, 1), np.int32))
    like = as_arrays(begin(queries, 0, query_room(config)))
    wanted = {name: x.shape[1:] for name, x in like.items()}
    if wanted != {name: x.shape[1:] for name, x in found.items()}:
        raise DamagedError("unfinished is not of the shapes that the settings give")


def set_aside(run: epath.Path, steps: list[int]) -> None:
    """Move damaged checkpoints out of the way of those that the run writes again; the first process does.

    Raises:
      StorageError: they could not be moved.
    """
    if not steps or not is_first():
        return
    with writing(run):
        for step in steps:
            place, number = run / DAMAGED / str(step), 0
            while numbered(place, number).exists():
                number += 1
            move(run / CHECKPOINTS / str(step), numbered(place, number))
