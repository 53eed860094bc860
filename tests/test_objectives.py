"""Objectives and means of the loss against an independent float64 form in numpy, and by hand."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slow_losses import DUAL, loss_slowly

from fr3e_jax.algorithm.aggregates import AGGREGATES, aggregate_shares
from fr3e_jax.algorithm.objectives import OBJECTIVES

QUERIES = np.array([7, 7, 3])  # of three states with two rollouts each
LIMIT, WIDTH = 9, 6
LENGTH = np.array([[6, 1], [3, 4], [2, 5]])
REAL = np.arange(WIDTH) < LENGTH[..., None]
BOUNDS = {"clip": (0.22, 0.28), "cispo": (0.4, 0.5), "gspo": (0.02, 0.03)}
PAIRS = [(objective, aggregate) for objective in OBJECTIVES for aggregate in AGGREGATES]


def example(seed=0):
    """(log-probabilities, those of the sampler, advantages), some tokens and sequences beyond every bound."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-1.5, 0.5, REAL.shape)
    return old + rng.normal(0, 0.5, REAL.shape), old, rng.normal(size=LENGTH.shape)


def slowly(objective, aggregate, new, old, advantage, fixed=None):
    """The same loss in numpy, float64."""
    return loss_slowly(
        objective, aggregate, BOUNDS[objective], new, old, advantage, LENGTH, QUERIES, LIMIT, fixed=fixed
    )


@functools.cache
def differentiated(objective):
    """The compiled objective: ((loss, metrics), gradient in the log-probabilities)."""
    low, high = BOUNDS[objective]
    bounds = {"clip_low": low, "clip_high": high, "dual_clip": DUAL}

    def loss(new, old, advantage, mask, denominator):
        return OBJECTIVES[objective].function(new, old, advantage, mask, denominator, **bounds)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def computed(objective, aggregate, new, old, advantage, weight=1.0, length=LENGTH, query=QUERIES):
    """((loss, metrics), gradient) as the update has them: weights and shares through the advantage."""
    mask = np.arange(WIDTH) < length[..., None]
    shares = aggregate_shares(aggregate, length, query, LIMIT)
    scaled = advantage if shares is None else advantage * shares
    scaled = np.broadcast_to(scaled[..., None] * np.asarray(weight), mask.shape)
    arrays = [x.reshape(-1, WIDTH) for x in (new, old, scaled)]
    count = np.float32(max(mask.sum(), 1))
    numbers = [x.astype(np.float32) for x in arrays]
    value, gradient = differentiated(objective)(*numbers, mask.reshape(-1, WIDTH), count)
    return value, np.asarray(gradient).reshape(mask.shape)


