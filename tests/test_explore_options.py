"""Rounds with options of exploration on one device, and training steps on eight, in process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SMALL, mesh_of
from test_step import small_parts

from fr3e_jax.algorithm.amounts import adapted_amount
from fr3e_jax.cli import parse
from fr3e_jax.config import Config
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.build import build
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step import choose
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.update import train_step

PILOTS = ["--explore.rule=mutual_information", "--explore.pilots=3", "--explore.positions=1"]


def one_device_parts(*options):
    """The configuration and the parts of a small run on one device."""
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [*SMALL, *options])
    return config, build(config, Hosts(mesh_of(), timeout=60))


def round_of(*options):
    """The configuration, the parts and the first round of a small run on one device, which is not closed."""
    config, parts = one_device_parts(*options)
    opened = open_round(config, parts, parts.policy.read(), 1, 0, Stopwatch())
    parts.verifier.pool.close()
    return config, parts, opened


def test_a_query_that_is_often_solved_gets_fewer_positions_and_rollouts_and_no_other_is_trained_on():
    config, parts, opened = round_of("--explore.adaptive=true", "--explore.keep=all")
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


@pytest.mark.slow
def test_positions_of_mutual_information_are_those_that_decided_the_rewards_of_pilots(monkeypatch):
    """All pilots are right, but for those of the likeliest token at one candidate of each trajectory."""
    judge, asked = Verifier.whole, []

    def judged(self, states, rollouts, problems, notes=None):
        reward = judge(self, states, rollouts, problems, notes)()
        if states.valid.shape[1] == 4:  # candidates, four for each position
            asked.append((states, rollouts))
            told = np.arange(reward.shape[0]) % states.valid.sum(axis=1).clip(1)
            reward[:] = 1.0
            reward[np.arange(len(told)), told, :3] = 0.0
        return lambda: reward

    monkeypatch.setattr(Verifier, "whole", judged)
    *_, opened = round_of(*PILOTS)
    ((candidates, pilots),) = asked
    there = opened.states.valid[:, 0]
    told = np.arange(len(there)) % candidates.valid.sum(axis=1).clip(1)
    expected = candidates.prefix_length[np.arange(len(there)), told]
    np.testing.assert_array_equal(opened.states.prefix_length[there, 1], expected[there])
    assert len(set(told[there].tolist())) == 4
    # Candidates are the most uncertain tokens; pilots are three of each of the two likeliest there.
    entropy = opened.base.entropy[opened.states.query, opened.states.base]
    for n in np.flatnonzero(there):
        length = opened.base.length[opened.states.query[n], opened.states.base[n]]
        highest = 1 + np.argsort(-entropy[n, 1:length], kind="stable")[:4]
        assert candidates.prefix_length[n].tolist() == sorted(highest.tolist())
    first = pilots.token.reshape(*candidates.valid.shape, 2, 3, -1)[..., 0][candidates.valid]
    assert (first == first[:, :, :1]).all() and (first[:, 0] != first[:, 1]).all()
    logprob = pilots.logprob.reshape(*candidates.valid.shape, 2, 3, -1)[..., 0][candidates.valid]
    assert (logprob[:, 0] >= logprob[:, 1]).all()
    # They cost what they are: tokens, rows and FLOPs.
    cost = opened.costs["pilots"]
    assert cost["tokens/generated"] == pilots.length.sum() > 0
    assert cost["rows/decoded"] >= cost["tokens/generated"] and cost["flops"] > 0


@pytest.mark.slow
def test_rollouts_do_not_depend_on_pilots(monkeypatch):
    """Where these say nothing: the KV caches that they read are as they were, and the positions entropy's."""
    real, found = choose.sample_pilots, []

    def saying_nothing(*arguments):
        information, cost = real(*arguments)
        return jnp.where(jnp.isneginf(information), information, 0.0), cost

    monkeypatch.setattr(choose, "sample_pilots", saying_nothing)
    for options in (["--explore.positions=1"], PILOTS):
        found.append(round_of(*options)[2])
    usual, ours = found
    np.testing.assert_array_equal(usual.states.valid, ours.states.valid)
    positions, same = (np.where(x.states.valid, x.states.prefix_length, 0) for x in found)
    np.testing.assert_array_equal(positions, same)
    np.testing.assert_array_equal(usual.rollouts.token, ours.rollouts.token)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [["--explore.adaptive=true"], ["--explore.temperature=1.5"], PILOTS],
    ids=["adaptive", "hot", "pilots"],
)
def test_a_step_moves_nothing_between_host_and_devices_but_what_it_says(option):
    config, parts = small_parts(*option)
    state = parts.policy.fresh_state(parts.learner)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    with jax.transfer_guard("disallow"):
        carried, shown = groups.empty_groups(*sizes), StepProgress(print)
        _, _, progress, metrics, _ = train_step(config, parts, None, state, carried, Progress(), shown)
    parts.verifier.pool.close()
    assert progress.step == 1 and np.isfinite(metrics["update/loss"])


@pytest.mark.slow
def test_a_hot_first_token_makes_continuations_differ_and_leaves_those_of_the_root():
    """Beside the default, on the same base trajectories."""
    found = []
    for option in ([], ["--explore.temperature=3"]):
        *_, opened = round_of(*option)
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
