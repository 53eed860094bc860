"""Modulation: factors of a state's advantages, by how its value changed.

Shapes: N trajectories, J states each (state 0 is the bare query).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape
from fr3e_jax.algorithm.values import FirstState, value_change
from fr3e_jax.types import AnyArray

ModulationFunction = Callable[[Float32[Array, "N J"]], Float32[Array, "N J"]]
"""Value changes delta_j -> the factors alpha_j."""

Modulation = Chosen[ModulationFunction]


def inverse_exponential(change: Float32[AnyArray, "N J"]) -> Float32[Array, "N J"]:
    """Compute alpha_j = 1 / exp(delta_j): less where the value rose, more where it fell. Paper."""
    return jnp.exp(-change)


MODULATIONS: dict[str, Rule[ModulationFunction]] = {
    "paper": Rule(inverse_exponential, "1 / exp(V(S_j) - V(S_{j-1}))"),
    "none": Rule(jnp.ones_like, "1; grpo and grpo++ set it"),
}


def modulation_factor(
    value: Float32[AnyArray, "N J"],
    valid: Bool[AnyArray, "N J"],
    modulation: str | ModulationFunction = "paper",
    first_state: FirstState = "neutral",
    sharpen: bool = False,
) -> Float32[Array, "N J"]:
    """Compute alpha_j, by which the advantages of a state are multiplied. Paper (advantage modulation).

    Args:
      value: V(S_j).
      valid: which states there are.
      modulation: a name in MODULATIONS, or a function.
      first_state: see `value_change`.
      sharpen: see `value_change`.

    Raises:
      RuleError: there is no such modulation, or it gives something else.
    """
    change = value_change(value, valid, first_state, sharpen)
    return of_shape(function_of(MODULATIONS, modulation)(change), value.shape, "modulation factors [N, J]")
