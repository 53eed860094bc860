"""Parameters and optimizer state, and where they lie."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import BFloat16, Float32, Key

from fr3e_jax.config import ConfigError, OptimizerConfig
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.mesh import Placement, is_axes
from fr3e_jax.types import pytree


@pytree
class TrainState:
    """Everything that an update changes."""

    params: Params
    """The model's parameters, float32."""
    optimizer: Any
    """The state of the optax optimizer. Moments are float32 unless `optimizer.moments` is bfloat16."""


def decayed(axes: Any) -> Any:
    """Tell which parameters weight decay holds for, a tree of bool: matrices, not norms and biases.

    Args:
      axes: tree of logical axes; every matrix, and nothing else, has an `embed` axis.
    """
    return jax.tree.map(lambda names: "embed" in names, axes, is_leaf=is_axes)


def make_schedule(config: OptimizerConfig, updates: int | None = None) -> optax.Schedule:
    """Make the learning rate, a function of the number of updates taken before.

    Linear warm-up: update i of w, counted from 0, has (i + 1) / w of the rate. The decay starts from the
    whole rate at update w and would reach its end at update `updates`, the first that the run does not make.

    Args:
      config: the run's optimizer section.
      updates: the number of updates of the whole run; `constant` does not need it.

    Raises:
      ConfigError: a decaying schedule without a length, or one that warm-up takes all of.
    """
    # Not optax.warmup_cosine_decay_schedule: its warm-up of w updates reaches the rate one update later.
    warmup = max(config.warmup_updates, 1)
    rising = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1))
    if config.schedule == "constant":
        return rising
    if updates is None or updates <= config.warmup_updates:
        raise ConfigError(
            f"optimizer.schedule {config.schedule} needs a run of known length, with more updates than "
            f"optimizer.warmup_updates {config.warmup_updates}; set steps, or use --optimizer.schedule "
            "constant"
        )
    rate, rest, share = config.learning_rate, updates - config.warmup_updates, config.final_rate_share
    if config.schedule == "linear":
        falling = optax.linear_schedule(rate, share * rate, rest)
    else:
        falling = optax.cosine_decay_schedule(rate, rest, alpha=share)
    return optax.join_schedules([rising, falling], [config.warmup_updates])


def make_optimizer(
    config: OptimizerConfig, axes: Any, updates: int | None = None
) -> optax.GradientTransformation:
    """Make AdamW with warm-up and schedule, after clipping by the global norm.

    Norms and biases are not decayed.

    Args:
      config: the run's optimizer section.
      axes: logical axes of the parameters.
      updates: the number of updates of the whole run; `constant` does not need it.

    Raises:
      ConfigError: the schedule does not fit the run's length.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    # With the rate in the state, `apply_gradient` can report it.
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        with_bfloat16_moments(adam) if config.moments == "bfloat16" else adam,
        optax.add_decayed_weights(config.weight_decay, decayed(axes)),
        scale(learning_rate=make_schedule(config, updates)),
    )


def with_bfloat16_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make an Adam whose moments are held in bfloat16 and computed in float32.

    Rounded to the nearest, a moment would not move by less than 1/512 to 1/256 of itself: with b2 = 0.999 the
    second could never fall. Rounded at random, it moves by the right amount on average, whatever b1 and b2
    are. (optax.scale_by_adam holds the first moment alone in another dtype, and rounds it to the nearest.)

    Args:
      adam: `optax.scale_by_adam`.
    """

    def cast(state: optax.OptState, to: Callable[[Array, int], Array]) -> optax.OptState:
        leaves, tree = jax.tree.flatten((state.mu, state.nu))
        mu, nu = jax.tree.unflatten(tree, [to(leaf, i) for i, leaf in enumerate(leaves)])
        return state._replace(mu=mu, nu=nu)

    # optax calls both with trees of its own, too.
    def init(params: Any) -> optax.OptState:
        return cast(adam.init(params), lambda x, _: x.astype(jnp.bfloat16))

    def update(gradient: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        exact = cast(state, lambda x, _: x.astype(jnp.float32))
        changes, exact = adam.update(gradient, exact, params)
        # The noise is a function of the update and the leaf, so that a resumed run repeats it.
        key = jax.random.fold_in(jax.random.key(0), state.count)
        return changes, cast(exact, lambda x, i: round_at_random(x, jax.random.fold_in(key, i)))

    return optax.GradientTransformation(init, update)


def round_at_random(x: Float32[Array, "*axes"], key: Key[Array, ""]) -> BFloat16[Array, "*axes"]:
    """Round to one of the two neighbouring bfloat16 numbers, drawn so that the expectation is x.

    Numbers must be finite: an infinity may become nan.
    """
    # bfloat16 is the upper half of float32: random bits carry into it as often as the lower half says.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Params, loss: Float32[Array, ""]
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """Take one optimizer step, or none where loss or gradient are not finite.

    A skipped step leaves parameters, moments and the schedule's count as they are, bit for bit. Pure; jitted
    by the caller. (optax.apply_if_finite does not look at the loss or at the gradient's norm, takes a step
    that is not finite after too many in a row, and would add counters to the state that checkpoints hold.)

    Args:
      optimizer: made by `make_optimizer`, or any other.
      state: parameters and optimizer state.
      gradient: float32, of the parameters' shapes.
      loss: of the minibatch.

    Returns:
      (the state, metrics): `skipped`, 1 or 0, and `learning_rate`, of the last step taken, where it is in the
      optimizer's state.
    """
    # The norm is finite only if every element is, and clipping needs it anyway.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
    changes, moments = optimizer.update(gradient, state.optimizer, state.params)
    stepped = TrainState(optax.apply_updates(state.params, changes), moments)
    # A choice by element is part of the step's own loops and costs no memory, which a branch does.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    metrics = {"skipped": 1.0 - finite.astype(jnp.float32)}
    rate = optax.tree.get(state.optimizer, "learning_rate", filtering=lambda _, x: isinstance(x, Array))
    return state, metrics if rate is None else metrics | {"learning_rate": rate}


def state_shardings(
    placement: Placement, optimizer: optax.GradientTransformation, axes: Any, params: Params
) -> TrainState:
    """Make the NamedShardings of a TrainState: moments as their parameters, scalars on every device."""
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
    """Make a fresh TrainState on the mesh from parameters on the host or anywhere else."""
    at = state_shardings(placement, optimizer, axes, params)
    placed = jax.device_put(params, at.params)
    moments = jax.jit(optimizer.init, out_shardings=at.optimizer)(placed)
    return TrainState(placed, moments)


def sampling_cast(placement: Placement, axes: Any, shapes: Params, dtype: Any) -> Callable[[Params], Params]:
    """Make the program that casts and reshards parameters from float32 to what the engine reads, once a step.

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