@pytest.mark.parametrize(("objective", "aggregate"), PAIRS)
def test_every_objective_by_every_mean_is_that_of_float64(objective, aggregate):
    for seed in range(3):
        (loss, _), _ = computed(objective, aggregate, *example(seed))
        assert float(loss) == pytest.approx(slowly(objective, aggregate, *example(seed)), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(("objective", "aggregate"), PAIRS)
def test_every_gradient_is_that_of_finite_differences(objective, aggregate):
    """Of the sequence's own ratio for gspo, though each token has its share of it."""
    new, old, advantage = example(1)
    _, gradient = computed(objective, aggregate, new, old, advantage)
    for index in np.ndindex(*REAL.shape):
        step = np.zeros(REAL.shape)
        step[index] = 1e-6
        up, down = (slowly(objective, aggregate, new + sign * step, old, advantage, new) for sign in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-6, abs=1e-5), index
    assert not gradient[~REAL].any() and (np.abs(gradient[REAL]) > 1e-3).sum() > 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bounds_decide_some_tokens_of_the_examples(objective):
    metrics = [computed(objective, "token", *example(seed))[0][1] for seed in range(3)]
    for name in ("clip_low", "clip_high"):
        assert max(float(each[name]) for each in metrics) > 0, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weight_of_0_leaves_a_token_out_and_2_counts_it_twice(objective):
    new, old, advantage = example(2)
    weight = np.random.default_rng(5).choice([0.0, 1.0, 2.0], REAL.shape)
    _, plain = computed(objective, "token", new, old, advantage)
    _, weighted = computed(objective, "token", new, old, advantage, weight)
    np.testing.assert_allclose(weighted, plain * weight, rtol=1e-5, atol=1e-7)
    assert (plain[(weight == 0) & REAL] != 0).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_masked_out_of_an_objective_is_neither_in_value_nor_gradient(objective):
    new, old, advantage = example(3)
    (clean, clean_metrics), clean_gradient = computed(objective, "sequence", new, old, advantage)
    for garbage in (np.nan, np.inf, 1e38):
        dirty = [np.where(REAL, x, garbage) for x in (new, old)]
        (loss, metrics), gradient = computed(objective, "sequence", *dirty, advantage)
        assert float(loss) == float(clean)
        assert jax.device_get(metrics) == jax.device_get(clean_metrics)
        np.testing.assert_array_equal(gradient, clean_gradient)


def test_cispo_keeps_the_gradient_that_clip_takes_from_a_rare_token():
    """By hand: ratio 3, advantage 2. clip is flat there; cispo has (1 + high) A d log pi."""
    new, old = np.full((3, 2, WIDTH), np.log(0.03)), np.full((3, 2, WIDTH), np.log(0.01))
    length, advantage = np.eye(3, 2, dtype=int), np.full((3, 2), 2.0)
    for objective, slope in (("clip", 0.0), ("cispo", -1.5 * 2.0 / 2)):
        _, gradient = computed(objective, "token", new, old, advantage, length=length)
        assert gradient[0, 0, 0] == pytest.approx(slope, rel=1e-5)


def test_gspo_clips_a_sequence_by_its_mean_log_ratio_and_not_a_token_by_its_own():
    """By hand: log ratios 0.4 and -0.4, so that s is 1: no bound decides, and the gradient is -A / N."""
    old = np.zeros((3, 2, WIDTH))
    new, length = old.copy(), np.where(np.eye(3, 2, dtype=int), 2, 0)
    new[:, :, 0], new[:, :, 1] = 0.4, -0.4
    (_, metrics), gradient = computed("gspo", "token", new, old, np.ones((3, 2)), length=length)
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    np.testing.assert_allclose(gradient[0, 0, :2], [-0.25, -0.25], rtol=1e-6)
    new[:, :, 1] = -0.3  # s = exp(0.05)
    (loss, metrics), gradient = computed("gspo", "token", new, old, np.ones((3, 2)), length=length)
    assert float(metrics["clip_high"]) == 1 and not gradient.any()
    assert float(loss) == pytest.approx(-1.03)


# --- means


def test_means_by_hand():
    """Two sequences of a query with 1 and 3 tokens, one of another with 2, none of a third."""
    length, query = np.array([[1, 3], [2, 0], [0, 0]]), np.array([5, 8, 9])
    expected = {
        "token": None,
        "sequence": [[6 / 3, 6 / 9], [6 / 6, 0], [0, 0]],  # N / (3 sequences x length)
        "prompt": [[6 / 8, 6 / 8], [6 / 4, 6 / 4], [0, 0]],  # N / (2 queries x tokens of the query)
        "constant": [[6 / 30, 6 / 30]] * 3,  # N / (3 sequences x 10)
    }
    assert set(expected) == set(AGGREGATES)
    for name, shares in expected.items():
        found = aggregate_shares(name, length, query, 10)
        if shares is None:
            assert found is None
        else:
            np.testing.assert_allclose(found[length > 0], np.array(shares)[length > 0], rtol=1e-6)


lengths = st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=6)


@given(lengths, st.data())
def test_means_weigh_tokens_by_1_on_average_and_the_constant_one_by_how_full_answers_are(lengths, data):
    length = np.array(lengths)
    query = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(length), max_size=len(length))))
    for name in ("sequence", "prompt", "constant"):
        shares = aggregate_shares(name, length, query, 50).astype(float)
        assert np.isfinite(shares).all()
        if length.sum():
            mean = (shares * length).sum() / length.sum()
            full = length.sum() / ((length > 0).sum() * 50) if name == "constant" else 1.0
            assert mean == pytest.approx(full, rel=1e-5)


@given(lengths, st.randoms())
def test_means_do_not_depend_on_the_order_of_states(lengths, random):
    length, query = np.array(lengths), np.arange(len(lengths)) // 2
    order = list(range(len(lengths)))
    random.shuffle(order)
    for name in ("sequence", "prompt", "constant"):
        shares = aggregate_shares(name, length, query, 50)
        np.testing.assert_array_equal(aggregate_shares(name, length[order], query[order], 50), shares[order])


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_micro_batches_of_sequences_add_up_to_the_whole_for_every_mean(aggregate):
    """Since shares and denominator are of the whole minibatch."""
    new, old, advantage = example(4)
    shares = aggregate_shares(aggregate, LENGTH, QUERIES, LIMIT)
    scaled = advantage if shares is None else advantage * shares
    (whole, _), gradient = computed("gspo", aggregate, new, old, advantage)
    parts = []
    for g in range(3):  # of one shape, so that one program serves: the other states are emptied
        length = np.where(np.arange(3)[:, None] == g, LENGTH, 0)
        mask = (np.arange(WIDTH) < length[..., None]).reshape(-1, WIDTH)
        spread = np.broadcast_to(scaled[..., None], REAL.shape)
        arrays = [x.reshape(-1, WIDTH).astype(np.float32) for x in (new, old, spread)]
        parts.append(differentiated("gspo")(*arrays, mask, np.float32(REAL.sum())))
    assert float(sum(loss for (loss, _), _ in parts)) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(sum(g for _, g in parts).reshape(gradient.shape), gradient, rtol=1e-5)
