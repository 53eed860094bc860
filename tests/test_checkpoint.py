"""A checkpoint gives back every bit, onto whatever mesh asks for it, and one that is torn is never chosen."""

import os
import random
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, placement, restored, tiny_params

from fr3e_jax.config import OptimizerConfig
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState, init_state, make_optimizer
from fr3e_jax.models.decoder import logical_axes
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.saved import Progress, saved_steps
from fr3e_jax.types import StateGroups

AXES = logical_axes(TINY)
M, PROMPT, RESPONSE = 2, 3, 5
TESTS = os.path.dirname(__file__)


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
    assert saved_steps(tmp_path) == [7]
    blank = init_state(
        placement(2, 2, 2), make_optimizer(OptimizerConfig(), AXES), AXES, tiny_params(scale=1)
    )
    state_again, waiting_again, progress_again = restored(tmp_path, 7, blank)
    assert_equal(state_again, state)
    assert_equal(waiting_again, waiting)
    assert isinstance(waiting_again, StateGroups)
    assert groups.count(waiting_again) == carried
    assert progress_again == progress


MOVES = [
    ((2, 2, 2), (1, 1, 1), "float32"),
    ((2, 2, 2), (1, 1, 1), "bfloat16"),
    ((2, 2, 2), (1, 8, 1), "bfloat16"),
    ((8, 1, 1), (2, 2, 2), "float32"),
    ((8, 1, 1), (1, 1, 1), "bfloat16"),
    ((1, 1, 1), (2, 1, 2), "bfloat16"),
]
OFTEN = (MOVES[0], MOVES[5])


@pytest.mark.parametrize(
    ("source", "mesh", "moments"),
    [pytest.param(*move, marks=[] if move in OFTEN else pytest.mark.slow) for move in MOVES],
)
def test_a_checkpoint_is_read_onto_another_mesh(tmp_path, source, mesh, moments):
    state = trained_state(source, moments)
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(state, some_groups(1), Progress(step=1))
    writer.close()
    target = trained_state(mesh, moments)
    again, _, _ = restored(tmp_path, 1, target)
    assert_equal(again, state)
    layouts = zip(jax.tree.leaves(again), jax.tree.leaves(target), strict=True)
    assert all((a.sharding, a.dtype) == (b.sharding, b.dtype) for a, b in layouts)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.save(trained_state((1, 1, 1)), some_groups(1), Progress(step=step))
    writer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 3]


def test_checkpoints_of_every_so_many_steps_are_kept_beside_the_last(tmp_path):
    writer, state = Checkpoints(tmp_path, keep=1, keep_every=2), trained_state((1, 1, 1))
    for step in range(1, 6):
        writer.save(state, some_groups(1), Progress(step=step))
    writer.close()
    assert saved_steps(tmp_path) == [2, 4, 5]


def test_saving_goes_on_while_the_run_does(tmp_path, monkeypatch):
    """What is saved is what was there when saving began, though it is changed before it is on disk."""
    go_on, inner = threading.Event(), os.rename

    def held(source, target, **options):
        assert go_on.wait(60)
        inner(source, target, **options)

    state = trained_state((2, 2, 2))
    before = jax.device_get(state)
    writer = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(os, "rename", held)  # by which a checkpoint appears
    writer.save(state, some_groups(1), Progress(step=1))
    assert saved_steps(tmp_path) == []  # so it is still being written
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = change(state.params)  # in place
    go_on.set()
    writer.close()
    blank = type(state)(params, state.optimizer)
    again, _, _ = restored(tmp_path, 1, blank)
    assert_equal(again, before)


# Saves step after step, every number of a state being its step.
SAVING = """
import sys
from pathlib import Path
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.saved import Progress
from test_checkpoint import torn_state, some_groups

directory, first = Path(sys.argv[1]), int(sys.argv[2])
writer = Checkpoints(directory, keep=2)
print("ready", flush=True)
for step in range(first, first + 1000):
    writer.save(torn_state(step), some_groups(1), Progress(step=step, data_position=step))
"""
KILLS = 12


def torn_state(step):
    """A state of some megabytes whose every number is `step`."""
    place = placement(2, 2, 1)
    leaves = {f"w{i}": place.place(np.full((64, 4096), step, np.float32), "embed", None) for i in range(8)}
    return TrainState(leaves, {"m": leaves["w0"], "n": leaves["w1"]})


@pytest.mark.slow
def test_a_save_that_is_killed_at_any_moment_is_never_chosen(tmp_path):
    rng, reached, torn = random.Random(0), 0, 0
    for _ in range(KILLS):
        told = {"text": True, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": TESTS}}
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path), str(reached + 1)], **told)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 1.2))
        process.kill()
        process.communicate()
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        torn += any(not name.isdigit() for name in names)
        if not (steps := saved_steps(tmp_path)):
            continue
        latest = steps[-1]
        assert latest >= reached  # nothing that was whole is lost
        state, carried, progress = restored(tmp_path, latest, torn_state(0))
        assert {float(x) for leaf in jax.tree.leaves(state) for x in np.unique(leaf)} == {float(latest)}
        assert progress == Progress(step=latest, data_position=latest) and groups.count(carried) == 1
        reached = latest
    assert reached > 3 and torn > 2  # it was killed in the midst of saves
