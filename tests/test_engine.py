"""Branching rollouts against the slow, obvious way: every branch decoded alone, from its full prefix,
without a cache."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY, placement, tiny_params

from fr3e_jax.engine import sampler
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.qwen2 import graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries, States

B, R, M, MAX_PROMPT, MAX_NEW = 4, 3, 2, 8, 24
ENDS = (3, 11)
GRAPH = graph_of(TINY)
PARAMS = tiny_params(scale=3.0)
SEED_KEY = jax.random.key(7)
STEP = 5


@jax.jit
def full_logits(params, token, length):
    """Logits after the last of `length` tokens, by a forward pass over all of them."""
    model = nnx.merge(GRAPH, params)
    hidden, _ = model(token, jnp.arange(token.shape[0]), length)
    return model.logits(hidden)[length - 1]


def decode_alone(prefix, key, limit, temperature):
    """Tokens, log-probabilities and entropies of one branch."""
    tokens, logprobs, entropies = list(prefix), [], []
    for _ in range(limit):
        padded = np.zeros(MAX_PROMPT + MAX_NEW, np.int32)
        padded[: len(tokens)] = tokens
        logits = full_logits(PARAMS, padded, len(tokens))
        drawn = int(
            sampler.draw(logits, sampler.draw_uniform(key, len(tokens) - 1), Sampling(temperature)).token
        )
        probability = np.asarray(jax.nn.softmax(logits), np.float64)
        logprobs.append(np.log(probability[drawn]))
        entropies.append(-(probability * np.log(probability)).sum())
        tokens.append(drawn)
        if drawn in ENDS:
            break
    return tokens[len(prefix) :], logprobs, entropies


def queries():
    rng = np.random.default_rng(0)
    length = np.array([5, 8, 1, 3], np.int32)
    token = rng.integers(0, TINY.vocab_size, (B, MAX_PROMPT))
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0).astype(np.int32)
    # Indices in the stream, not rows: keys must follow them.
    return Queries(token, length, np.array([40, 41, 42, 43], np.int32))


@functools.cache
def engine(data=1, fsdp=1, tensor=1):
    return Engine(GRAPH, placement(data, fsdp, tensor, SAMPLING_TABLE), MAX_NEW, ENDS)


@functools.cache
def params_on(data=1, fsdp=1, tensor=1):
    at = engine(data, fsdp, tensor).placement
    return jax.device_put(PARAMS, at.shardings(logical_axes(TINY), PARAMS))


@functools.cache
def explored(temperature, mesh=(1, 1, 1), padding=0):
    """A round on a mesh: base rollouts, states, partial rollouts, on the host."""
    e, params = engine(*mesh), params_on(*mesh)
    placed = e.placement.place_rows(queries())
    base, caches, _ = e.first_return(params, placed, SEED_KEY, STEP, R, Sampling(temperature))
    length = np.asarray(base.length)
    # Ragged: the root alone, position 1, the last token, several trajectories of one query, a state
    # that is invalid.
    states = States(
        query=np.array([0, 0, 3, 2], np.int32),
        base=np.array([2, 1, 0, 1], np.int32),
        response=np.asarray(base.token)[[0, 0, 3, 2], [2, 1, 0, 1]],
        prefix_length=np.array([[0, 1, length[0, 2] - 1], [0, 1, 2], [0, 2, 3], [0, 0, 0]], np.int32).clip(0),
        valid=np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool),
    )
    if padding:  # trajectories without valid states must not change the others
        states = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:padding])]), states)
    at = e.placement.place_rows(states)
    partial, _ = e.explore(params, placed, caches, at, SEED_KEY, STEP, M, Sampling(temperature))
    return jax.device_get(base), states, jax.device_get(partial)


def check_branch(rollouts, n, c, expected):
    tokens, logprobs, entropies = expected
    size = int(rollouts.length[n, c])
    assert rollouts.token[n, c, :size].tolist() == tokens
    np.testing.assert_allclose(rollouts.logprob[n, c, :size], logprobs, atol=1e-5)
    np.testing.assert_allclose(rollouts.entropy[n, c, :size], entropies, atol=1e-5)
    assert bool(rollouts.stopped[n, c]) == (tokens[-1] in ENDS)
    assert not rollouts.token[n, c, size:].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_first_return_equals_decoding_alone(temperature):
    base, _, _ = explored(temperature)
    q = queries()
    for n in range(B):
        for r in range(R):
            key = sampler.row_key(SEED_KEY, STEP, q.index[n], r)
            prefix = q.token[n, : q.length[n]]
            check_branch(base, n, r, decode_alone(prefix, key, MAX_NEW, temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_branches_equal_decoding_alone_from_their_prefixes(temperature):
    base, states, partial = explored(temperature)
    q = queries()
    j_count = states.valid.shape[1]
    checked = 0
    for n, j in np.ndindex(*states.valid.shape):
        for m in range(M):
            c = j * M + m
            if not states.valid[n, j]:
                assert partial.length[n, c] == 0
                continue
            row, prefix_length = states.query[n], states.prefix_length[n, j]
            response = base.token[row, states.base[n], :prefix_length]
            prefix = [*q.token[row, : q.length[row]], *response]
            key = sampler.row_key(SEED_KEY, STEP, q.index[row], R + states.base[n] * j_count * M + c)
            check_branch(partial, n, c, decode_alone(prefix, key, MAX_NEW - prefix_length, temperature))
            checked += 1
    assert checked == 18


def test_greedy_branches_continue_as_their_base_trajectory_did():
    base, states, partial = explored(0.0)
    for n, j in np.argwhere(states.valid):
        size = states.prefix_length[n, j]
        whole = base.token[states.query[n], states.base[n]]
        np.testing.assert_array_equal(partial.token[n, j * M, : MAX_NEW - size], whole[size:])


def test_rollouts_of_a_state_differ_when_sampled():
    _, states, partial = explored(1.0)
    pairs = [(partial.token[n, j * M], partial.token[n, j * M + 1]) for n, j in np.argwhere(states.valid)]
    assert sum((a != b).any() for a, b in pairs) > len(pairs) / 2


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 1, 1), (1, 2, 2)])
def test_rollouts_do_not_depend_on_the_mesh(mesh):
    for ours, theirs in zip(
        jax.tree.leaves(explored(1.0, mesh)), jax.tree.leaves(explored(1.0)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rollouts_do_not_depend_on_padding_trajectories():
    _, _, padded = explored(1.0, padding=3)
    _, _, plain = explored(1.0)
    np.testing.assert_array_equal(padded.token[:4], plain.token)


def test_an_answer_is_never_longer_than_the_limit_prefix_included():
    _, states, partial = explored(1.0)
    whole = partial.length + np.repeat(states.prefix_length, M, axis=1)
    assert whole.max() <= MAX_NEW
    assert (~partial.stopped & (whole == MAX_NEW)).any()  # the limit did cut some


def test_the_branch_cache_is_updated_in_place():
    """In the compiled loops nothing of the cache's size is copied, transposed or scattered into."""
    e = engine()

    def rollouts(params, q):
        return e.first_return(params, q, SEED_KEY, STEP, R, 1.0)[0]

    text = jax.jit(rollouts).lower(PARAMS, queries()).compile().as_text()
    size = TINY.num_hidden_layers * B * MAX_NEW * TINY.num_key_value_heads * R * TINY.head_dim
    instructions = re.findall(r" = f32\[([\d,]+)\]\S* ([\w-]+)\((\S*)", text)
    operations = [
        (operation, operand)
        for shape, operation, operand in instructions
        if np.prod([int(n) for n in shape.split(",")]) == size
    ]
    assert "dynamic-update-slice" in {operation for operation, _ in operations}
    # The zeros that the caches start from are made once and copied once, before the loop.
    moved = {
        operation
        for operation, operand in operations
        if operation in ("copy", "transpose", "scatter", "concatenate") and "broadcast" not in operand
    }
    assert not moved


@pytest.mark.parametrize(
    ("rows", "parts", "bucket"), [(1, 1, 1), (3, 1, 4), (5, 2, 8), (9, 8, 16), (8, 8, 8)]
)
def test_buckets_divide_by_the_mesh_and_hold_the_rows(rows, parts, bucket):
    e = Engine(GRAPH, placement(parts, 1, 1, SAMPLING_TABLE), MAX_NEW, ENDS)
    assert e.bucket(rows) == bucket
