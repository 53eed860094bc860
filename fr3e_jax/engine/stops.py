"""Texts that end an answer, recognised token by token on the device.

Each branch has a number that says how much of a stop text its answer ends with, and a table says how a token
changes it. So an answer need not be decoded to text to find its end.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from fr3e_jax.types import AnyArray, StopTable


def state_after(
    table: StopTable, state: Int32[AnyArray, "*axes"], token: Int32[AnyArray, "*axes"]
) -> Int32[Array, "*axes"]:
    """Look up the states of the table after one more token each."""
    return jnp.asarray(table.following)[state, jnp.asarray(table.group)[token]]


def is_complete(table: StopTable, state: Int32[AnyArray, "*axes"]) -> Bool[AnyArray, "*axes"]:
    """Tell in which states a stop text is complete."""
    return state == table.following.shape[0] - 1


def states_along(table: StopTable, token: Int32[AnyArray, "N S"]) -> Int32[Array, "N S+1"]:
    """Find the states before each token of responses, and after the last."""
    start = jnp.zeros_like(token[:, 0])

    def step(
        state: Int32[Array, " N"], column: Int32[Array, " N"]
    ) -> tuple[Int32[Array, " N"], Int32[Array, " N"]]:
        after = state_after(table, state, column)
        return after, after

    _, states = jax.lax.scan(step, start, token.T)
    return jnp.concatenate([start[None], states]).T
