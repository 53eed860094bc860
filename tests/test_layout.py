"""Accepted states laid out: every rollout once and whole, within the budget, with little padding."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support import whole_rows

from fr3e_jax.bench.update import padding_waste
from fr3e_jax.learner.layout import OVERHEAD, bundles_of, cut_rows, token_counts, width_of
from fr3e_jax.types import StateGroups


@st.composite
def worlds(draw):
    """States whose every token says where it belongs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trees, states, rollouts = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    number = trees * states
    tree = np.repeat(np.arange(trees), states)
    state = np.tile(np.arange(states), trees)
    query_length = rng.integers(1, 9, trees)[tree]
    prefix_length = rng.integers(0, 30, number)
    length = rng.integers(1, 60, (number, rollouts))
    place = np.arange(60)
    return StateGroups(
        query=(10_000 * (tree[:, None] + 1) + np.arange(8)).astype(np.int32),
        query_length=query_length.astype(np.int32),
        prefix=(10_000 * (tree[:, None] + 1) + 100 + np.arange(30)).astype(np.int32),
        prefix_length=prefix_length.astype(np.int32),
        token=(
            1_000_000 * (np.arange(number)[:, None, None] + 1) + 1000 * np.arange(rollouts)[:, None] + place
        ).astype(np.int32),
        logprob=-rng.random((number, rollouts, 60), np.float32),
        length=length.astype(np.int32),
        advantage=rng.standard_normal((number, rollouts)).astype(np.float32),
        source=np.stack([tree, np.zeros(number), state], 1).astype(np.int32),
    )


@given(worlds(), st.sampled_from([1, 2, 4]), st.sampled_from([16, 100, 5000]), st.booleans())
def test_every_rollout_is_there_once_and_whole(groups, parts, budget, shared):
    bundles = bundles_of(groups, parts, budget, shared)
    found = []
    for token, length, start, logprob, advantage in whole_rows(bundles):
        state, rollout = token[start] // 1_000_000 - 1, token[start] % 1_000_000 // 1000
        found.append((state, rollout))
        new = groups.length[state, rollout]
        query, prefix = groups.query_length[state], groups.prefix_length[state]
        expected = [*groups.query[state, :query], *groups.prefix[state, :prefix]]
        assert start == len(expected) and length == start + new
        expected += [*groups.token[state, rollout, :new]]
        assert token[:length].tolist() == expected and not token[length:].any()
        np.testing.assert_array_equal(logprob[start:length], groups.logprob[state, rollout, :new])
        assert not logprob[:start].any() and advantage == groups.advantage[state, rollout]
    assert sorted(found) == list(itertools.product(*map(range, groups.length.shape)))


@given(worlds(), st.sampled_from([1, 2, 4]), st.sampled_from([16, 100, 5000]))
def test_chunks_and_trunks_keep_to_the_budget_and_windows_reach_what_rows_follow(groups, parts, budget):
    for bundle in bundles_of(groups, parts, budget):
        _, count, width = bundle.trunks.token.shape
        assert count == 1 or count * width <= budget
        for chunk, window in zip(bundle.chunks, bundle.window, strict=True):
            rows = len(chunk.token) // parts
            assert rows == 1 or rows * (chunk.token.shape[1] - 1) <= budget
            assert chunk.prefix.max() <= window <= width
            assert (chunk.trunk < count).all()


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.sampled_from([16, 100, 400]))
def test_rows_are_cut_where_it_costs_least(lengths, budget):
    """Against every way to cut them into chunks of powers of two."""
    longest = np.array(sorted(lengths, key=lambda length: -width_of(length)))

    def cheapest(first):
        if first >= len(longest):
            return 0
        width = width_of(int(longest[first]))
        counts = [count for count in (1, 2, 4, 8, 16) if count == 1 or count * width <= budget]
        counts = [count for count in counts if count < 2 * len(longest)][-3:]
        return min(count * width + OVERHEAD + cheapest(first + count) for count in counts)

    chunks = cut_rows(longest, budget)
    assert sum(count * width + OVERHEAD for _, count, width in chunks) == cheapest(0)
    assert [first for first, *_ in chunks] == [0, *itertools.accumulate(c for _, c, _ in chunks)][:-1]
    assert all(width >= longest[first] for first, _, width in chunks)


