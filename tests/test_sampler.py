"""The inverse CDF against the exact distribution, filters, a sharded vocabulary, and the keys of rows."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import examples, placement

from fr3e_jax.engine import filters
from fr3e_jax.engine.filters import BLOCK_TOKENS, cutoff
from fr3e_jax.engine.sampler import GREEDY, Drawn, Sampling, draw, draw_uniform, row_key
from fr3e_jax.parallel.mesh import BATCH_AXES

LAST = np.nextafter(np.float32(1), np.float32(0))  # the largest uniform below 1
ROUNDING = 1e-6  # of a float32 CDF, against the exact one
EVERYTHING = Sampling()


@functools.partial(jax.jit, static_argnums=(2, 3))
def drawn_batch(logits, uniform, sampling, parts):
    return jax.vmap(lambda u: draw(logits, u, sampling, parts))(uniform)


def drawn_many(logits, uniform, sampling=EVERYTHING, parts=1):
    """One draw per uniform number from one distribution, compiled as in the decoding loop.

    In batches of one size, so that however many the numbers, it is compiled once.
    """
    batches = np.zeros((-(-len(uniform) // 4096), 4096), np.float32)
    batches.ravel()[: len(uniform)] = uniform
    drawn = [drawn_batch(logits, batch, sampling, parts) for batch in batches]
    return Drawn(*(np.concatenate(x)[: len(uniform)] for x in zip(*drawn, strict=True)))


def draw_many(logits, uniform, sampling=EVERYTHING):
    return drawn_many(logits, uniform, sampling).token


def probabilities(logits, temperature=1.0):
    """Softmax in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def reference(logits, sampling):
    """The distribution to draw from, in float64: sorted, and filtered in the order of the fields."""
    if sampling.temperature == 0.0:
        return (np.arange(len(logits)) == np.argmax(logits)).astype(np.float64)
    probability = probabilities(logits, sampling.temperature)
    order = np.argsort(-logits, kind="stable")

    def keep_first(count):
        """The `count` most likely tokens and what is as likely as the last of them, renormalised."""
        kept = logits >= logits[order[min(count, len(order)) - 1]]
        return np.where(kept, probability, 0.0) / probability[kept].sum()

    if sampling.top_k:
        probability = keep_first(sampling.top_k)
    if sampling.top_p < 1.0:
        probability = keep_first(1 + np.searchsorted(np.cumsum(probability[order]), sampling.top_p))
    return probability


