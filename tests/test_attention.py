"""Attention over a chain of segments equals attention over their concatenation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.models import attention
from fr3e_jax.models.attention import Part, Prefix, attend, attend_sequence

T, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 3, 4, 2, 8, 5


def reference(query, keys, values, mask):
    """One softmax over everything, head by head, in float64."""
    out = np.zeros(query.shape)
    for t in range(query.shape[0]):
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            score = keys[kv, mask[t]] @ query[t, head] / np.sqrt(HEAD_DIM)
            weight = np.exp(score - score.max())
            out[t, head] = weight / weight.sum() @ values[kv, mask[t]]
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, SLOTS), min_size=3, max_size=3).filter(any),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_joined_parts_equal_one_softmax(seed, lengths, scale):
    rng = np.random.default_rng(seed)
    query = scale * rng.standard_normal((T, HEADS, HEAD_DIM)).astype(np.float32)
    keys = rng.standard_normal((3, KV_HEADS, SLOTS, HEAD_DIM)).astype(np.float32)
    values = rng.standard_normal((3, KV_HEADS, SLOTS, HEAD_DIM)).astype(np.float32)
    masks = [np.tile(np.arange(SLOTS) < n, (T, 1)) for n in lengths]
    parts = [Part(*map(jnp.asarray, part)) for part in zip(keys, values, masks, strict=True)]
    expected = reference(
        query.astype(np.float64),
        np.concatenate(keys, axis=1).astype(np.float64),
        np.concatenate(values, axis=1).astype(np.float64),
        np.concatenate(masks, axis=1),
    )
    np.testing.assert_allclose(attend(jnp.asarray(query), parts), expected, rtol=2e-5, atol=2e-5)


def test_what_lies_beyond_a_segments_length_is_never_read():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((1, HEADS, HEAD_DIM)), jnp.float32)
    key = rng.standard_normal((KV_HEADS, SLOTS, HEAD_DIM)).astype(np.float32)
    mask = jnp.asarray([[True, True, False, False, False]])
    clean = attend(query, [Part(jnp.asarray(key), jnp.asarray(key), mask)])
    key[:, 2:] = 1e9
    dirty = attend(query, [Part(jnp.asarray(key), jnp.asarray(key), mask)])
    np.testing.assert_array_equal(clean, dirty)


# Blocks have 2 tokens, and 4 of them are a loop: one block, several, a loop, loops with and without more.
@pytest.mark.parametrize("length", [1, 3, 8, 9, 16, 21])
@pytest.mark.parametrize("follows", [False, True])
def test_blocks_and_loops_of_them_equal_one_causal_softmax_with_its_gradient(monkeypatch, length, follows):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    rng = np.random.default_rng(length)
    query, weight = rng.standard_normal((2, length, HEADS, HEAD_DIM)).astype(np.float32)
    key, value = rng.standard_normal((2, KV_HEADS, length, HEAD_DIM)).astype(np.float32)
    shared = rng.standard_normal((2, 1, KV_HEADS, SLOTS, HEAD_DIM)).astype(np.float32)
    real, held = np.arange(length) < max(length - 2, 1), 3
    prefix = Prefix(*map(jnp.asarray, shared), jnp.int32(0), jnp.int32(held)) if follows else None

    seen = (np.tri(length, dtype=bool) & real) | np.eye(length, dtype=bool)
    before = np.tile(np.arange(SLOTS) < held, (length, 1))
    keys, values, mask = key, value, seen
    if follows:
        pairs = (shared[0, 0], key), (shared[1, 0], value)
        keys, values = (np.concatenate(pair, axis=1) for pair in pairs)
        mask = np.concatenate([before, seen], axis=1)

    def at_once(query, key, value):
        parts = [Part(jnp.asarray(shared[0, 0]), jnp.asarray(shared[1, 0]), jnp.asarray(before))] * follows
        return attend(query, [*parts, Part(key, value, jnp.asarray(seen))])

    def in_blocks(query, key, value):
        return attend_sequence(query, key, value, jnp.asarray(real), prefix)

    given_to = tuple(map(jnp.asarray, (query, key, value)))
    expected = reference(*(x.astype(np.float64) for x in (query, keys, values)), mask)
    np.testing.assert_allclose(in_blocks(*given_to), expected, rtol=2e-5, atol=2e-5)
    ours, theirs = (
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), argnums=(0, 1, 2))(*given_to)
        for f in (in_blocks, at_once)
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-5)
