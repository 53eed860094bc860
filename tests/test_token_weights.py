"""Which tokens of a batch are trained and how much each counts: by hand, and as properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.algorithm.token_weights import covariant_tokens, highest, mismatch_ratio, mismatch_weight
from fr3e_jax.config import LossConfig
from fr3e_jax.learner.weights import real_tokens, with_masks, with_mismatch
from fr3e_jax.types import StateGroups


def groups(length, advantage, **arrays):
    """States whose rollouts have these lengths, with log-probabilities of their own."""
    length, rng = np.array(length, np.int32), np.random.default_rng(0)
    number, shape = len(length), (*length.shape, 4)
    logprob = arrays.pop("logprob", -rng.random(shape)).astype(np.float32)
    return StateGroups(
        query=np.zeros((number, 1), np.int32),
        query_length=np.ones(number, np.int32),
        prefix=np.zeros((number, 4), np.int32),
        prefix_length=np.zeros(number, np.int32),
        token=np.zeros(shape, np.int32),
        logprob=logprob,
        length=length,
        advantage=np.array(advantage, np.float32),
        source=np.zeros((number, 3), np.int32),
        **{name: x.astype(np.float32) for name, x in arrays.items()},
    )


def test_the_most_uncertain_share_of_all_rollouts_is_trained():
    """By hand: 6 tokens, of which half are trained; what lies beyond a length does not count."""
    entropy = np.array([[[0.1, 2.0, 0.3, 9.0], [0.2, 1.0, 9.0, 9.0]], [[3.0, 9.0, 9.0, 9.0], [9.0] * 4]])
    batch = groups([[3, 2], [1, 0]], [[1, -1], [1, -1]], entropy=entropy)
    weight = with_masks(batch, LossConfig(top_entropy_share=0.5)).weight
    expected = np.array([[[0, 1, 0, 0], [0, 1, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(weight, expected)


scores = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@given(scores, st.floats(0.01, 1.0), st.data())
def test_exactly_a_share_is_chosen_and_of_equal_scores_the_earlier(scores, share, data):
    score = np.array(scores, float)
    real = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    chosen = highest(score, real, share)
    wanted = min(max(round(share * real.sum()), 1), real.sum())
    assert chosen.sum() == wanted and not chosen[~real].any()
    left = real & ~chosen
    if chosen.any() and left.any():
        assert score[chosen].min() >= score[left].max()
        edge = score[chosen].min()
        taken, others = (np.flatnonzero(x & (score == edge)) for x in (chosen, left))
        assert not others.size or taken.max() < others.min()


def test_of_many_equal_scores_the_first_are_chosen():
    """As many as a sort that is not stable would mix."""
    score = np.tile([0.0, 1.0], 500)
    np.testing.assert_array_equal(np.flatnonzero(highest(score, score < 2, 0.1)), np.arange(1, 200, 2))


def test_the_token_of_highest_covariance_is_left_out():
    """By hand: means -1 and 0; covariances (0 x 1), (1 x 1), (-2 x -1), (1 x -1)."""
    logprob = np.zeros((1, 2, 4))
    logprob[0, 0, :2], logprob[0, 1, :2] = (-1.0, 0.0), (-3.0, 0.0)
    batch = groups([[2, 2]], [[1.0, -1.0]], logprob=logprob)
    weight = with_masks(batch, LossConfig(covariance_share=0.25)).weight
    np.testing.assert_array_equal(weight[0, :, :2], [[1, 1], [0, 1]])
    weight = with_masks(batch, LossConfig(covariance_share=0.5)).weight
    np.testing.assert_array_equal(weight[0, :, :2], [[1, 0], [0, 1]])


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
def test_what_is_left_out_lowers_the_covariance_that_is_left(seed, share):
    """Against the definition: the mean of the products is numpy's covariance of the tokens."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 5, (3, 2))
    batch = groups(length, rng.normal(size=(3, 2)), logprob=rng.normal(size=(3, 2, 4)))
    real = real_tokens(batch)
    out = covariant_tokens(batch.logprob, batch.advantage, real, share)
    spread = np.broadcast_to(batch.advantage[..., None], real.shape)
    above = (batch.logprob - batch.logprob[real].mean()) * (spread - spread[real].mean())
    whole = np.cov(batch.logprob[real], spread[real], bias=True)[0, 1] if real.sum() > 1 else 0.0
    assert above[real].mean() == pytest.approx(whole, abs=1e-5)
    if (real & ~out).any():
        assert above[out].min() >= above[real & ~out].max() - 1e-5


