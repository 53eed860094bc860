"""Rounds and training steps with options of exploration, in process on eight devices."""

import jax
import numpy as np
import pytest
from test_step import small_parts

from fr3e_jax.algorithm.amounts import adapted_amount
from fr3e_jax.learner import groups
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.update import train_step


@pytest.fixture(scope="module")
def params():
    """The parts of the default, and the quickstart's parameters as they are sampled with."""
    _, parts = small_parts()
    return parts.policy.sampling_params(parts.policy.fresh_state(parts.learner).params)


def test_a_query_that_is_often_solved_gets_fewer_positions_and_rollouts_and_no_other_is_trained_on(params):
    config, parts = small_parts("--explore.adaptive=true", "--explore.keep=all")
    opened = open_round(config, parts, params, 1, 0, Stopwatch())
    states, base_reward = opened.states, opened.base_reward
    value = base_reward.mean(axis=1)[states.query]
    assert len(set(value[states.valid[:, 0]].tolist())) > 2
    positions = np.asarray(adapted_amount(2, value, 1))
    rollouts = np.asarray(adapted_amount(4, value, 2))
    there = states.valid[:, 0]
    np.testing.assert_array_equal(states.valid[there, 1:].sum(axis=1), positions[there])
    np.testing.assert_array_equal(states.rollouts, rollouts)
    drawn = states.valid[:, :, None] & (np.arange(4) < rollouts[:, None, None])
    np.testing.assert_array_equal(opened.counted, drawn)
    np.testing.assert_array_equal(opened.rollouts.length.reshape(drawn.shape) > 0, drawn)
    accepted, metrics, _, _ = close_round(config, parts, opened, Stopwatch())
    parts.verifier.pool.close()
    assert metrics["tokens/generated"] == opened.base.length.sum() + opened.rollouts.length.sum()
    row = {(int(states.query[n]), int(states.base[n])): n for n in np.flatnonzero(there)}
    assert groups.count(accepted)
    for source, length, advantage in zip(accepted.source, accepted.length, accepted.advantage, strict=True):
        wanted = rollouts[row[int(source[0]), int(source[1])]]
        assert (length > 0).sum() == wanted and not advantage[wanted:].any()
        assert abs(advantage.sum()) < 1e-5  # the mean is that of the rollouts that were drawn


@pytest.mark.parametrize("option", ["adaptive=true", "temperature=1.5"])
def test_a_step_moves_nothing_between_host_and_devices_but_what_it_says(option):
    config, parts = small_parts(f"--explore.{option}")
    state = parts.policy.fresh_state(parts.learner)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    with jax.transfer_guard("disallow"):
        carried, shown = groups.empty_groups(*sizes), StepProgress(print)
        _, _, progress, metrics, _ = train_step(config, parts, None, state, carried, Progress(), shown)
    parts.verifier.pool.close()
    assert progress.step == 1 and np.isfinite(metrics["update/loss"])


def test_a_hot_first_token_makes_continuations_differ_and_leaves_those_of_the_root(params):
    """Beside the default, on the same base trajectories."""
    found = []
    for option in ([], ["--explore.temperature=3"]):
        config, parts = small_parts(*option)
        opened = open_round(config, parts, params, 1, 0, Stopwatch())
        parts.verifier.pool.close()
        found.append((opened.states, opened.rollouts))
    (states, usual), (same, hot) = found
    np.testing.assert_array_equal(states.prefix_length, same.prefix_length)
    first, heated = (x.token.reshape(*states.valid.shape, 4, -1)[..., 0] for x in (usual, hot))
    np.testing.assert_array_equal(first[:, 0], heated[:, 0])
    np.testing.assert_array_equal(usual.token[:, :4], hot.token[:, :4])
    assert (first[:, 1:] != heated[:, 1:])[states.valid[:, 1:]].mean() > 0.2
    # The log-probability of the distribution that it was drawn from is another, of that token alone.
    differs = (hot.sampled_logprob != hot.logprob).reshape(*states.valid.shape, 4, -1)
    gap = np.abs(hot.sampled_logprob - hot.logprob).reshape(differs.shape)
    assert gap[:, 0].max() < 1e-5 and gap[..., 1:].max() < 1e-5 and gap[:, 1:, :, 0].max() > 0.1