def random_logits(size, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def uniforms(count, seed=0):
    return np.random.default_rng(seed).random(count, np.float32)


@jax.jit
def numbers_of(seed, step, query, branch, position):
    def one(step, query, branch, position):
        return draw_uniform(row_key(jax.random.key(seed), step, query, branch), position)

    return jax.vmap(one)(step, query, branch, position)


def check_chi_square(token, probability):
    """Counts fit the distribution: within four standard deviations of the statistic's mean."""
    expected = probability * len(token)
    count = np.bincount(token, minlength=len(probability))
    common = expected >= 5  # the rare tokens are counted together
    expected = np.append(expected[common], expected[~common].sum())
    count = np.append(count[common], count[~common].sum())
    used = expected > 0
    assert not count[~used].any()
    statistic = ((count[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def check_inverse_cdf(token, uniform, probability):
    """Each token can be drawn, and its step of the CDF has its uniform number, up to rounding."""
    assert (probability[token] > 0).all()
    cdf = np.cumsum(probability)
    assert (uniform < cdf[token] + ROUNDING).all()
    assert (uniform > cdf[token] - probability[token] - ROUNDING).all()


def clear_of_steps(uniform, probability):
    """The numbers that rounding cannot carry over a step of the CDF."""
    distance = np.abs(uniform[:, None] - np.cumsum(probability)[None])
    clear = uniform[distance.min(axis=1) > ROUNDING]
    assert len(clear) > len(uniform) / 2
    return clear


# --- the distribution


@pytest.mark.optimised
def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = random_logits(1000)
    token = draw_many(logits, uniforms(100_000))
    assert token.dtype == np.int32
    check_chi_square(token, probabilities(logits))


@pytest.mark.optimised
@pytest.mark.parametrize("temperature", [0.5, 0.7, 2.0])
def test_the_temperature_divides_the_logits(temperature):
    logits = random_logits(1000, 1, 1.0)
    token = draw_many(logits, uniforms(50_000, 1), Sampling(temperature))
    check_chi_square(token, probabilities(logits, temperature))
    # So many draws can tell it from temperature 1.
    with pytest.raises(AssertionError):
        check_chi_square(token, probabilities(logits))


@pytest.mark.optimised
@pytest.mark.parametrize("size", [1, 7, BLOCK_TOKENS, BLOCK_TOKENS + 1, 640, 768, 1000, 1024])
def test_a_draw_is_where_the_cdf_passes_the_uniform_number(size):
    logits = random_logits(size, 2, 1.0)
    uniform = uniforms(4096, 2)
    token = draw_many(logits, uniform)
    assert token.min() >= 0 and token.max() < size
    check_inverse_cdf(token, uniform, probabilities(logits))


@pytest.mark.optimised
def test_a_step_of_the_cdf_holds_its_lower_end_and_not_its_upper():
    places = np.arange(1024)
    np.testing.assert_array_equal(draw_many(np.zeros(1024, np.float32), places / 1024), places)


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("count", "hotter"), [(100_000, 1.07), pytest.param(800_000, 1.025, marks=pytest.mark.slow)]
)
def test_draws_with_the_engines_numbers_from_the_vocabulary_of_qwen_fit(count, hotter):
    logits = random_logits(152_064, 3, 3.0)
    branch, position = np.divmod(np.arange(count), 1000)
    zero = np.zeros_like(branch)
    token = draw_many(logits, np.asarray(numbers_of(0, zero, zero, branch, position)))
    probability = probabilities(logits)
    assert (probability * len(token) >= 5).sum() > count / 100  # tokens that are counted one by one
    check_chi_square(token, probability)
    with pytest.raises(AssertionError):  # so many draws can tell it from a temperature a little higher
        check_chi_square(token, probabilities(logits, hotter))


# --- tokens that cannot be drawn


@pytest.mark.optimised
@pytest.mark.parametrize("size", [2, 7, BLOCK_TOKENS, BLOCK_TOKENS + 44, 1000])
@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
def test_zero_heads_and_tails_are_never_drawn(size, uniform):
    """Also where whole blocks are zero, and the last block is filled up."""
    for head, tail in {(0, 0), (1, 0), (0, 1), (size // 2, size // 3), (size - 1, 0), (0, size - 1)}:
        logits = np.zeros(size, np.float32)
        logits[:head] = logits[size - tail :] = -np.inf
        if head + tail >= size:
            continue
        token = int(draw_many(logits, np.float32([uniform]))[0])
        expected = {0.0: head, 0.5: head + (size - head - tail) // 2, LAST: size - tail - 1}[uniform]
        if uniform == 0.5:  # rounding may decide between two in the middle
            assert abs(token - expected) <= 1
        else:
            assert token == expected


def test_a_certain_token_is_always_drawn():
    for place in (0, 3, BLOCK_TOKENS - 1, BLOCK_TOKENS, 599):
        logits = np.full(600, -np.inf, np.float32)
        logits[place] = -4.0
        token = draw_many(logits, np.float32([0.0, 0.3, 0.999, LAST]))
        np.testing.assert_array_equal(token, place)


@pytest.mark.optimised
@pytest.mark.parametrize("size", [300, 1000])
def test_no_uniform_number_draws_a_token_of_probability_zero(size):
    """The numbers where rounding could: at every step of the CDF and a few float32 to either side."""
    rng = np.random.default_rng(size)
    drawn = []
    for trial in range(16):
        logits = random_logits(size, trial, 3.0)
        logits[rng.random(size) < (0.2, 0.5, 0.9, 0.99)[trial % 4]] = -np.inf
        logits[rng.integers(size)] = 0.0
        steps = np.round(np.cumsum(probabilities(logits)) * 2**24)[:, None] + np.arange(-4, 5)
        uniform = (np.clip(steps, 0, 2**24 - 1) * 2.0**-24).astype(np.float32)
        token = draw_many(logits, uniform.ravel())
        assert token.max() < size
        drawn += [(trial, int(t)) for t in token[np.isneginf(logits[token])]]
    assert not drawn


# --- greedy


def test_temperature_zero_takes_the_most_likely_token_and_the_first_of_equals():
    for seed in range(5):
        logits = random_logits(700, seed)
        token = draw_many(logits, np.float32([0.0, 0.4, LAST]), GREEDY)
        np.testing.assert_array_equal(token, np.argmax(logits))
    tied = np.zeros(700, np.float32)
    tied[[300, 299, 650]] = 2.0
    np.testing.assert_array_equal(draw_many(tied, np.float32([0.0, 0.4, LAST]), GREEDY), 299)


# --- filters

FILTERS = [
    Sampling(top_k=50),
    Sampling(top_p=0.9),
    Sampling(0.7, 50, 0.9),
    Sampling(2.0, 50),
    Sampling(2.0, 0, 0.3),
    Sampling(2.0, 20, 0.9),  # of the 20, fewer have 0.9 than have 0.9 of everything
]
ALL = [EVERYTHING, Sampling(0.5), *FILTERS, GREEDY]
FEW = [EVERYTHING, Sampling(0.7, 50, 0.9), GREEDY]


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
        drawn = jax.vmap(lambda u: draw(logits, u, sampling))(uniform)
    check_inverse_cdf(np.asarray(drawn.token), uniform, probability)
    np.testing.assert_allclose(drawn.sampled_logprob, np.log(probability[drawn.token]), atol=1e-5)


# --- filters look at the likely blocks first


def filtered_and_full(logits, sampling, parts):
    """What a filter keeps and the weights of blocks, float32 [] and [parts, blocks], found in both ways.

    And how many tokens `cutoff` was given each time on the first way: those of the likely blocks, and where
    these did not do, all.
    """
    searched, top = [], logits.max()
    below = logits.reshape(parts, -1) - top

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
        found = filters.filtered(jnp.asarray(below + top), top, weigh, sampling, width)
    return found, (kept_of_all, weight_of_all), searched


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


# --- a vocabulary in parts


def check_same(ours, theirs):
    np.testing.assert_array_equal(ours.token, theirs.token)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FEW, ids=str)
@pytest.mark.parametrize("size, parts", [(1000, 2), (2408, 4)])
def test_parts_of_the_vocabulary_change_nothing(sampling, size, parts):
    """Parts of several blocks, the last not full."""
    logits = random_logits(size, 10)
    uniform = clear_of_steps(uniforms(2000, 10), reference(logits, sampling))
    check_same(drawn_many(logits, uniform, sampling, parts), drawn_many(logits, uniform, sampling))


WIDE = 8 * 604  # parts of several blocks, the last not full
over = pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 1, 8)], ids=["2x4", "8"])


@functools.cache
def compiled_over(mesh, sampling):
    """Two rows for each part of the batch, drawn as the engine does: `draw_part` of branches.py."""
    place = placement(*mesh)

    def draw_part(logits, uniform):
        return jax.vmap(lambda logits, u: draw(logits, u, sampling, mesh[2], place.shard))(logits, uniform)

    shape = (mesh[0], 2)
    logits = jax.ShapeDtypeStruct(
        (*shape, WIDE), jnp.float32, sharding=place.sharding("batch", None, "vocab")
    )
    uniform = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place.sharding("batch", None))
    return jax.jit(jax.vmap(draw_part, spmd_axis_name=BATCH_AXES)).lower(logits, uniform).compile()


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", FEW, ids=str)
@over
def test_a_sharded_vocabulary_gives_what_one_device_gives(mesh, sampling):
    place, compiled = placement(*mesh), compiled_over(mesh, sampling)
    shape = (mesh[0], 2)
    for seed in range(4):
        logits = np.stack([random_logits(WIDE, 100 * seed + row) for row in range(2 * mesh[0])])
        uniform = np.float32(
            [clear_of_steps(uniforms(20, seed), reference(row, sampling))[0] for row in logits]
        )
        alone = [drawn_many(row, u[None], sampling) for row, u in zip(logits, uniform, strict=True)]
        many = compiled(
            place.place(logits.reshape(*shape, WIDE), "batch", None, "vocab"),
            place.place(uniform.reshape(shape), "batch", None),
        )
        check_same(Drawn(*(np.ravel(x) for x in many)), Drawn(*map(np.concatenate, zip(*alone, strict=True))))


@pytest.mark.parametrize("sampling", FEW, ids=str)
@over
def test_a_sharded_vocabulary_is_never_gathered(mesh, sampling):
    """No array of a device is as large as one vocabulary; two rows of its part are smaller."""
    text = compiled_over(mesh, sampling).as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert 2 * WIDE // mesh[2] <= largest < WIDE


BLOCKS = [
    ((2, 1, 4), Sampling(0.7, 7, 0.9)),
    ((1, 1, 8), Sampling(top_p=0.2)),
    pytest.param((2, 1, 4), Sampling(top_p=0.2), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), Sampling(0.7, 7, 0.9), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh, sampling", BLOCKS)
def test_choosing_blocks_gathers_no_sharded_vocabulary(mesh, sampling, monkeypatch):
    """With blocks so small that a filter has enough of them to choose from."""
    monkeypatch.setattr(filters, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(filters, "LIKELY", 9)
    compiled_over.cache_clear()  # what was compiled with the usual blocks
    try:
        test_a_sharded_vocabulary_gives_what_one_device_gives(mesh, sampling)
        test_a_sharded_vocabulary_is_never_gathered(mesh, sampling)
    finally:
        compiled_over.cache_clear()


# --- keys


def test_each_of_step_query_branch_and_position_changes_the_number():
    grid = np.array(list(itertools.product(range(5), repeat=4)), np.int32)
    number = np.asarray(numbers_of(0, *grid.T))
    assert number.min() >= 0 and number.max() < 1
    # 625 rows with distinct numbers: exchanging two of the four (query 1 branch 2, query 2 branch 1)
    # gives other randomness too.
    assert len(set(number.tolist())) == len(grid)
    assert not set(number.tolist()) & set(np.asarray(numbers_of(1, *grid.T)).tolist())


def test_the_number_of_a_row_does_not_depend_on_where_it_is_drawn():
    grid = np.array(list(itertools.product(range(5), repeat=4)), np.int32)
    number = np.asarray(numbers_of(3, *grid.T))
    for i in (0, 77, 624):
        step, query, branch, position = map(int, grid[i])
        alone = draw_uniform(row_key(jax.random.key(3), step, query, branch), jnp.int32(position))
        assert float(alone) == number[i]
    order = np.random.default_rng(0).permutation(len(grid))
    np.testing.assert_array_equal(numbers_of(3, *grid[order].T), number[order])


@pytest.mark.parametrize("axis", range(4))
def test_numbers_along_each_of_the_four_are_uniform_and_unrelated(axis):
    count, bins = 4000, 20
    place = np.full((count, 4), 2, np.int32)
    place[:, axis] = np.arange(count)
    number = np.asarray(numbers_of(0, *place.T))
    check_chi_square((number * bins).astype(int), np.full(bins, 1 / bins))
    # Neighbours are not correlated: four standard deviations of a correlation of nothing.
    assert abs(np.corrcoef(number[:-1], number[1:])[0, 1]) < 4 / math.sqrt(count)
