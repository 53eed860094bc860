"""Texts that end an answer, recognised token by token on the device.

Each branch has a number that says how much of a stop text its answer ends with, and a table says how a token
changes it. So an answer need not be decoded to text to find its end.
"""

import jax
import jax.numpy as jnp
from jax import Array

from fr3e_jax.types import StopTable


def state_after(table: StopTable, state: Array, token: Array) -> Array:
    """Look up the states of the table, int32 [...], after one more token each, int32 [...]."""
    return jnp.asarray(table.following)[state, jnp.asarray(table.group)[token]]


def is_complete(table: StopTable, state: Array) -> Array:
    """Tell in which states, int32 [...], a stop text is complete: bool [...]."""
    return state == table.following.shape[0] - 1


def states_along(table: StopTable, token: Array) -> Array:
    """Find the states before each token of responses int32 [N, S], and after the last: int32 [N, S + 1]."""
    start = jnp.zeros_like(token[:, 0])

    def step(state: Array, column: Array) -> tuple[Array, Array]:
        after = state_after(table, state, column)
        return after, after

    _, states = jax.lax.scan(step, start, token.T)
    return jnp.concatenate([start[None], states]).T
