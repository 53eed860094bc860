"""Parameters and optimizer state, and where they lie."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from fr3e_jax.config import OptimizerConfig
from fr3e_jax.models.qwen2 import Params
from fr3e_jax.parallel.mesh import Placement, is_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes. Parameters and moments are float32.

    params: the model's parameters. optimizer: optax state.
    """

    params: Params
    optimizer: optax.OptState


def decayed(axes: Any) -> Any:
    """Which parameters weight decay holds for, a tree of bool: matrices, not norms and biases.

    Args:
      axes: tree of logical axes; every matrix, and nothing else, has an `embed` axis.
    """
    return jax.tree.map(lambda names: "embed" in names, axes, is_leaf=is_axes)


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """AdamW with linear warm-up, then a constant rate, after clipping by the global norm.

    Norms and biases are not decayed.

    Args:
      config: the run's optimizer section.
      axes: logical axes of the parameters.
    """
    warmup = max(config.warmup_updates, 1)
    schedule = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1))
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed(axes),
        ),
    )


def state_shardings(
    placement: Placement, optimizer: optax.GradientTransformation, axes: Any, params: Params
) -> TrainState:
    """NamedShardings of a TrainState: moments lie like their parameters, scalars everywhere."""
    params_at = placement.shardings(axes, params)
    everywhere = placement.sharding()
    optimizer_at = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        params_at,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params_at, optimizer_at)


def init_state(
    placement: Placement, optimizer: optax.GradientTransformation, axes: Any, params: Params
) -> TrainState:
    """A fresh TrainState on the mesh from parameters on the host or anywhere else."""
    at = state_shardings(placement, optimizer, axes, params)
    placed = jax.device_put(params, at.params)
    moments = jax.jit(optimizer.init, out_shardings=at.optimizer)(placed)
    return TrainState(placed, moments)


def sampling_cast(placement: Placement, axes: Any, shapes: Params, dtype: Any) -> Callable[[Params], Params]:
    """The one cast and reshard of a step: float32 parameters -> the parameters as the engine reads them.

    Args:
      placement: mesh and *sampling* table.
      axes: logical axes of the parameters.
      shapes: the parameters, or their shapes.
      dtype: compute dtype.
    """
    return jax.jit(
        lambda params: jax.tree.map(lambda x: x.astype(dtype), params),
        out_shardings=placement.shardings(axes, shapes),
    )
