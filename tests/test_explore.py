"""Token entropy, choice of positions, states and kept trajectories against slow, obvious loops."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fr3e_jax.algorithm.choose import choose_positions, uniform_positions
from fr3e_jax.algorithm.keep import keep_trajectories
from fr3e_jax.algorithm.positions import positions_of
from fr3e_jax.algorithm.states import states_of
from fr3e_jax.algorithm.trajectories import Trajectories
from fr3e_jax.engine.sampler import Sampling, draw

N, S = 3, 12  # one shape for all drawn examples, so that each option is compiled once

choose = jax.jit(choose_positions, static_argnums=(2, 3))
spread_evenly = jax.jit(uniform_positions, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def by_rule(rule, entropy, logprob, length, count, min_gap, key):
    return positions_of(rule, Trajectories(entropy, logprob, length, key, count, min_gap))


@jax.jit
def entropy_of(logits):
    """Of float32 rows, as the sampler has it: `token_entropy` of its sums over blocks."""
    return jax.vmap(lambda row: draw(row, jnp.float32(0.5), Sampling()).entropy)(logits)


def picked(position, valid):
    """Valid positions of each row as lists; what is invalid must come last and read 0."""
    position, valid = np.asarray(position), np.asarray(valid)
    assert position.dtype == np.int32 and valid.dtype == bool
    assert not position[~valid].any()
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()
    return [row[ok].tolist() for row, ok in zip(position, valid, strict=True)]


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


# --- token entropy


def entropy_slowly(logits):
    """-sum p log p in float64, row by row; p of 0 adds nothing."""
    rows = []
    for row in np.asarray(logits, np.float64):
        weight = [math.exp(x - row.max()) for x in row]
        share = [w / math.fsum(weight) for w in weight]
        rows.append(-math.fsum(p * math.log(p) for p in share if p > 0))
    return np.array(rows)


def test_entropy_of_known_distributions_is_in_nats():
    logits = np.full((4, 5), -np.inf, np.float32)
    logits[0] = 7.0  # uniform over 5
    logits[1, 3] = -2.0  # one token alone
    logits[2, [0, 4]] = 1.0  # a coin, the other tokens filtered out
    logits[3, :2] = np.log([0.75, 0.25])
    expected = [math.log(5), 0.0, math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    np.testing.assert_allclose(entropy_of(logits), expected, atol=1e-6)


def test_entropy_of_a_near_certain_token_is_zero_and_not_nan():
    logits = np.array([[300.0, 0.0, -300.0], [-1e30, 0.0, -1e30], [3e38, -3e38, 0.0]], np.float32)
    np.testing.assert_array_equal(entropy_of(logits), np.zeros(3))


def test_entropy_of_many_tokens_is_that_of_float64():
    logits = jax.random.normal(jax.random.key(0), (4, 1000))
    entropy = entropy_of(logits)
    np.testing.assert_allclose(entropy, entropy_slowly(logits), rtol=1e-5)


@given(
    arrays(np.float32, (4, 11), elements=st.floats(-50, 50, width=32) | st.just(-math.inf)),
    arrays(np.float32, (4,), elements=st.floats(-50, 50, width=32)),
)
def test_entropy_equals_the_slow_sum(logits, finite):
    logits[:, 5] = finite  # at least one token is possible
    np.testing.assert_allclose(entropy_of(logits), entropy_slowly(logits), atol=3e-6)


# --- choice of positions


def choose_slowly(score, length, count, min_gap):
    """Best score first, the earlier position on ties, none closer than min_gap to one before it."""
    chosen = []
    for t in sorted(range(1, length), key=lambda t: (-score[t], t)):
        if len(chosen) < count and all(abs(t - other) >= min_gap for other in chosen):
            chosen.append(t)
    return sorted(chosen)


@pytest.mark.parametrize("min_gap", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 1, 3])
@given(
    # Few different scores, so that there are many ties.
    arrays(np.float32, (N, S), elements=st.sampled_from([0.0, 0.25, 1.0, 2.0])),
    st.lists(st.integers(0, S), min_size=N, max_size=N),
)
def test_choice_equals_the_slow_loop(count, min_gap, score, length):
    found = choose(score, np.array(length, np.int32), count, min_gap)
    expected = [
        choose_slowly(row, size, count, max(min_gap, 1)) for row, size in zip(score, length, strict=True)
    ]
    assert picked(*found) == expected


def test_position_zero_and_padding_are_never_chosen():
    score = np.array([[9.0, 1.0, 2.0, 8.0, 8.0]], np.float32)
    assert picked(*choose(score, np.array([3]), 2)) == [[1, 2]]


def test_ties_go_to_the_earlier_position():
    score = np.array([[0.0, 5.0, 7.0, 5.0, 5.0]], np.float32)
    assert picked(*choose(score, np.array([5]), 2)) == [[1, 2]]


def test_positions_come_in_order_and_not_by_score():
    score = np.array([[0.0, 1.0, 5.0, 3.0, 9.0]], np.float32)
    assert picked(*choose(score, np.array([5]), 3)) == [[2, 3, 4]]


def test_the_gap_passes_over_neighbours_of_a_better_position():
    score = np.array([[0.0, 7.0, 8.0, 9.0, 8.5, 1.0, 2.0]], np.float32)
    length = np.array([7])
    assert picked(*choose(score, length, 3, 2)) == [[1, 3, 6]]
    assert picked(*choose(score, length, 3, 3)) == [[3, 6]]


def test_short_responses_give_fewer_positions_and_no_repeats():
    position, valid = choose_positions(np.ones((3, 4), np.float32), np.array([3, 1, 0]), 4)
    np.testing.assert_array_equal(position, [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(valid, [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("min_gap", [0, 1, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_uniform_positions_lie_in_the_middles_of_equal_parts(count, min_gap):
    length = np.arange(41, dtype=np.int32)
    for size, chosen in zip(length, picked(*spread_evenly(length, count, min_gap)), strict=True):
        candidates = max(int(size) - 1, 0)  # positions 1 to size - 1
        gap = max(min_gap, 1)
        assert len(chosen) <= count
        assert len(chosen) >= min(count, candidates // gap)
        if count and candidates:
            assert chosen  # one position needs no gap
        assert all(b - a >= gap for a, b in itertools.pairwise(chosen))
        for k, t in enumerate(chosen):
            middle = candidates * (k + 0.5) / len(chosen)  # of the k-th equal part
            assert 1 <= t < size
            assert abs(t - 1 - middle) < 1


def test_uniform_positions_of_a_known_length():
    assert picked(*spread_evenly(np.array([13]), 3)) == [[3, 7, 11]]


def test_rules_score_by_what_they_are_named_after():
    entropy = np.array([[0.0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.1]], np.float32)
    logprob = np.array([[-9.0, -3.0, -0.1, -0.2, -0.3, -2.0, -0.1]], np.float32)
    found = {
        rule: picked(*by_rule(rule, entropy, logprob, np.array([7]), 2, 0, keys_of(0)))
        for rule in ("entropy", "surprisal", "uniform")
    }
    assert found == {"entropy": [[2, 4]], "surprisal": [[1, 5]], "uniform": [[2, 5]]}


def test_every_rule_keeps_to_the_length_and_the_gap():
    rng = np.random.default_rng(0)
    entropy, logprob = rng.random((2, 40, S)).astype(np.float32)
    length = rng.integers(0, S + 1, 40).astype(np.int32)
    for rule in ("entropy", "surprisal", "random", "uniform"):
        found = picked(*by_rule(rule, entropy, -logprob, length, 3, 2, keys_of(*range(40))))
        for size, chosen in zip(length, found, strict=True):
            assert all(1 <= t < size for t in chosen)
            assert all(b - a >= 2 for a, b in itertools.pairwise(chosen))
            assert len(chosen) == len(set(chosen)) and bool(chosen) == (size > 1)


def test_random_positions_depend_on_their_key_alone():
    rng = np.random.default_rng(1)
    length = np.full(6, S, np.int32)
    keys = keys_of(3, 1, 4, 1, 5, 9)

    def at_random(keys, seed):
        entropy, logprob = np.random.default_rng(seed).random((2, 6, S)).astype(np.float32)
        return picked(*by_rule("random", entropy, -logprob, length, 2, 0, keys))

    found = at_random(keys, 0)
    assert at_random(keys, 1) == found  # not on the scores
    assert found[1] == found[3]  # equal keys, equal positions
    order = rng.permutation(6)
    assert at_random(keys[order], 0) == [found[i] for i in order]  # not on the row
    assert len({tuple(row) for row in found}) > 2


def test_random_positions_are_equally_likely():
    rows, size = 4000, 6
    zeros = np.zeros((rows, S), np.float32)
    length = np.full(rows, size, np.int32)
    found = by_rule("random", zeros, zeros, length, 1, 0, jax.random.split(jax.random.key(0), rows))
    count = np.bincount(np.concatenate(picked(*found)), minlength=S)
    share = 1 / (size - 1)
    assert count[0] == 0 and not count[size:].any()
    np.testing.assert_allclose(count[1:size], rows * share, atol=4 * math.sqrt(rows * share * (1 - share)))


# --- states


def test_states_are_the_root_and_what_lies_before_each_position():
    position = np.array([[2, 5], [3, 0], [0, 0]], np.int32)
    valid = np.array([[1, 1], [1, 0], [0, 0]], bool)
    prefix_length, state_valid = states_of(position, valid)
    # The token at position 2 is drawn again: its state holds tokens 0 and 1, that is two tokens.
    np.testing.assert_array_equal(prefix_length, [[0, 2, 5], [0, 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(state_valid, [[1, 1, 1], [1, 1, 0], [1, 0, 0]])


def test_without_positions_the_root_is_the_only_state():
    prefix_length, valid = states_of(*choose_positions(np.ones((2, 4), np.float32), np.array([4, 4]), 0))
    np.testing.assert_array_equal(prefix_length, [[0], [0]])
    np.testing.assert_array_equal(valid, [[True], [True]])


# --- kept trajectories

REWARD = np.array(
    [
        [0, 1, 1, 0],  # both kinds
        [1, 0, 0, 1],
        [1, 1, 1, 1],  # only correct
        [0, 0, 0, 0],  # only wrong
        [0.5, 0.5, 1, 0],  # only a reward of 1 is correct
    ],
    np.float32,
)

KEYS = jax.random.split(jax.random.key(0), len(REWARD))


def test_first_of_each_keeps_the_first_correct_and_the_first_wrong():
    kept = keep_trajectories(jnp.asarray(REWARD), "first_of_each", KEYS)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(kept, expected)


def test_all_keeps_every_trajectory():
    np.testing.assert_array_equal(keep_trajectories(jnp.asarray(REWARD), "all", KEYS), np.ones_like(REWARD))


def test_wrong_keeps_the_first_wrong_and_nothing_of_a_query_that_is_solved():
    kept = keep_trajectories(jnp.asarray(REWARD), "wrong", KEYS)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(kept, expected)
    looser = keep_trajectories(jnp.asarray(REWARD), "wrong", KEYS, 0.5)
    np.testing.assert_array_equal(looser[4], [0, 0, 0, 1])


def test_hardest_keeps_one_of_each_of_the_half_with_the_lowest_rewards_above_0():
    """Mean rewards .5, .5, 1, 0, .5: three of five queries, and the one without a right answer is none."""
    kept = keep_trajectories(jnp.asarray(REWARD), "hardest", KEYS)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(kept, expected)
    # Of equal ones the first; a solved query where there are not enough others.
    kept = keep_trajectories(jnp.asarray(REWARD[[0, 1]]), "hardest", KEYS[:2])
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0], [0, 0, 0, 0]])
    kept = keep_trajectories(jnp.asarray(REWARD[[2, 3, 3]]), "hardest", KEYS[:3])
    np.testing.assert_array_equal(kept, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert not np.any(keep_trajectories(jnp.zeros((3, 4)), "hardest", KEYS[:3]))


def test_hardest_follows_the_queries_and_not_their_rows():
    reward = (np.random.default_rng(1).random((8, 5)) < np.linspace(0.1, 0.9, 8)[:, None]).astype(np.float32)
    reward += np.linspace(0, 0.01, 8, dtype=np.float32)[:, None]  # no two are equal
    keys, order = jax.random.split(jax.random.key(0), 8), np.array([5, 2, 7, 0, 1, 6, 3, 4])
    kept = keep_trajectories(jnp.asarray(reward), "hardest", keys)
    np.testing.assert_array_equal(keep_trajectories(jnp.asarray(reward[order]), "hardest", keys), kept[order])


def test_random_of_each_keeps_one_of_each_kind_and_reaches_every_candidate():
    keys = jax.random.split(jax.random.key(0), (400, len(REWARD)))
    kept = np.asarray(
        jax.vmap(functools.partial(keep_trajectories, jnp.asarray(REWARD), "random_of_each"))(keys)
    )
    for row in range(len(REWARD)):
        for kind in (REWARD[row] >= 1, REWARD[row] < 1):
            if not kind.any():
                continue
            assert (kept[:, row][:, kind].sum(axis=1) == 1).all()
            share = kept[:, row][:, kind].mean(axis=0)
            # Equally likely, within four standard deviations.
            p = 1 / kind.sum()
            np.testing.assert_allclose(share, p, atol=4 * math.sqrt(p * (1 - p) / len(keys)) + 1e-9)
    # Rows choose on their own: these two choose between the same places.
    assert (kept[:, 0, 1] != kept[:, 1, 1]).any()
