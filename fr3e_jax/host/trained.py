"""The model of a run, out of its checkpoints."""

from typing import Any

import jax
import yaml
from etils import epath
from jax.sharding import Mesh

from fr3e_jax.config import ConfigError
from fr3e_jax.host.checkpoints import CHECKPOINTS, Checkpoints, shapes_of
from fr3e_jax.host.model import PlacedModel, open_model
from fr3e_jax.host.run_dir import CONFIG_FILE
from fr3e_jax.models.qwen2 import Params, abstract_params


def is_run(directory: epath.Path) -> bool:
    """Whether a directory is one of a run."""
    return (directory / CONFIG_FILE).is_file()


def read_trained(
    run: epath.Path, step: int | None, name: str | None, mesh: Mesh
) -> tuple[PlacedModel, Params, int]:
    """The parameters of a checkpoint, on whatever mesh is here.

    Args:
      run: directory.
      step: of the checkpoint; None takes the last.
      name: of the model that the run started from, where it lies elsewhere than its config.yaml says.
      mesh: to place them on.

    Returns:
      (the model, its parameters in float32 in the layout for training, the step).

    Raises:
      ConfigError: the run directory holds no such checkpoint, or it is not of this model.
    """
    step = step_of(run, step)
    checkpoints = Checkpoints(run, keep=None)
    model = open_model(name or setting(run, "model", "path")).place(mesh)
    shapes = abstract_params(model.config)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        model.training.shardings(model.axes, shapes),
    )
    if checkpoints.parameter_shapes(step) != shapes_of(like):
        raise ConfigError(f"{model.name} is not the model that {run} trained: the parameters' shapes differ")
    params = checkpoints.restore_params(step, like)
    checkpoints.close()
    return model, params, step


def step_of(run: epath.Path, step: int | None) -> int:
    """The checkpoint that is meant: of this step, or where it is None the last.

    Raises:
      ConfigError: the run directory holds no such checkpoint.
    """
    if not is_run(run):
        raise ConfigError(f"{run} is not a run directory: it holds no {CONFIG_FILE}")
    if not (run / CHECKPOINTS).is_dir():
        raise ConfigError(f"{run} holds no checkpoint yet")
    checkpoints = Checkpoints(run, keep=None)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise ConfigError(f"{run} holds no checkpoint yet")
    if step is not None and step not in steps:
        held = ", ".join(map(str, steps))
        raise ConfigError(f"{run} holds no checkpoint of step {step}; it holds those of steps {held}")
    return steps[-1] if step is None else step


def setting(run: epath.Path, section: str, key: str) -> Any:
    """What a run's config.yaml says of `section.key`.

    Raises:
      ConfigError: it is damaged.
    """
    try:
        return yaml.safe_load((run / CONFIG_FILE).read_text())[section][key]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{run / CONFIG_FILE} is damaged ({error}); restore it, or name a model in its place"
        ) from None
