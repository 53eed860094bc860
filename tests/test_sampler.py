"""The inverse CDF against the exact distribution, tokens that cannot be drawn, and the keys of rows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import (
    LAST,
    check_chi_square,
    check_inverse_cdf,
    draw_many,
    numbers_of,
    probabilities,
    random_logits,
    uniforms,
)

from fr3e_jax.engine.filters import BLOCK_TOKENS
from fr3e_jax.engine.sampler import GREEDY, Sampling, draw_uniform, row_key

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
