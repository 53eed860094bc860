"""Accepted states laid out: every rollout once and whole, within the budget, with little padding."""

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
