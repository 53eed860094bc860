"""Answers that the length limit cuts off: masked, or with rewards that fall before the limit."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import mesh_of, whole_rows
from written_world import (
    REWARD,
    B,
    R,
    WrittenEngine,
    laid_out,
    one_trajectory,
    rollouts_of,
    sample_round,
    states_in,
    where_from,
    written_run,
)

from fr3e_jax.algorithm.keep import KEEP_RULES, keep_trajectories
from fr3e_jax.config import Config, ConfigError, RewardConfig, check, without_effect
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.rewards.shape import length_factor
from fr3e_jax.rewards.verdict import Verdict
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.types import Problem

# --- shaped


def soft_punishment(length, longest, cache):
    """DAPO's equation, piece by piece, with rewards of -1 for answers that are too long."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


def test_the_factor_falls_from_1_to_0_over_the_last_tokens():
    """Of 40 tokens the last 8: 33 is the first that costs, by an eighth."""
    length = np.array([1, 32, 33, 34, 36, 39, 40])
    assert length_factor(length, 40, 0.2).tolist() == [1, 1, 0.875, 0.75, 0.5, 0.125, 0]


@given(st.integers(1, 5000), st.floats(0.01, 1.0))
def test_the_factor_is_the_soft_punishment_of_dapo_and_one(longest, slope):
    lengths = np.unique(np.linspace(0, longest, 50).astype(int))
    expected = [1 + soft_punishment(length, longest, slope * longest) for length in lengths.tolist()]
    factor = length_factor(lengths, longest, slope)
    np.testing.assert_allclose(factor, expected, atol=1e-5)
    assert (np.diff(factor) <= 0).all() and factor[-1] == 0 and factor.dtype == np.float32


def verifier(scores, **settings):
    """One whose answers have these scores, in order."""
    left = iter(scores)
    begin = lambda asked: SimpleNamespace(result=lambda: [Verdict(next(left), "") for _ in asked])  # noqa: E731
    text = SimpleNamespace(answers=lambda rows, stopped: [""] * len(rows))
    pool = SimpleNamespace(begin=begin)
    return Verifier(text, Hosts(mesh_of(), 1), pool, RewardConfig(**settings), max_response=8)


def test_long_answers_earn_less_and_those_that_are_cut_nothing():
    problem = Problem("1+1", "2", "exact")
    stopped = [True, True, True, True, True, False]
    answers = [np.zeros(length, np.int32) for length in (3, 5, 6, 7, 8, 8)]
    shaped = verifier([1.0, 1.0, 0.0, 0.5, 1.0], cut="shaped", cut_slope=0.5)
    assert shaped.rewards(answers, stopped, [problem] * 6)().tolist() == [1, 0.75, 0, 0.125, 0, 0]
    for cut, last in (("wrong", 0), ("masked", 0), ("judged", 1)):
        usual = verifier([1.0, 1.0, 0.0, 0.5, 1.0, 1.0], cut=cut)
        assert usual.rewards(answers, stopped, [problem] * 6)().tolist() == [1, 1, 0, 0.5, 1, last]


def test_the_length_is_that_of_the_whole_answer():
    """Two tokens behind a prefix of four, of eight: half of the slope is left."""
    states = one_trajectory(np.zeros((1, 12), np.int32), [4], [True])
    own = rollouts_of(np.ones((1, 2, 12)), [[2, 1]])
    reward = verifier([1.0, 1.0], cut="shaped", cut_slope=0.5).whole(
        states, own, [Problem("a", "b", "exact")]
    )
    assert reward().tolist() == [[[0.5, 0.75]]]


# --- masked

