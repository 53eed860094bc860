"""Attention over a chain of segments equals attention over their concatenation."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.models.attention import Part, attend

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
