"""A checkpoint gives back every bit, onto whatever mesh asks for it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, placement, tiny_params

from fr3e_jax.config import OptimizerConfig
from fr3e_jax.host import groups
from fr3e_jax.host.checkpoints import Checkpoints, Progress
from fr3e_jax.learner.state import init_state, make_optimizer
from fr3e_jax.models.qwen2 import logical_axes
from fr3e_jax.types import StateGroups

AXES = logical_axes(TINY)
M, PROMPT, RESPONSE = 2, 3, 5


def trained_state(mesh, moments="float32"):
    """A state whose moments are not zero."""
    place = placement(*mesh)
    optimizer = make_optimizer(OptimizerConfig(moments=moments), AXES)
    state = init_state(place, optimizer, AXES, tiny_params())
    noise = jax.tree.map(lambda x: jnp.cos(7 * x), state.params)
    _, moments = jax.jit(optimizer.update)(noise, state.optimizer, state.params)
    return type(state)(state.params, moments)


def some_groups(count):
    rng = np.random.default_rng(3)
    empty = groups.empty_groups(M, PROMPT, RESPONSE)
    return jax.tree.map(lambda x: rng.integers(0, 100, (count, *x.shape[1:])).astype(x.dtype), empty)


def assert_equal(ours, theirs):
    chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(theirs))


@pytest.mark.parametrize("carried", [0, 1, 4])
def test_a_checkpoint_gives_back_every_bit(tmp_path, carried):
    state, waiting = trained_state((2, 2, 2)), some_groups(carried)
    progress = Progress(step=7, data_position=96, tokens_generated=12345, seconds=1.5, seed=3, skipped=2)
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(state, waiting, progress)
    writer.close()
    reader = Checkpoints(tmp_path, keep=2)
    assert reader.latest() == 7
    blank = init_state(
        placement(2, 2, 2), make_optimizer(OptimizerConfig(), AXES), AXES, tiny_params(scale=1)
    )
    state_again, waiting_again, progress_again = reader.restore(7, blank)
    assert_equal(state_again, state)
    assert_equal(waiting_again, waiting)
    assert isinstance(waiting_again, StateGroups)
    assert groups.count(waiting_again) == carried
    assert progress_again == progress


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 1, 2)])
def test_a_checkpoint_is_read_onto_another_mesh(tmp_path, mesh, moments):
    state = trained_state((2, 2, 2), moments)
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(state, some_groups(1), Progress(step=1))
    writer.close()
    target = trained_state(mesh, moments)
    again, _, _ = Checkpoints(tmp_path, keep=1).restore(1, target)
    assert_equal(again, state)
    layouts = zip(jax.tree.leaves(again), jax.tree.leaves(target), strict=True)
    assert all((a.sharding, a.dtype) == (b.sharding, b.dtype) for a, b in layouts)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.save(trained_state((1, 1, 1)), some_groups(1), Progress(step=step))
    writer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 3]
