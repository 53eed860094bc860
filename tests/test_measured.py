"""Numbers of a round and of a step: forks, depth, distances and the machine, by hand."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from fr3e_jax.run.reporter import step_line
from fr3e_jax.step.machine import host_memory, memory_metrics, waiting_metrics
from fr3e_jax.step.measured import Measured
from fr3e_jax.step.metrics import measure
from fr3e_jax.types import Rollouts, States

F = np.float32


def rollouts(length, width, entropy=None):
    length = np.array(length, np.int32)
    inside = np.arange(width) < length[..., None]
    entropy = inside.astype(F) if entropy is None else np.where(inside, np.array(entropy, F), F(0))
    nothing = np.zeros(inside.shape, F)
    return Rollouts(inside.astype(np.int32), nothing, nothing, entropy, length, np.ones(length.shape, bool))


# One query with two base trajectories of 8 and 5 tokens; the first has positions 2 and 6, the second only 3,
# and a third row is padding.
ENTROPY = [[[1, 1, 9, 1, 1, 1, 9, 3], [2, 2, 2, 9, 4, 0, 0, 0]]]
STATES = States(
    query=np.zeros(3, np.int32),
    base=np.array([0, 1, 0], np.int32),
    response=np.ones((3, 8), np.int32),
    prefix_length=np.array([[0, 2, 6], [0, 3, 0], [0, 2, 6]], np.int32),
    valid=np.array([[True, True, True], [True, True, False], [False, False, False]]),
)
REWARD = np.array([[[1, 0], [1, 1], [1, 0]], [[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]], F)
ACCEPTED = np.array([[True, False, True], [False, True, False], [False, False, False]])


def measured(**changes):
    value = REWARD.mean(axis=2)
    drawn = np.repeat(STATES.valid, 2, axis=1)
    made = Measured(
        base=rollouts([[8, 5]], 8, ENTROPY),
        base_reward=np.array([[1, 0]], F),
        states=STATES,
        rollouts=rollouts(drawn, 8),
        reward=REWARD,
        value=value,
        alpha=np.ones_like(value),
        advantage=REWARD - value[..., None],
        accepted=ACCEPTED,
        restarts=True,
    )
    return dataclasses.replace(made, **changes)


def test_forks_depths_and_distances_are_those_of_a_hand_calculation():
    found = measure(measured())
    # Forks are the 3 states at positions: 1 1 agrees, the others do not.
    assert found["forks/disagree"] == pytest.approx(2 / 3)
    assert found["positions/distance"] == 4  # 6 - 2; the second trajectory has one position
    assert found["states/depth"] == pytest.approx((0 + 6 / 8 + 3 / 5) / 3)
    assert found["entropy/positions"] == 9
    assert found["entropy/elsewhere"] == pytest.approx((5 * 1 + 3 + 3 * 2 + 4) / 10)
    assert found["value/accepted_std"] == 0  # 1/2 each
    assert found["advantage/accepted_std"] == pytest.approx(0.5)


def test_rollouts_that_do_not_count_make_no_fork_disagree():
    counted = np.ones(REWARD.shape, bool)
    counted[0, 2, 1] = False  # the wrong one
    assert measure(measured(counted=counted))["forks/disagree"] == pytest.approx(1 / 3)


def test_what_a_round_does_not_have_is_left_out():
    """Nothing is kept; or nothing accepted, and one position each; or no positions at all."""
    names = ("forks/disagree", "positions/distance", "states/depth", "entropy/elsewhere")
    nothing = dataclasses.replace(STATES, valid=np.zeros_like(STATES.valid))
    none_accepted = np.zeros_like(ACCEPTED)
    found = measure(measured(states=nothing, accepted=none_accepted))
    assert not found.keys() & set(names) and "value/accepted_std" not in found
    single = dataclasses.replace(STATES, valid=STATES.valid & (np.arange(3) < 2))
    found = measure(measured(states=single, accepted=none_accepted))
    assert found.keys() & set(names) == {"forks/disagree", "entropy/elsewhere"}
    assert not measure(measured(restarts=False)).keys() & set(names)


def test_the_shares_of_a_step_that_waited_are_those_of_its_stages():
    stages = {
        "tokenize": 1.0,
        "first_return": 2.0,
        "explore": 3.0,
        "verify": 1.5,
        "record": 0.5,
        "update": 1.0,
    }
    assert waiting_metrics(stages, 10.0) == {"time/share_verify": 0.15, "time/share_idle": 0.4}
    line = step_line({"step": 1, "time/step": 10.0, "time/update": 1.0, **waiting_metrics(stages, 10.0)})
    assert line == "step    1 | 10.0 s (update 1.0)"


def test_memory_is_of_this_process_and_of_the_fullest_device_that_tells(monkeypatch):
    before, block = host_memory(), np.ones(2**27, np.uint8)
    assert host_memory() - before > 0.9 * block.nbytes
    assert memory_metrics().keys() == {"memory/host"}  # devices of CPUs tell nothing

    def device(**stats):
        return types.SimpleNamespace(memory_stats=lambda: stats or None)

    devices = [device(peak_bytes_in_use=2**30), device(peak_bytes_in_use=3 * 2**30), device()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_metrics()["memory/device"] == 3
