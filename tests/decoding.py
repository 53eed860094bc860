"""The engine on a small model, and decoding of one row alone that its rollouts are compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support import TINY, placement, tiny_params

from fr3e_jax.engine import sampler
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries, States

B, R, M, MAX_PROMPT, MAX_NEW = 4, 3, 2, 8, 24
SIZE = MAX_PROMPT + MAX_NEW
ENDS = (3, 11)
GRAPH = graph_of(TINY)
PARAMS = tiny_params(scale=2.0)  # larger weights amplify the rounding of sums in another order
SEED_KEY = jax.random.key(7)
STEP = 5
POLICY, FILTERED = Sampling(), Sampling(temperature=0.8, top_k=12, top_p=0.9)


# --- the reference


class Alone(NamedTuple):
    """What a branch generates, and of each token what `Rollouts` has."""

    token: list[int]
    logprob: list[float]
    sampled_logprob: list[float]
    entropy: list[float]


class Start(NamedTuple):
    """Where a branch starts: its tokens, the query's place in the stream, its number, most tokens to draw."""

    prefix: list[int]
    index: int
    number: int
    limit: int


@jax.jit
def full_logits(params, token, length):
    """Logits [rows, V] after the last of `length` tokens of each row, by a forward pass over all of them."""
    model = nnx.merge(GRAPH, params)

    def one(token, length):
        hidden, _ = model(token, jnp.arange(SIZE), length)
        return model.logits(hidden)[length - 1]

    return jax.vmap(one)(token, length)


@jax.jit
def uniforms(index, number):
    """Of branches: the uniform number for the draw from the logits of each position, [rows, SIZE]."""
    keys = jax.vmap(sampler.row_key, (None, None, 0, 0))(SEED_KEY, STEP, index, number)
    return jax.vmap(jax.vmap(sampler.draw_uniform, (None, 0)), (0, None))(keys, jnp.arange(SIZE))


def softmax(logits):
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def sampled(logits, sampling):
    """The distribution that tokens are drawn from, by sorting."""
    if sampling.temperature == 0.0:
        return np.eye(len(logits))[logits.argmax()]
    order = np.argsort(-logits)
    kept = order[: sampling.top_k or None]
    weight = softmax(logits[kept] / sampling.temperature)
    if sampling.top_p < 1.0:
        kept = kept[: np.searchsorted(np.cumsum(weight), sampling.top_p) + 1]
    probability = np.zeros(len(logits))
    probability[kept] = softmax(logits[kept] / sampling.temperature)
    return probability


def tiny_logits(token, length):
    """`full_logits` of the model of this file."""
    return full_logits(PARAMS, token, length)


def decode_alone(starts, sampling=POLICY, ends=ENDS, forward=tiny_logits):
    """What every branch generates: one forward pass over the whole of it for every token."""
    rows = -(-max(len(starts), 1) // 16) * 16  # few shapes
    token, length = np.zeros((rows, SIZE), np.int32), np.ones(rows, np.int32)
    name = np.zeros((2, rows), np.int32)
    for row, start in enumerate(starts):
        length[row] = len(start.prefix)
        token[row, : length[row]] = start.prefix
        name[:, row] = start.index, start.number
    uniform = np.asarray(uniforms(*name), np.float64)
    found = [Alone([], [], [], []) for _ in starts]
    running = [row for row, start in enumerate(starts) if start.limit > 0]
    while running:
        logits = np.asarray(forward(token, length), np.float64)
        for row in running:
            policy, drawn_from = softmax(logits[row]), sampled(logits[row], sampling)
            drawn = int(np.searchsorted(np.cumsum(drawn_from), uniform[row, length[row] - 1], side="right"))
            alone = found[row]
            alone.token.append(drawn)
            alone.logprob.append(np.log(policy[drawn]))
            alone.sampled_logprob.append(np.log(drawn_from[drawn]))
            alone.entropy.append(-(policy * np.log(policy)).sum())
            if length[row] < SIZE:
                token[row, length[row]] = drawn
            length[row] += 1
        running = [
            row
            for row in running
            if len(found[row].token) < starts[row].limit and found[row].token[-1] not in ends
        ]
    return found


def check(rollouts, starts, sampling=POLICY, ends=ENDS, forward=tiny_logits):
    """Rollouts [N, C] on the host are what branches, named by (n, c), generate alone; others are empty."""
    alone = dict(zip(starts, decode_alone(list(starts.values()), sampling, ends, forward), strict=True))
    for place in np.ndindex(*rollouts.length.shape):
        expected = alone.get(place, Alone([], [], [], []))
        size = int(rollouts.length[place])
        assert rollouts.token[place][:size].tolist() == expected.token
        for name in ("logprob", "sampled_logprob", "entropy"):
            ours = getattr(rollouts, name)[place]
            np.testing.assert_allclose(ours[:size], getattr(expected, name), atol=1e-5, err_msg=name)
            assert not ours[size:].any()
        assert not rollouts.token[place][size:].any()
        assert bool(rollouts.stopped[place]) == (bool(size) and expected.token[-1] in ends)


def starts_of_queries(q, count):
    """Answers from the query alone."""
    return {
        (n, r): Start(q.token[n, : q.length[n]].tolist(), q.index[n], r, MAX_NEW)
        for n, r in np.ndindex(len(q.length), count)
    }


def starts_of_states(q, base, states, rollouts, count):
    """Continuations of valid states, which `count` base trajectories of a query come before."""
    found = {}
    for n, j in np.argwhere(states.valid):
        query, size = states.query[n], int(states.prefix_length[n, j])
        prefix = [*q.token[query, : q.length[query]], *base.token[query, states.base[n], :size]]
        for c in range(j * rollouts, (j + 1) * rollouts):
            number = count + states.base[n] * states.valid.shape[1] * rollouts + c
            found[n, c] = Start(prefix, q.index[query], number, MAX_NEW - size)
    return found


# --- rounds on a mesh


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
def explored(sampling, padding=(4, 5)):
    """A round on one device: base rollouts, states, partial rollouts, on the host.

    padding: places of trajectories that have no valid state.
    """
    e = engine()
    placed = e.placement.place_rows(queries())
    base, _ = e.sample(PARAMS, placed, SEED_KEY, STEP, R, sampling)
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
    real = np.setdiff1d(np.arange(6), padding)

    def pad(x):
        whole = np.zeros((6, *x.shape[1:]), x.dtype)
        whole[real] = x
        return whole

    states = jax.tree.map(pad, states)
    at = e.placement.place_rows(states)
    how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": M, "sampling": sampling}
    partial, _ = e.explore(PARAMS, placed, at, after=R, **how)
    return jax.device_get(base), states, jax.device_get(partial)