@given(worlds())
def test_a_tree_that_is_too_large_for_its_part_is_cut_and_the_work_is_even(groups):
    bundles = bundles_of(groups, 4, 5000)
    work = np.zeros(4)
    for bundle in bundles:
        for chunk in bundle.chunks:
            real = chunk.length - 1
            work += real.reshape(4, -1).sum(axis=1)
        work += bundle.trunks.length.sum(axis=1)
    if groups.length.size >= 16:  # otherwise single rows decide
        assert work.max() <= 2 * work.mean() + 60 + 38


def states_of_length(*states):
    """States of trees of their own, with rollouts of these lengths; a length of 0 is none."""
    length = np.zeros((len(states), max(map(len, states))), np.int32)
    for i, rows in enumerate(states):
        length[i, : len(rows)] = rows
    count, short = len(states), np.full(len(states), 8, np.int32)
    return StateGroups(
        query=np.ones((count, 8), np.int32),
        query_length=short,
        prefix=np.ones((count, 8), np.int32),
        prefix_length=short,
        token=np.ones((*length.shape, int(length.max())), np.int32),
        logprob=np.zeros((*length.shape, int(length.max())), np.float32),
        length=length,
        advantage=np.ones(length.shape, np.float32),
        source=np.stack([np.arange(count), np.zeros(count), np.zeros(count)], 1).astype(np.int32),
    )


def rows_by_part(bundles, parts):
    """New tokens of the rows of each part, the longest first."""
    found = [[] for _ in range(parts)]
    for bundle in bundles:
        for chunk in bundle.chunks:
            for part, own in enumerate(np.split(chunk.length - chunk.start, parts)):
                found[part].extend(own[own > 0].tolist())
    return [sorted(rows, reverse=True) for rows in found]


def test_rows_lie_beside_equally_long_ones_of_other_parts():
    """Not beside shorter ones, though there are as many tokens on each part: all wait for the longest."""
    groups = states_of_length([1024], [256] * 4, [1024], [256] * 4)
    assert rows_by_part(bundles_of(groups, 2, 8192), 2) == [[1024, *[256] * 4]] * 2


def test_a_tree_is_cut_where_another_part_would_wait_for_all_of_it():
    """8 and 4 rows: 6 on each part, in chunks of 4 and 2, though each tree is about the share of a part."""
    bundles = bundles_of(states_of_length([640] * 8, [640] * 4), 2, 8192)
    assert rows_by_part(bundles, 2) == [[640] * 6] * 2
    assert sum(chunk.token[:, 1:].size for bundle in bundles for chunk in bundle.chunks) == 2 * 6 * 640


def test_a_tree_is_not_cut_where_its_trunk_would_cost_more_than_the_wait():
    groups = states_of_length([64] * 2, [64], [64])
    long = np.full(3, 1024, np.int32)
    wide = dataclasses.replace(groups, query=np.ones((3, 1024), np.int32), query_length=long)
    bundles = bundles_of(wide, 2, 8192)
    assert sum(int((bundle.trunks.length > 0).sum()) for bundle in bundles) == 3


def test_shared_prefixes_are_counted_once_and_padding_is_within_15_percent():
    one_part, _ = padding_waste(1)
    assert one_part["ratio"] <= 1.15
    groups = StateGroups(
        query=np.ones((2, 10), np.int32),
        query_length=np.array([10, 10], np.int32),
        prefix=np.ones((2, 30), np.int32),
        prefix_length=np.array([0, 20], np.int32),
        token=np.ones((2, 3, 40), np.int32),
        logprob=np.zeros((2, 3, 40), np.float32),
        length=np.array([[40, 40, 40], [20, 20, 20]], np.int32),
        advantage=np.ones((2, 3), np.float32),
        source=np.array([[0, 0, 0], [0, 0, 1]], np.int32),
    )
    # The trunk has 29 tokens, a row the last token of its state and what it continues with but for its end.
    assert token_counts(bundles_of(groups, 1, 512))[0] == 29 + 3 * 40 + 3 * 20
    assert token_counts(bundles_of(groups, 1, 512, shared=False))[0] == 3 * 49 + 3 * 49
