"""The model that an evaluation asks: which checkpoint, with which text and limits, and its weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.settings import LONGEST, EvaluationConfig
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.pretrained.model import UnplacedModel, compute_type, open_model
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.run.build import Policy, policy_of
from fr3e_jax.run.run_dir import holds_run
from fr3e_jax.run.storage import location
from fr3e_jax.run.trained import Trained, read_trained, setting, steps_of


@dataclasses.dataclass(frozen=True)
class AskedModel:
    """A model by its configuration and text, without its weights.

    model: of a run the one that it began from. run: whether a run trained it.
    """

    model: UnplacedModel
    text: Text
    run: bool


def find_asked(config: EvaluationConfig) -> AskedModel:
    """Find the model of `config.model`, and the text that it is asked through."""
    run = location(config.model)
    template = None if config.template == "auto" else config.template
    if holds_run(run):
        model = open_model(setting(run, "model", "path"))
        stop = config.stop if config.stop is not None else setting(run, "rollout", "stop", [])
        text = load_text(model.source, template or setting(run, "data", "template"), stop)
        return AskedModel(model, text, True)
    model = open_model(config.model)
    text = load_text(model.source, template or "plain", config.stop or ())
    if template is None:
        text = dataclasses.replace(text, template="boxed_chat" if text.chats else "boxed")
    return AskedModel(model, text, False)


def with_limits(config: EvaluationConfig) -> EvaluationConfig:
    """Write out the longest answer and the least score, where they are left to the run that is evaluated."""
    run = location(config.model)

    def of_run(section: str, key: str, otherwise: Any) -> Any:
        return setting(run, section, key, otherwise) if holds_run(run) else otherwise

    return dataclasses.replace(
        config,
        max_response=config.max_response or of_run("rollout", "max_response", LONGEST),
        success_at=config.success_at or of_run("reward", "success_at", 1.0),
    )


def choose_step(
    config: EvaluationConfig, begun_with: int | None, hosts: Hosts, warn: Callable[[str], None]
) -> tuple[int | None, Trained | None]:
    """Choose the checkpoint that is asked, as the first process sees the run.

    Without --step an evaluation that goes on asks the checkpoint that it began with, whatever was saved
    since.

    Args:
      config: settings of the command.
      begun_with: the step of an evaluation that goes on; None of a new one. Used in the first process only.
      hosts: all processes.
      warn: shows a line on a checkpoint that is not as it should be.

    Returns:
      (the step, None where the model is of no run; the parameters, where they had to be read to find which
      checkpoint is whole).

    Raises:
      ConfigError: the run has no such checkpoint, none of it is whole, or the model is of no run.
    """
    run = location(config.model)
    if not holds_run(run):
        if config.step is not None:
            raise ConfigError(
                f"{config.model} is not a run directory, so there is no --step {config.step} of it"
            )
        return None, None
    step = -1
    if is_first():
        wanted = begun_with if config.step is None else config.step
        step = -1 if wanted is None else steps_of(run, wanted)[0]
    step = hosts.of_first(step + 1, "the checkpoint is chosen") - 1
    if step >= 0:
        return step, None
    trained = read_trained(run, None, None, hosts)
    if is_first():
        for line in trained.messages:
            warn(line)
    return trained.step, trained


def load_asked(
    config: EvaluationConfig, asked: AskedModel, trained: Trained | None, hosts: Hosts
) -> tuple[Policy, Params]:
    """Load the weights: of a run's checkpoint, or of the model itself.

    Args:
      config: settings of the command; of a run, with its step.
      asked: the model.
      trained: the checkpoint, if it was read already.
      hosts: all processes, and the mesh.

    Returns:
      (the model on the mesh, its parameters in the layout for sampling).
    """
    dtype: Any = compute_type(config.compute_dtype)
    if asked.run:
        trained = trained or read_trained(location(config.model), config.step, asked.model.name, hosts)
        policy = policy_of(trained.model, asked.text, dtype)
        return policy, policy.sampling_params(trained.params)
    policy = policy_of(asked.model.place(hosts.mesh), asked.text, dtype)
    return policy, policy.read()
