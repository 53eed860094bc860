"""What the authors' release gets wrong on the way from advantages to an update, a test or a few per fault."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import written_world
from support import whole_rows
from written_world import (
    REWARD,
    B,
    M,
    P,
    S,
    WrittenEngine,
    begin,
    check_rows,
    laid_out,
    one_step,
    one_trajectory,
    round_at,
    sample_round,
    written_run,
)

from fr3e_jax.algorithm.loss import policy_loss
from fr3e_jax.config import (
    Config,
    LossConfig,
    OptimizerConfig,
)
from fr3e_jax.learner import groups
from fr3e_jax.rewards.verify import whole_answer
from fr3e_jax.run.saved import Progress
from fr3e_jax.step.rounds import Round
from fr3e_jax.types import Queries, Rollouts

# --- inert clipping


def test_clipping_acts_from_the_second_minibatch_on():
    """A policy of one choice of four, trained on two minibatches of the same samples.

    In the first the ratio is exactly 1 and nothing is clipped; the step is large, and in the second,
    whose old log-probabilities are still those of sampling, the bounds decide and stop the gradient.
    """
    settings = LossConfig()
    logits = jnp.zeros(4)
    token = jnp.array([0, 1, 2, 3])
    old = jax.nn.log_softmax(logits)[token]
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])

    @jax.jit
    def minibatch(logits):
        def loss(logits):
            logprob = jax.nn.log_softmax(logits)[token]
            mask = jnp.ones(4, bool)
            return policy_loss(
                logprob, old, advantage, mask, jnp.float32(4), settings.clip_low, settings.clip_high
            )

        return jax.value_and_grad(loss, has_aux=True)(logits)

    (_, first), gradient = minibatch(logits)
    assert float(first["clip_low"]) == float(first["clip_high"]) == 0.0
    assert float(jnp.abs(gradient).max()) > 0.1
    (_, second), stopped = minibatch(logits - 4.0 * gradient)
    # Right tokens are more likely by more than 28%, wrong ones less likely by more than 22%.
    assert float(second["clip_low"]) == float(second["clip_high"]) == 0.5
    np.testing.assert_array_equal(stopped, np.zeros(4))


def test_the_default_settings_let_clipping_act():
    optimizer = Config().optimizer
    assert optimizer.minibatches * optimizer.epochs > 1


@pytest.mark.parametrize("advantage", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_a_ratio_of_exactly_one_is_never_clipped(advantage):
    logprob = jnp.array([-1e-6, -0.3, -7.0, -25.0])

    def loss(logprob, low, high):
        old = jax.lax.stop_gradient(logprob)
        mask = jnp.ones(4, bool)
        return policy_loss(logprob, old, jnp.full(4, advantage), mask, jnp.float32(4), low, high, 10.0)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprob, 0.22, 0.28)
    assert float(value) == -advantage
    assert float(metrics["clip_low"] + metrics["clip_high"] + metrics["clip_dual"]) == 0.0
    # The gradient is that of plain policy gradient.
    np.testing.assert_allclose(gradient, -advantage / 4)


# --- truncation that splits a state's group


def test_a_batch_takes_whole_states_whatever_its_size():
    waiting = groups.concatenate(round_at(0), round_at(B))
    total = groups.count(waiting)
    for size in range(1, total):
        batch, rest = groups.split(waiting, size)
        rows, others = check_rows(laid_out(batch)), check_rows(laid_out(rest))
        assert len(rows) == size * M
        assert {row[:3] for row in rows}.isdisjoint({row[:3] for row in others})
        assert len(set(rows + others)) == total * M


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_minibatches_take_whole_states(parts):
    batch, _ = groups.split(groups.concatenate(round_at(0), round_at(B)), 8)
    cut = groups.minibatches(batch, parts, np.random.default_rng(3))
    found = [check_rows(laid_out(part)) for part in cut]
    assert [len(rows) for rows in found] == [8 // parts * M] * parts
    for rows in found:
        assert sorted(rows) == sorted({(*row[:3], m) for row in rows for m in range(M)})
    assert len({row for rows in found for row in rows}) == 8 * M


def test_steps_train_on_every_accepted_state_once_and_carry_the_surplus():
    """The rows of all updates of three steps, and what is left over, are what was sampled."""
    run = written_run(optimizer=OptimizerConfig(batch_states=10, minibatches=2, micro_tokens=64))
    carried, progress = groups.empty_groups(M, P, S), Progress()
    seen, surplus = [], []
    for _ in range(3):
        _, carried, progress, *_ = one_step(*run, seen, carried, progress)
        surplus.append(groups.count(carried))
    assert [len(rows) for rows in seen] == [5 * M] * 6  # two minibatches of five states a step
    trained = [row[:3] for rows in seen for row in rows[::M]]
    left = [tuple(source) for source in carried.source.tolist()]
    sampled = [
        tuple(source)
        for position in range(0, progress.data_position, B)
        for source in round_at(position).source.tolist()
    ]
    assert all(0 < size < 10 for size in surplus[:-1])  # on top of which a round was sampled
    # In the order of sampling: what was carried over goes first.
    for i in range(0, 30, 10):
        assert sorted(trained[i : i + 10]) == sorted(sampled[i : i + 10])
    assert left == sampled[30:]


def test_a_round_that_is_surely_needed_samples_while_verdicts_are_found_and_changes_nothing(monkeypatch):
    """Ahead or not, the same states are trained on in the same order, with the same metrics."""

    def steps():
        seen, order = [], []

        class Engine(WrittenEngine):
            """Notes when base trajectories are sampled."""

            def sample(self, *args):
                order.append("sample")
                return super().sample(*args)

        def judged(asked):
            judging = begin(asked)
            return SimpleNamespace(result=lambda: order.append("verdicts") or judging.result())

        config, parts = written_run(
            optimizer=OptimizerConfig(batch_states=20, minibatches=2, micro_tokens=64)
        )
        parts = dataclasses.replace(parts, engine=Engine(**vars(parts.engine)))
        parts.verifier.pool.begin = judged
        _, carried, _, metrics, _ = one_step(config, parts, seen, groups.empty_groups(M, P, S), Progress())
        kept = {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
        return order, seen, carried.source.tolist(), kept

    order, *ahead = steps()
    monkeypatch.setattr(Round, "most", property(lambda self: 10**9))  # then no round is surely needed
    waiting, *behind = steps()
    assert waiting == ["sample", "verdicts", "verdicts"] * (len(waiting) // 3)
    # The second round has sampled, and its base trajectories are judged, before the first's last verdicts.
    assert order[:5] == ["sample", "verdicts", "sample", "verdicts", "verdicts"]
    assert sorted(order) == sorted(waiting)
    assert ahead == behind


# --- infinite loss for small batches


def test_the_loss_of_an_empty_or_tiny_batch_is_finite():
    def loss(logprob, mask):
        return policy_loss(
            logprob, jnp.full(3, -1.0), jnp.ones(3), mask, jnp.maximum(mask.sum(), 1), 0.2, 0.3
        )

    for trained in (0, 1):
        mask = jnp.arange(3) < trained
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.full(3, -1.0), mask)
        assert float(value) == -trained
        assert all(np.isfinite(list(map(float, metrics.values()))))
        np.testing.assert_array_equal(gradient, [-trained, 0, 0])


def test_a_round_that_teaches_nothing_has_finite_metrics_and_no_states(monkeypatch):
    """Every rollout is right. The update of an empty batch is in test_update.py."""
    monkeypatch.setattr(written_world, "REWARD", np.ones_like(REWARD))
    found, metrics, excerpt, _ = sample_round(*written_run(), 0)
    assert groups.count(found) == 0 and excerpt is None
    assert metrics["states/accepted"] == 0 and metrics["value/mean"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())
    # Joined with the states of other rounds it changes nothing.
    other = round_at(B)
    for ours, theirs in zip(
        jax.tree.leaves(groups.concatenate(found, other)), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


# --- prefixes decoded and tokenized again

PIECES = {"1": 1, "2": 2, "12": 3, "=": 4}
WORDS = {number: piece for piece, number in PIECES.items()}


def encode_greedily(text):
    """A toy tokenizer with a merge, as byte pair encoding has: `12` is one token, never two."""
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(PIECES[piece])
        text = text[len(piece) :]
    return ids


def test_prefixes_go_to_the_learner_as_the_tokens_that_were_sampled():
    """`1` and `2` were sampled one by one; decoded and encoded again they would be one token."""
    query, response, own = [4], [1, 2, 4], [1, 2]
    again = encode_greedily("".join(WORDS[i] for i in response))
    assert again == [3, 4]  # not what was sampled

    def padded(ids, size):
        return np.array([ids + [0] * (size - len(ids))], np.int32)

    token = np.concatenate([padded(own, 6), padded([3], 6)])[None]
    zeros = np.zeros(token.shape, np.float32)
    rollouts = Rollouts(
        token, zeros - 0.5, zeros - 0.5, zeros, np.array([[2, 1]], np.int32), np.ones((1, 2), bool)
    )
    states = one_trajectory(padded(response, 6), [2], [True])
    queries = Queries(padded(query, 2), np.array([1], np.int32), np.array([0], np.int32))
    advantage = np.array([[[0.5, -0.5]]], np.float32)
    found = groups.collect(np.ones((1, 1), bool), queries, states, rollouts, advantage)
    # Between [1] and [2] of the prefix, and between the prefix and its continuation.
    rows = [(token[:length].tolist(), start) for token, length, start, *_ in whole_rows(laid_out(found))]
    assert sorted(rows) == [([4, 1, 2, 1, 2], 3), ([4, 1, 2, 3], 3)]
    whole = whole_answer(states, rollouts, 0, 0, 0)
    assert whole.tolist() == [1, 2, 1, 2]
