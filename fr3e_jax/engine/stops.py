"""Texts that end an answer, found token by token on the device.

How much of a stop text an answer ends with is a number for each branch, and a table says how a token changes
it: an answer need not be decoded to text to find its end.
"""

import jax
import jax.numpy as jnp
from jax import Array

from fr3e_jax.types import StopTable


def state_after(table: StopTable, state: Array, token: Array) -> Array:
    """The states, int32 [...], after a token of each, int32 [...]."""
    return jnp.asarray(table.following)[state, jnp.asarray(table.group)[token]]


def is_complete(table: StopTable, state: Array) -> Array:
    """Whether a stop text is complete, bool [...], in states int32 [...]."""
    return state == table.following.shape[0] - 1


def states_along(table: StopTable, token: Array) -> Array:
    """The states before each token of responses int32 [N, S] and after the last, int32 [N, S + 1]."""
    start = jnp.zeros_like(token[:, 0])

    def step(state: Array, column: Array) -> tuple[Array, Array]:
        after = state_after(table, state, column)
        return after, after

    _, states = jax.lax.scan(step, start, token.T)
    return jnp.concatenate([start[None], states]).T
