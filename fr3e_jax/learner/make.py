"""A learner from a run's settings: the same for training, for its plan, and in a notebook."""

from typing import Any

import jax
from flax import nnx

from fr3e_jax.config import LossConfig, OptimizerConfig, with_functions
from fr3e_jax.learner.splash_on_mesh import make_splash
from fr3e_jax.learner.state import make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.attention import attend_sequence
from fr3e_jax.parallel.mesh import Placement


def learner_of(
    graph: nnx.GraphDef[Any],
    placement: Placement,
    axes: Any,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    compute_dtype: Any,
    updates: int | None = None,
    on_tpu: bool | None = None,
) -> Learner:
    """Make the learner of a model, with the attention kernel of TPUs where it runs on them.

    Args:
      graph: static half of the model.
      placement: mesh and table for training.
      axes: logical axes of the parameters.
      loss, optimizer: those sections of a configuration.
      compute_dtype: type of matrix products.
      updates: the number of updates of the whole run; a constant learning rate does not need it.
      on_tpu: whether it runs on TPUs; by default whether jax's backend is one.

    Raises:
      ConfigError: the learning rate's schedule does not fit the run's length.
    """
    if on_tpu is None:
        on_tpu = jax.default_backend() == "tpu"
    return Learner(
        graph,
        placement,
        make_optimizer(optimizer, axes, updates),
        with_functions(loss),
        compute_dtype=compute_dtype,
        logit_chunk=optimizer.logit_chunk,
        remat=optimizer.remat,
        attend=make_splash(placement) if on_tpu else attend_sequence,
    )