def test_masks_are_of_both_options_and_none_of_neither():
    batch = groups([[4, 4]], [[1.0, -1.0]], entropy=np.random.default_rng(1).random((1, 2, 4)))
    assert with_masks(batch, LossConfig()) is batch
    both = with_masks(batch, LossConfig(top_entropy_share=0.5, covariance_share=0.25)).weight
    each = [with_masks(batch, LossConfig(**one)).weight for one in BOTH]
    np.testing.assert_array_equal(both, each[0] * each[1])


BOTH = ({"top_entropy_share": 0.5}, {"covariance_share": 0.25})


# --- mismatch


def test_mismatch_by_hand():
    """Ratios 1, 3, 0.25 and 1.05; nothing beyond the length."""
    sampler = np.log(np.array([[[0.2, 0.1, 0.4, 0.2]]]))
    learner = np.log(np.array([[[0.2, 0.3, 0.1, 0.21]]]))
    batch = groups([[4]], [[1.0]], logprob=np.full((1, 1, 4), -7.0), sampled_logprob=sampler)
    expected = {
        "truncate": ([1, 2, 0.25, 1.05], 0.25),
        "mask": ([1, 0, 0, 1.05], 0.5),
    }
    for mismatch, (weight, bounded) in expected.items():
        weighed, metrics = with_mismatch(batch, learner.astype(np.float32), LossConfig(mismatch=mismatch))
        np.testing.assert_allclose(weighed.weight[0, 0], weight, rtol=1e-5)
        # The policy's ratio is taken to what the learner computed, and not to what was recorded.
        np.testing.assert_allclose(weighed.logprob, learner, rtol=1e-6)
        assert metrics == pytest.approx(
            {"mismatch/outside": 0.5, "mismatch/ratio_max": 3, "mismatch/bounded": bounded}, rel=1e-5
        )


def test_without_a_record_of_the_filtered_distribution_it_is_the_policys_own():
    batch = groups([[2]], [[1.0]])
    weighed, metrics = with_mismatch(batch, batch.logprob, LossConfig(mismatch="mask"))
    np.testing.assert_array_equal(weighed.weight[0, 0, :2], [1, 1])
    assert metrics == {"mismatch/outside": 0, "mismatch/ratio_max": 1, "mismatch/bounded": 0}


@given(st.integers(0, 2**32 - 1))
def test_an_unbounded_weight_turns_samples_of_another_temperature_into_the_policys(seed):
    """By enumeration: sum over tokens of mu(v) w(v) f(v) is sum of pi(v) f(v) for any f."""
    rng = np.random.default_rng(seed)
    logits, f = rng.normal(size=8), rng.normal(size=8)
    policy, sampler = (np.log(w / w.sum()) for w in (np.exp(logits), np.exp(logits / 0.6)))
    numbers = [x.astype(np.float32)[None, None] for x in (policy, sampler)]
    ratio = mismatch_ratio(*numbers, np.ones((1, 1, 8), bool))
    weight = mismatch_weight(ratio, "truncate", 0.0, np.inf)[0, 0]
    assert (np.exp(sampler) * weight * f).sum() == pytest.approx((np.exp(policy) * f).sum(), abs=1e-5)
    capped = mismatch_weight(ratio, "truncate", 0.0, 1.0)[0, 0]
    assert (capped <= 1).all() and (capped == np.minimum(weight, 1)).all()
