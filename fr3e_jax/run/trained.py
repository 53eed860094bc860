"""The model that a run has trained, read from its checkpoints."""

import dataclasses
from typing import Any

import jax
from etils import epath

from fr3e_jax.config import ConfigError
from fr3e_jax.models.decoder import Params, abstract_params
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.hub import RUN_SETTINGS
from fr3e_jax.pretrained.model import PlacedModel, open_model
from fr3e_jax.run.checkpoints import abstract_leaves, from_leaves, shapes_of
from fr3e_jax.run.resume import Items, newest_whole
from fr3e_jax.run.run_dir import (
    LostSettingsError,
    holds_run,
    parse_settings,
    read_settings,
)
from fr3e_jax.run.saved import DamagedError, Saved, saved_at, saved_steps


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the parameters that a run had after a step.

    params: float32, in the layout for training. messages: lines for people on damaged and unverified
    checkpoints.
    """

    model: PlacedModel
    params: Params
    step: int
    messages: list[str]


def read_trained(run: epath.Path, step: int | None, name: str | None, hosts: Hosts) -> Trained:
    """Read the parameters of a checkpoint onto the mesh of `hosts`. Every process calls this.

    Args:
      run: directory.
      step: of the checkpoint; None takes the newest that is whole.
      name: of the model that the run started from, where it lies elsewhere than its config.yaml says.
      hosts: all processes, and the mesh to place them on.

    Raises:
      ConfigError: the run directory holds no such checkpoint, it is damaged, or not of this model.
      StorageError: it cannot be read now.
    """
    steps = steps_of(run, step)
    model = open_model(name or setting(run, "model", "path")).place(hosts.mesh)
    shapes = abstract_params(model.config)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        model.training.shardings(model.axes, shapes),
    )

    def read(saved: Saved) -> Items:
        if saved.shapes("params", shapes_of(like)) != shapes_of(like):
            raise ConfigError(
                f"{model.name} is not the model that {run} trained: the parameters' shapes differ"
            )
        return {"params": saved.read("params", abstract_leaves(like))}

    whole = newest_whole(run, steps, read, hosts)
    params = from_leaves(whole.items["params"], like)
    return Trained(model, params, whole.step, whole.messages(run))


def steps_of(run: epath.Path, step: int | None) -> list[int]:
    """List the steps of the checkpoints to choose from, ascending: `step` alone, or all where it is None.

    Raises:
      ConfigError: the run directory holds no such checkpoint.
    """
    if not holds_run(run):
        raise ConfigError(f"{run} is not a run directory: it holds no {RUN_SETTINGS}")
    steps = saved_steps(run)
    if not steps:
        raise ConfigError(f"{run} holds no checkpoint yet")
    if step is not None and step not in steps:
        held = ", ".join(map(str, steps))
        raise ConfigError(f"{run} holds no checkpoint of step {step}; it holds those of steps {held}")
    return steps if step is None else [step]


def setting(run: epath.Path, section: str, key: str, absent: Any = None) -> Any:
    """Read a run's setting `section.key` from its config.yaml, or from its checkpoints where that is lost.

    Args:
      run: directory.
      section, key: of the setting.
      absent: the value of runs that are older than the setting.

    Raises:
      ConfigError: neither has it.
    """
    try:
        held, why = [read_settings(run)], f"{run / RUN_SETTINGS} is damaged (it has no {section}.{key})"
    except LostSettingsError as error:
        held, why = [], str(error)
    for settings in (*held, *saved_settings(run)):
        try:
            return settings[section][key]
        except (TypeError, KeyError):
            continue
    if absent is not None:
        return absent
    raise ConfigError(f"{why}; restore it, or name a model in its place")


def saved_settings(run: epath.Path) -> list[dict[str, Any]]:
    """Read the settings from the newest checkpoint whose record is whole; a list of one, or of none."""
    for step in reversed(saved_steps(run)):
        try:
            text = saved_at(run, step).record.settings
        except DamagedError:
            continue
        return [] if text is None else [parse_settings(text)]
    return []
