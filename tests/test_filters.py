"""Temperature, top_k and top_p: what is kept and drawn, also where likely blocks are looked at first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import (
    ALL,
    EVERYTHING,
    FILTERS,
    LAST,
    ROUNDING,
    check_chi_square,
    check_inverse_cdf,
    draw_many,
    drawn_many,
    probabilities,
    random_logits,
    reference,
    uniforms,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import examples

from fr3e_jax.engine import filters
from fr3e_jax.engine.filters import cutoff
from fr3e_jax.engine.sampler import GREEDY, Sampling, draw


def kept(logits, sampling):
    """Which tokens can be drawn."""
    below = logits - logits.max()
    with jax.disable_jit():
        return np.abs(below) <= np.asarray(cutoff(below, sampling))


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_filtered_tokens_are_drawn_as_often_as_they_are_likely_and_no_others(sampling):
    logits = random_logits(1000, 4)
    probability = reference(logits, sampling)
    possible = np.flatnonzero(probability)
    assert 5 < len(possible) < 500
    token = draw_many(logits, np.append(uniforms(60_000, 4), [0, LAST]), sampling)
    assert set(token.tolist()) == set(possible.tolist())
    assert token[-2] == possible[0] and token[-1] == possible[-1]
    check_chi_square(token, probability)
    with pytest.raises(AssertionError):  # so many draws can tell it from one that keeps a token less
        worst = possible[np.argmin(probability[possible])]
        check_chi_square(token, np.where(np.arange(1000) == worst, 0.0, probability))


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_the_tokens_kept_are_those_of_transformers(sampling):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(10):
        # Without equals, of which transformers takes some, and none so close that a float32 makes them equal.
        apart = np.unique(random_logits(1000, seed, 3.0).round(3))[-800:]
        logits = np.random.default_rng(seed).permutation(apart)
        theirs = TemperatureLogitsWarper(float(sampling.temperature))(None, torch.tensor(logits)[None])
        if sampling.top_k:
            theirs = TopKLogitsWarper(sampling.top_k)(None, theirs)
        if sampling.top_p < 1.0:
            theirs = TopPLogitsWarper(sampling.top_p)(None, theirs)
        np.testing.assert_array_equal(kept(logits, sampling), theirs[0].isfinite().numpy())


@pytest.mark.parametrize(
    "sampling", [Sampling(2.0, 1), Sampling(top_p=1e-6), Sampling(0.7, 9, 1e-9)], ids=str
)
def test_a_filter_that_leaves_one_token_is_greedy(sampling):
    for seed in range(5):
        logits, uniform = random_logits(1000, seed), np.append(uniforms(100, 5), LAST)
        drawn = drawn_many(logits, uniform, sampling)
        np.testing.assert_array_equal(drawn.token, draw_many(logits, uniform, GREEDY))
        np.testing.assert_array_equal(drawn.sampled_logprob, 0.0)


@pytest.mark.parametrize("top_k", [1000, 10**6])
def test_filters_that_keep_everything_change_no_token(top_k):
    for seed in range(4):
        logits, uniform = random_logits(1000, seed), np.append(uniforms(4000, seed), LAST)
        logits[::7] = -np.inf
        plain = draw_many(logits, uniform, Sampling(0.7))
        np.testing.assert_array_equal(draw_many(logits, uniform, Sampling(0.7, top_k, 1.0)), plain)


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept():
    tied = np.zeros(600, np.float32)
    for sampling in (Sampling(top_k=3), Sampling(top_p=0.1), Sampling(0.7, 3, 0.1)):
        assert kept(tied, sampling).all()
    check_chi_square(draw_many(tied, uniforms(100_000, 7), sampling), probabilities(tied))
    steps = np.float32([1, 3, 2, 2, 0, 2, -1])  # the second and third of the three likely ones have equals
    np.testing.assert_array_equal(kept(steps, Sampling(top_k=1)), steps >= 3)
    for top_k in (2, 3, 4):
        np.testing.assert_array_equal(kept(steps, Sampling(top_k=top_k)), steps >= 2)
    np.testing.assert_array_equal(kept(steps, Sampling(top_k=5)), steps >= 1)


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("left", [1, 3, 200])
def test_filters_never_let_a_token_of_probability_zero_through(sampling, left):
    """Also where fewer tokens are left than top_k, in few of the blocks."""
    logits, uniform = random_logits(1000, 8), np.append(uniforms(2000, 8), [0, LAST])
    logits[np.random.default_rng(left).permutation(1000)[left:]] = -np.inf
    check_inverse_cdf(draw_many(logits, uniform, sampling), uniform, reference(logits, sampling))


# Steps of 1/2 make equals. Not compiled, so that temperature, top_k and top_p can be any.
LOGIT = st.one_of(st.just(-np.inf), st.integers(-12, 12).map(lambda n: n / 2))
ANY = st.builds(
    Sampling,
    st.floats(0.3, 4.0),
    st.one_of(st.just(0), st.integers(1, 20), st.integers(1, 400)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
)


@given(
    st.one_of(
        arrays(np.float32, 300, elements=LOGIT, fill=st.nothing()),
        arrays(np.float32, 300, elements=LOGIT, fill=st.just(np.float32(-np.inf))),  # few tokens
    ),
    ANY,
    arrays(np.float32, 8, elements=st.floats(0, float(LAST), width=32), fill=st.nothing()),
)
@examples(12)
@example(np.zeros(300, np.float32), Sampling(1.0, 7, 0.2), np.linspace(0, LAST, 8, dtype=np.float32))
def test_any_draw_is_where_the_filtered_cdf_passes_the_uniform_number(logits, sampling, uniform):
    assume(np.isfinite(logits).any())
    probability = reference(logits, sampling)
    for moved in (-ROUNDING, ROUNDING):  # not where rounding may decide what top_p keeps
        near = dataclasses.replace(sampling, top_p=sampling.top_p + moved)
        assume(sampling.top_p == 1.0 or (reference(logits, near) == probability).all())
    with jax.disable_jit():
        drawn = jax.vmap(lambda u: draw(jnp.asarray(logits), u, sampling))(uniform)
    check_inverse_cdf(np.asarray(drawn.token), uniform, probability)
    np.testing.assert_allclose(drawn.sampled_logprob, np.log(probability[drawn.token]), atol=1e-5)


# --- filters look at the likely blocks first


def filtered_and_full(logits, sampling, parts):
    """What a filter keeps and the weights of blocks, float32 [] and [parts, blocks], found in both ways.

    And how many tokens `cutoff` was given each time on the first way: those of the likely blocks, and where
    these did not do, all.
    """
    searched, top = [], logits.max()
    below = jnp.asarray(logits.reshape(parts, -1) - top)

    def weigh(logits, kept=np.inf):
        distance = jnp.abs(logits - top)
        return jnp.where(distance <= kept, jnp.exp(-distance / sampling.temperature), 0.0)

    def cutoff_counted(below, *arguments):
        searched.append(below.size)
        return cutoff(below, *arguments)

    width = filters.block_width(below.shape[1])
    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        kept_of_all = cutoff(below, sampling)
        weight_of_all = filters.block_sums(below + top, lambda x: weigh(x, kept_of_all), width)
        patch.setattr(filters, "cutoff", cutoff_counted)
        found = filters.filtered(below + top, top, weigh, sampling, width)
    return found, (kept_of_all, weight_of_all), searched


@pytest.mark.slow
@given(
    st.sampled_from([(7, 1), (300, 3)]),
    st.sampled_from([0.0, 0.01, 1.0, 5.0]),
    st.sampled_from([0.0, 0.5, 0.99]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    # One top_k, and as many blocks for top_p: other numbers are other shapes to compile.
    st.builds(
        Sampling, st.floats(0.3, 4.0), st.sampled_from([0, 5]), st.one_of(st.just(1.0), st.floats(0.01, 0.99))
    ).filter(lambda sampling: sampling.top_k or sampling.top_p < 1),
)
@examples(8)
@example((1, 1), 1.0, 0.0, True, 0, Sampling(0.7, 5, 0.9))
@example((300, 3), 1.0, 0.0, True, 0, Sampling(0.7, 400, 0.9))
@example((4097, 1), 1.0, 0.5, True, 0, Sampling(0.7, 5, 0.9))
@example((151_936 // 8, 2), 5.0, 0.0, False, 0, Sampling(1.0, 0, 0.9))
def test_the_likely_blocks_give_what_the_whole_vocabulary_gives(shape, scale, masked, tied, seed, sampling):
    """Parts that blocks do not divide, of fewer blocks than top_k; equals; flat; with few tokens left."""
    size, parts = shape
    logits = random_logits(parts * size, seed, scale)
    logits = np.round(logits) if tied else logits
    mask = np.random.default_rng(seed).random(logits.size) < masked
    mask[seed % logits.size] = False
    logits[mask] = -np.inf
    if sampling.top_p < 1.0:  # not where rounding may decide what top_p keeps
        near = [dataclasses.replace(sampling, top_p=sampling.top_p + x) for x in (-1e-5, 1e-5)]
        assume((kept(logits, near[0]) == kept(logits, near[1])).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "LIKELY", 7)
        (limit, weight), (limit_of_all, weight_of_all), _ = filtered_and_full(logits, sampling, parts)
    finite = np.isfinite(logits)
    distance = np.abs(logits - logits.max())[finite]
    np.testing.assert_array_equal(distance <= limit, distance <= limit_of_all)
    np.testing.assert_allclose(weight, weight_of_all, rtol=1e-5)


LOOKED = [Sampling(top_k=20), Sampling(0.7, 20, 0.9), Sampling(top_p=0.5)]


@pytest.mark.parametrize("sampling", LOOKED, ids=str)
def test_all_tokens_are_looked_at_only_where_those_of_the_likely_blocks_do_not_decide(sampling):
    logits, parts = random_logits(20_000, 14, 5.0), 2
    looked_at = []
    for scale in (1.0, 0.0):
        found, full, searched = filtered_and_full(logits * np.float32(scale), sampling, parts)
        assert found[0] == full[0]
        np.testing.assert_allclose(found[1], full[1], rtol=1e-5)
        looked_at += searched
    few, few_of_flat, all_of_flat = looked_at
    assert few == few_of_flat <= parts * filters.LIKELY * filters.NARROW < all_of_flat == logits.size


@pytest.mark.parametrize("sampling", LOOKED[:2], ids=str)
def test_equals_of_the_last_kept_token_in_blocks_that_were_not_looked_at_are_kept(sampling):
    """16 likely tokens are not enough for 20, and all others are equals."""
    logits = np.zeros(20_000, np.float32)
    logits[::1250] = 1.0
    found, full, searched = filtered_and_full(logits, sampling, 2)
    assert found[0] == full[0] == 1.0 and searched[1:] == [logits.size]
    np.testing.assert_allclose(found[1], full[1], rtol=1e-6)


# --- log-probabilities and entropy


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", ALL, ids=str)
@pytest.mark.parametrize("left", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_logprobs_and_entropy_are_those_of_the_two_distributions(sampling, left):
    """Of the token as it was drawn, and whatever the sampling, of the policy as it is."""
    logits = random_logits(1000, 9)
    logits[np.random.default_rng(9).permutation(1000)[left:]] = -np.inf
    drawn = drawn_many(logits, uniforms(2000, 9), sampling)
    policy = probabilities(logits)
    with np.errstate(divide="ignore"):
        exact, exact_sampled = np.log(policy), np.log(reference(logits, sampling))
    np.testing.assert_allclose(drawn.sampled_logprob, exact_sampled[drawn.token], atol=1e-5)
    np.testing.assert_allclose(drawn.logprob, exact[drawn.token], atol=1e-5)
    np.testing.assert_allclose(drawn.logprob, jax.nn.log_softmax(logits)[drawn.token], atol=1e-5)
    np.testing.assert_allclose(drawn.entropy, -np.sum(policy[policy > 0] * exact[policy > 0]), atol=1e-5)
    if sampling == GREEDY:
        np.testing.assert_array_equal(drawn.sampled_logprob, 0.0)
    elif sampling != EVERYTHING:  # the two can be told apart
        assert np.abs(drawn.sampled_logprob - drawn.logprob).max() > 0.01