SOLVED = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], np.float32)
COUNTED = np.array([[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
KEYS = jax.random.split(jax.random.key(0), len(SOLVED))


def kept_by(rule, keys=KEYS):
    return np.asarray(keep_trajectories(jnp.asarray(SOLVED), rule, keys, counted=jnp.asarray(COUNTED)))


def test_of_the_trajectories_that_count_the_first_of_each_kind_is_kept():
    expected = [[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(kept_by("first_of_each"), expected)
    np.testing.assert_array_equal(kept_by("all"), COUNTED)


@pytest.mark.parametrize("rule", list(KEEP_RULES))
def test_no_rule_keeps_what_does_not_count(rule):
    for seed in range(5):
        kept = kept_by(rule, jax.random.split(jax.random.key(seed), len(SOLVED)))
        assert not kept[~COUNTED].any()
        if rule == "random_of_each":  # one of each kind there is
            for row in range(len(SOLVED)):
                kinds = {SOLVED[row, r] for r in np.flatnonzero(COUNTED[row])}
                assert sorted(SOLVED[row, kept[row]]) == sorted(kinds)


def is_cut(q, b, j, m):
    return m > 0 and (q + b + j + m) % 3 == 0


class CuttingEngine(WrittenEngine):
    """Cuts the first wrong base trajectory of each query, and some of the continuations."""

    def sample(self, *args):
        """Write base trajectories."""
        rollouts, *rest = super().sample(*args)
        stopped = np.ones(rollouts.length.shape, bool)
        stopped[:, 1] = False
        return dataclasses.replace(rollouts, stopped=self.placement.place_rows(stopped)), *rest

    def explore(self, params, queries, states, *, rollouts, **others):
        """Write continuations."""
        own, *rest = super().explore(params, queries, states, rollouts=rollouts, **others)
        n, j_count = states.valid.shape
        index, query, base = (np.asarray(x) for x in (queries.index, states.query, states.base))
        stopped = [
            [not is_cut(index[query[i]], base[i], j, m) for j in range(j_count) for m in range(rollouts)]
            for i in range(n)
        ]
        return dataclasses.replace(own, stopped=self.placement.place_rows(np.array(stopped))), *rest


def value_of(q, b, j):
    """V(S_j) over the rollouts that came to an end."""
    return float(np.mean([REWARD[q, b, j, m] for m in range(4) if not is_cut(q, b, j, m)]))


def test_masked_answers_count_neither_in_values_nor_in_the_gradient_and_are_not_explored():
    config, parts = written_run(reward=RewardConfig(cut="masked"))
    parts = dataclasses.replace(parts, engine=CuttingEngine(**vars(parts.engine)))
    parts = dataclasses.replace(parts, verifier=dataclasses.replace(parts.verifier, config=config.reward))
    accepted, metrics, _, success = sample_round(config, parts, 0)
    found = {}
    for token, _, start, _, advantage in whole_rows(laid_out(accepted)):
        found[where_from(token[start])] = float(advantage)
    expected = {}
    for q in range(B):
        for b in (0, 2):  # 1 is cut, so that 2 is the first wrong one
            for j in range(states_in(q, b)):
                uncut = [m for m in range(4) if not is_cut(q, b, j, m)]
                if len({float(REWARD[q, b, j, m]) for m in uncut}) < 2:
                    continue
                alpha = math.exp(value_of(q, b, j - 1) - value_of(q, b, j)) if j else 1.0
                for m in uncut:
                    expected[q, b, j, m] = alpha * (float(REWARD[q, b, j, m]) - value_of(q, b, j))
    assert len(expected) > 10 and any(is_cut(q, b, j, 3) for q, b, j, _ in expected)
    assert found == pytest.approx(expected, abs=1e-6)
    assert metrics["response/cut"] == pytest.approx(1 / R)
    for q in range(B):
        roots = [REWARD[q, b, 0, m] for b in (0, 2) for m in range(4) if not is_cut(q, b, 0, m)]
        assert success[q] == pytest.approx((1 + sum(roots)) / (3 + len(roots)))


# --- what cannot stand together


def test_one_token_leaves_nothing_but_cut_answers():
    for cut, why in (("wrong", "count as wrong"), ("masked", "do not count"), ("shaped", "count as wrong")):
        config = Config(reward=RewardConfig(cut=cut))
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_response=1))
        with pytest.raises(ConfigError, match=rf"that are cut {why}; raise it, or use --reward\.cut judged"):
            check(config, 1, 4096)
    assert without_effect(Config(reward=RewardConfig(cut_slope=0.5)))[0].startswith("reward.cut_slope has no")
    assert without_effect(Config(reward=RewardConfig(cut="shaped", cut_slope=0.5))) == []
