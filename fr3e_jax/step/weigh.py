"""What a step does to its batch before it is updated on, by the options of the loss."""

from fr3e_jax.config import Config
from fr3e_jax.cost import forward_flops
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.weights import weighed, with_masks
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.metrics import Metrics
from fr3e_jax.types import StateGroups


def weigh(
    config: Config, parts: Parts, state: TrainState, batch: StateGroups, watch: Stopwatch
) -> tuple[StateGroups, Metrics]:
    """Weigh the tokens of a batch, and measure the forward pass that loss.mismatch takes.

    Args:
      config: resolved.
      parts: as `build` makes them from it.
      state: with the parameters that sampled; of states that were carried, those of the step before did.
      batch: the states that are trained on, with all of their rollouts.
      watch: takes the time of the forward pass.

    Returns:
      (the batch, metrics of the mismatch and FLOPs of its forward pass, where there is one).
    """
    if config.loss.mismatch == "none" or not groups.count(batch):
        return with_masks(batch, config.loss), {}
    with watch.stage("mismatch"):
        batch, metrics, bundles = weighed(parts.learner, state.params, batch, config.optimizer.micro_tokens)
    return batch, metrics | {"flops/mismatch": forward_flops(parts.policy.model.config, bundles)}
