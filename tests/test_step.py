"""A whole training step, rounds and update, in process on eight devices."""

import signal

import jax
import numpy as np
import pytest
from support import SMALL

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, resolve
from fr3e_jax.host import groups
from fr3e_jax.host.checkpoints import Progress
from fr3e_jax.step import train_step
from fr3e_jax.train import setup


@pytest.fixture
def handlers():
    """Put the handler of SIGTERM back, which the setup of a run replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("algorithm", ["fr3e", "grpo++", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_step_moves_nothing_between_host_and_devices_but_what_it_says(algorithm):
    """On eight devices: an array that lies elsewhere than a program wants it would be moved at every call."""
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [*SMALL, f"--algorithm={algorithm}"])
    config = resolve(config)
    run, _, state, _ = setup(config)
    before = jax.device_get(state.params)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    with jax.transfer_guard("disallow"):
        state, _, progress, metrics, _ = train_step(run, state, groups.empty_groups(*sizes), Progress())
    assert progress.step == 1 and np.isfinite(metrics["update/loss"])
    changed = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), state.params, before)
    assert all(jax.tree.leaves(changed))
    # The baselines are settings: no positions, and GRPO rejects nothing.
    assert ("entropy/positions" in metrics) == (config.explore.positions > 0) == (algorithm == "fr3e")
    assert (metrics["states/rejected"] > 0) == (algorithm != "grpo")
