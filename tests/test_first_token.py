"""The first token of a branch: hotter after a position, or the most likely one or the second."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    ENDS,
    GRAPH,
    MAX_NEW,
    PARAMS,
    SEED_KEY,
    STEP,
    B,
    R,
    check,
    decode_alone,
    full_logits,
    queries,
    sampled,
    softmax,
    starts_of_queries,
    starts_of_states,
    uniforms,
)
from distributions import check_chi_square, probabilities, random_logits
from flax import nnx
from support import TINY, mesh_of, placement

from fr3e_jax.engine.draws import draw_first, draw_rows, take_rank
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Drawn, Sampling
from fr3e_jax.models.decoder import logical_axes
from fr3e_jax.parallel.mesh import BATCH_AXES, place_model
from fr3e_jax.types import States

HOT = 1.7
HEATED = Sampling(first_temperature=HOT)
RANKS = (1, 2, 0)  # of the rollouts of every state


@functools.cache
def explored_on(*sizes):
    """Base trajectories, states and partial rollouts on a mesh, whose first tokens are given or hot."""
    axes = logical_axes(TINY)
    _, place = place_model(mesh_of(*sizes), axes, PARAMS)
    engine, params = (
        Engine(GRAPH, place, MAX_NEW, ENDS),
        jax.device_put(PARAMS, place.shardings(axes, PARAMS)),
    )
    q = place.place_rows(queries())
    # Their first token is from the query alone, and not hot.
    base, _ = engine.sample(params, q, SEED_KEY, STEP, R, HEATED)
    base = jax.device_get(base)
    query, trajectory = np.arange(B, dtype=np.int32), np.array([2, 1, 0, 1], np.int32)
    length = base.length[query, trajectory]
    prefix_length = np.stack([np.zeros(B, np.int32), np.minimum(2, length - 1), length - 1], axis=1)
    valid = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0]], bool)
    few = np.array([3, 3, 2, 3], np.int32)  # the last rollout of the third trajectory's states is not drawn
    states = States(query, trajectory, base.token[query, trajectory], prefix_length, valid, few)
    how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": len(RANKS), "sampling": HEATED, "ranks": RANKS}
    placed_states = place.place_rows(states)
    caches = engine.prefill_trajectories(params, q, placed_states)
    partial, _ = engine.explore(params, q, placed_states, after=R, caches=caches, **how)
    again, _ = engine.explore(params, q, placed_states, after=R, caches=caches, **how)
    return base, states, *jax.device_get((partial, again))


def logits_after(prefix):
    token = np.zeros((16, 8 + MAX_NEW), np.int32)
    token[0, : len(prefix)] = prefix
    length = np.full(16, len(prefix), np.int32)
    return np.asarray(full_logits(PARAMS, token, length)[0], np.float64)


def expected_first(start, rank, prefix_length):
    """(token, log-probability in the policy, log-probability that it is drawn with) of a first token."""
    logits = logits_after(start.prefix)
    policy = softmax(logits)
    if rank:
        token = int(np.argsort(-logits)[rank - 1])
        return token, math.log(policy[token]), 0.0
    drawn_from = sampled(logits, Sampling(HOT if prefix_length else 1.0))
    numbers = np.asarray(uniforms(*np.full((2, 16), [[start.index], [start.number]], np.int32)), np.float64)
    token = int(np.searchsorted(np.cumsum(drawn_from), numbers[0, len(start.prefix) - 1], side="right"))
    return token, math.log(policy[token]), math.log(drawn_from[token])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=["1", "2x2x2"]
)
def test_a_given_or_hot_first_token_goes_on_as_its_prefix_with_that_token_would(sizes):
    """The rest is what decoding alone draws after the state's tokens and the first one."""
    base, states, partial, again = explored_on(*sizes)
    check(base, starts_of_queries(queries(), R))
    starts = starts_of_states(queries(), base, states, len(RANKS), R)
    firsts = {
        (n, c): expected_first(start, RANKS[c % 3], states.prefix_length[n, c // 3])
        for (n, c), start in starts.items()
        if c % 3 < states.rollouts[n]
    }
    assert len(firsts) == 27
    # Hot tokens are others than cold ones would be, somewhere after a position.
    cold = [expected_first(starts[at], 0, 0) for at in firsts if at[1] % 3 == 2 and at[1] > 2]
    assert cold != [firsts[at] for at in firsts if at[1] % 3 == 2 and at[1] > 2]
    going_on = {
        at: starts[at]._replace(prefix=[*starts[at].prefix, token], limit=starts[at].limit - 1)
        for at, (token, *_) in firsts.items()
        if token not in ENDS
    }
    alone = dict(zip(going_on, decode_alone(list(going_on.values())), strict=True))
    for at in np.ndindex(*partial.length.shape):
        size = int(partial.length[at])
        if at not in firsts:  # of a state that is not there, or beyond what is wanted
            assert size == 0
            continue
        token, logprob, sampled_logprob = firsts[at]
        rest = alone.get(at)
        assert partial.token[at][:size].tolist() == [token, *(rest.token if rest else [])]
        found = [logprob, *(rest.logprob if rest else [])]
        np.testing.assert_allclose(partial.logprob[at][:size], found, atol=1e-5)
        found = [sampled_logprob, *(rest.sampled_logprob if rest else [])]
        np.testing.assert_allclose(partial.sampled_logprob[at][:size], found, atol=1e-5)
    # Exploration leaves the caches that it is given as they were.
    np.testing.assert_array_equal(again.token, partial.token)


def drawn_of_rows(count):
    """First tokens of `count` rows with the same logits, of which the second half is heated."""
    place, one = placement(), np.random.default_rng(5).normal(size=TINY.hidden_size).astype(np.float32)
    rows = (
        np.broadcast_to(one, (1, count, len(one))),
        np.zeros((1, count), np.int32),
        jax.random.split(jax.random.key(3), count)[None],
    )
    heated = np.arange(count)[None] >= count // 2

    @jax.jit
    def draw(params, rows, heated):
        model = nnx.merge(GRAPH, params)
        drawn = draw_rows(model, place, *rows, HEATED)
        logits = model.logits(rows[0][0, :1], place.shard)
        return logits[0], draw_first(model, place, *rows, HEATED, drawn, heated, None)

    logits, drawn = jax.device_get(draw(PARAMS, jax.tree.map(jnp.asarray, rows), jnp.asarray(heated)))
    return logits, Drawn(*(x[0] for x in drawn))


def test_first_tokens_are_drawn_as_often_as_their_temperature_says():
    logits, drawn = drawn_of_rows(20_000)
    usual, hot = np.split(drawn.token, 2)
    check_chi_square(usual, probabilities(logits))
    check_chi_square(hot, probabilities(logits, HOT))
    with pytest.raises(AssertionError):  # so many draws can tell the two from each other
        check_chi_square(hot, probabilities(logits))
    both = np.log([probabilities(logits), probabilities(logits, HOT)])
    np.testing.assert_allclose(drawn.logprob, both[0][drawn.token], atol=1e-5)
    where = (np.arange(20_000) >= 10_000).astype(int)
    np.testing.assert_allclose(drawn.sampled_logprob, both[where, drawn.token], atol=1e-5)


WIDE = 8 * 604


@pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 1, 8)], ids=["2x4", "8"])
def test_the_likeliest_tokens_of_a_sharded_vocabulary_are_found_without_gathering_it(mesh):
    """Both in one part of it, in two parts, and as likely as each other; of every rank."""
    place = placement(*mesh)

    def part(logits, rank):
        def one(logits, rank):
            drawn = Drawn(jnp.int32(7), *map(jnp.float32, (-1.0, -2.0, 3.0)))
            return take_rank(logits, rank, drawn, mesh[2], place.shard)

        return jax.vmap(one)(logits, rank)

    logits = np.stack([random_logits(WIDE, row) for row in range(6 * mesh[0])])
    logits[::3, [WIDE - 1, 5]] = 20.0, 19.0
    logits[1::3, [700, 701]] = 20.0  # the first of equals is first
    rank = np.arange(len(logits), dtype=np.int32) // 3 % 3
    shape = (mesh[0], 6)
    placed = (
        place.place(logits.reshape(*shape, WIDE), "batch", None, "vocab"),
        place.place(rank.reshape(shape), "batch"),
    )
    compiled = jax.jit(jax.vmap(part, spmd_axis_name=BATCH_AXES)).lower(*placed).compile()
    found = Drawn(*(np.ravel(x) for x in compiled(*placed)))
    order = np.argsort(-logits, axis=1, kind="stable")
    token = np.where(rank == 0, 7, order[np.arange(len(rank)), rank - 1])
    np.testing.assert_array_equal(found.token, token)
    policy = np.array([np.log(probabilities(row)[t]) for row, t in zip(logits, token, strict=True)])
    np.testing.assert_allclose(found.logprob, np.where(rank == 0, -1.0, policy), atol=1e-5)
    np.testing.assert_array_equal(found.sampled_logprob, np.where(rank == 0, -2.0, 0.0))
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert 6 * WIDE // mesh[2] <= largest < 6 * WIDE
