"""A whole training step, rounds and update, in process on eight devices."""

import signal

import jax
import numpy as np
import pytest
from support import SMALL

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ExploreConfig, resolve
from fr3e_jax.learner import groups
from fr3e_jax.run.saved import Progress
from fr3e_jax.step.rounds import choose_states
from fr3e_jax.step.update import train_step
from fr3e_jax.train import setup


@pytest.fixture
def handlers():
    """Put the handler of SIGTERM back, which the setup of a run replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    "algorithm", ["fr3e", *(pytest.param(other, marks=pytest.mark.slow) for other in ("grpo++", "grpo"))]
)
def test_a_step_moves_nothing_between_host_and_devices_but_what_it_says(algorithm):
    """On eight devices: an array that lies elsewhere than a program wants it would be moved at every call."""
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [*SMALL, f"--algorithm={algorithm}"])
    config = resolve(config)
    run, _, state, _ = setup(config)
    before = jax.device_get(state.params)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    # Which tokens are drawn and which trajectories and positions are chosen are independent.
    assert run.key(0) != run.key(1) and run.key(1) == run.key(1)
    with jax.transfer_guard("disallow"):
        state, _, progress, metrics, _ = train_step(run, state, groups.empty_groups(*sizes), Progress())
    assert progress.step == 1 and np.isfinite(metrics["update/loss"])
    changed = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), state.params, before)
    assert all(jax.tree.leaves(changed))
    # The baselines are settings: no positions, and GRPO rejects nothing.
    assert ("entropy/positions" in metrics) == (config.explore.positions > 0) == (algorithm == "fr3e")
    assert (metrics["states/rejected"] > 0) == (algorithm != "grpo")


def test_random_positions_are_drawn_for_each_trajectory_of_a_query_by_itself():
    """Eight trajectories of one query, equal in all but their number."""
    rules = ExploreConfig(positions=4, rule="random")
    query, trajectory, real = np.zeros(8, np.int32), np.arange(8, dtype=np.int32), np.ones(8, bool)
    same, length = np.zeros((8, 100), np.float32), np.full(8, 100, np.int32)
    told = (query, trajectory, real, same, same, length)
    prefix, valid = choose_states(rules, jax.random.key(0), np.int32(1), *told)
    assert valid.all() and len(np.unique(prefix, axis=0)) == 8
    again, _ = choose_states(rules, jax.random.key(0), np.int32(1), *told)
    np.testing.assert_array_equal(again, prefix)
