"""The engine on many devices, and on those of two processes: the rollouts of one device.

Rows are moved together meanwhile, in every part of the mesh alike though its own branches run on.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support import TINY, mesh_of, two_processes
from test_engine import ENDS, GRAPH, MAX_NEW, MAX_PROMPT, PARAMS, POLICY, STEP, small_ladder

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.models.qwen2 import logical_axes
from fr3e_jax.parallel.mesh import place_model, row_parts
from fr3e_jax.types import Queries, States

B, R, M = 8, 2, 2
KEPT = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [1, 0], [0, 0], [0, 1]], bool)


def queries():
    rng = np.random.default_rng(1)
    length = np.array([5, 8, 1, 3, 8, 2, 7, 4], np.int32)
    token = rng.integers(0, TINY.vocab_size, (B, MAX_PROMPT))
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0).astype(np.int32)
    return Queries(token, length, np.arange(30, 30 + B, dtype=np.int32))


def states_of(engine, base):
    """Of kept trajectories. In the first half of the queries, states near the limit, so that the branches
    of the mesh's first parts stop long before those of the others, which start from the root too."""
    query, trajectory, real = engine.arrange(KEPT)
    length = base.length[query, trajectory]
    early = query < B // 2
    prefix_length = np.stack([length - 1, length - 2, np.zeros_like(length)], axis=1).clip(0)
    prefix_length[:, 2] = np.where(early, length - 3, 0).clip(0)
    valid = real[:, None] & (~early[:, None] | (prefix_length >= MAX_NEW - 4))
    return States(query, trajectory, base.token[query, trajectory], prefix_length, valid)


def whole(tree):
    """The arrays on the host, of all processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return jax.tree.map(lambda x: np.asarray(process_allgather(x, tiled=True)), tree)


def rollouts_on(mesh):
    """What `Engine` generates on a mesh, and how its rows moved: {name: array}."""
    axes = logical_axes(TINY)
    _, placement = place_model(mesh, axes, PARAMS)
    engine = Engine(GRAPH, placement, MAX_NEW, ENDS)
    params = jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        PARAMS,
        placement.shardings(axes, PARAMS),
    )
    q, key = placement.place_rows(queries()), jax.random.key(7)
    with small_ladder(slots=12, step_down=0.4, fewest=3) as moved:
        answers, _ = whole(engine.sample(params, q, key, STEP, 6, POLICY))
        base, caches, _ = engine.first_return(params, q, key, STEP, R, POLICY)
        states = states_of(engine, whole(base))
        moved_before = len(moved)
        partial, row_steps = whole(
            engine.explore(params, q, caches, placement.place_rows(states), key, STEP, M, POLICY)
        )
    return {
        "answers": answers,
        "base": whole(base),
        "partial": partial,
        "states": states,
        "kinds": [move.kind for move in moved[:moved_before]],
        "explored": [move.kind for move in moved[moved_before:]],
        "idle": 1 - partial.length.sum() / row_steps,
    }


def check_equal(found, alone, parts):
    for name in ("token", "length", "stopped"):
        for what in ("answers", "base"):
            ...
