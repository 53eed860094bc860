"""Every prefix once: loss, gradient and the parameters after a step are those of the flat form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slow_losses import DUAL, loss_slowly
from support import TINY, examples, logits, placement, tiny_params

from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import init_state, make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.learner.weights import learner_logprobs, with_shares
from fr3e_jax.models import attention
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.types import StateGroups

AXES, PARAMS = logical_axes(TINY), tiny_params(scale=2.0)
PROMPT, RESPONSE = 6, 14


@st.composite
def minibatches(draw):
    """Accepted states of a few queries: one or two kept trajectories of each, any of their states."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rollouts = draw(st.integers(1, 3))
    states = []
    for query in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, PROMPT))
        tokens = rng.integers(0, TINY.vocab_size, PROMPT)
        for base in range(draw(st.integers(1, 2))):
            response = rng.integers(0, TINY.vocab_size, RESPONSE)
            prefixes = draw(st.lists(st.integers(0, RESPONSE - 1), min_size=1, max_size=3, unique=True))
            for number, prefix in enumerate(sorted(prefixes)):
                new = [draw(st.integers(1, RESPONSE - prefix)) for _ in range(rollouts)]
                states.append((tokens, length, response, prefix, new, (query, base, number)))
    return groups(states, rollouts, rng)


def groups(states, rollouts, rng):
    tokens, length, response, prefix, new, source = zip(*states, strict=True)
    shape = (len(states), rollouts, RESPONSE)
    return StateGroups(
        query=np.array(tokens, np.int32),
        query_length=np.array(length, np.int32),
        prefix=np.array(response, np.int32),
        prefix_length=np.array(prefix, np.int32),
        token=rng.integers(0, TINY.vocab_size, shape).astype(np.int32),
        logprob=(-3.5 + rng.standard_normal(shape)).astype(np.float32),
        length=np.array(new, np.int32),
        advantage=rng.standard_normal(shape[:2]).astype(np.float32),
        source=np.array(source, np.int32),
    )


@functools.cache
def learner(mesh=(1, 1, 1), remat=False, dtype=jnp.float32, **loss):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_updates=0), AXES)
    objective = LossConfig(clip_low=0.22, clip_high=0.28, **loss)
    return Learner(
        graph_of(TINY),
        placement(*mesh),
        optimizer,
        objective,
        compute_dtype=dtype,
        logit_chunk=8,
        remat=remat,
    )


def gradient(found, shared, budget=64, reference=None, mesh=(1, 1, 1), **options):
    own = learner(mesh, **options)
    params = jax.device_put(PARAMS, own.placement.shardings(AXES, PARAMS))
    bundles = bundles_of(found, mesh[0] * mesh[1], budget, shared)
    return jax.device_get(own.gradient(params, bundles, reference))


def assert_same(ours, theirs):
    """To 1e-5 of the largest entry of each leaf; a leaf that is 0 but for rounding, to that of all leaves."""
    rounding = 1e-7 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        largest = np.abs(b).max()
        assert np.abs(a - b).max() <= 1e-5 * largest + rounding, (jax.tree_util.keystr(path), largest)


@pytest.mark.optimised
@examples(4)
@given(minibatches(), st.sampled_from([16, 1000]))
def test_loss_and_every_gradient_leaf_equal_the_flat_forms(found, budget):
    ours, told = gradient(found, True, budget)
    theirs, expected = gradient(found, False)
    assert_same(ours, theirs)
    for name, value in expected.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@examples(2)
@given(minibatches())
def test_kl_and_entropy_bonus_equal_the_flat_forms(found):
    reference = jax.tree.map(lambda x: x * 1.1, PARAMS)
    told = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2}
    ours, metrics = gradient(found, True, reference=reference, **told)
    theirs, expected = gradient(found, False, reference=reference, **told)
    assert_same(ours, theirs)
    np.testing.assert_allclose(metrics["entropy"], expected["entropy"], rtol=1e-5)
    np.testing.assert_allclose(metrics["reference_kl"], expected["reference_kl"], rtol=1e-4)
    assert 0 < metrics["entropy"] < np.log(TINY.vocab_size)


def one_minibatch(seed=0):
    """Two kept trajectories of one query, three of their states; a root alone."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TINY.vocab_size, (2, PROMPT))
    response = rng.integers(0, TINY.vocab_size, (3, RESPONSE))
    states = [
        (tokens[0], 6, response[0], 0, [14, 3, 9, 1], (0, 0, 0)),
        (tokens[0], 6, response[0], 5, [9, 9, 2, 7], (0, 0, 1)),
        (tokens[0], 6, response[1], 11, [3, 1, 2, 3], (0, 1, 2)),
        (tokens[1], 1, response[2], 0, [4, 14, 6, 1], (1, 0, 0)),
    ]
    return groups(states, 4, rng)


@pytest.mark.optimised
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_trees_dealt_out_over_a_mesh_give_the_same_gradient(mesh):
    theirs, expected = gradient(one_minibatch(), False)
    ours, told = gradient(one_minibatch(), True, 32, mesh=mesh, remat=True)
    assert_same(ours, theirs)
    np.testing.assert_allclose(told["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.optimised
def test_parameters_after_a_step_of_adamw_are_those_of_the_flat_form():
    found, after = one_minibatch(), []
    own = learner()
    for shared in (True, False):
        state = init_state(own.placement, own.optimizer, AXES, PARAMS)
        state, _ = own.update(state, bundles_of(found, 1, 64, shared))
        after.append(jax.device_get(state.params))
    slope, _ = gradient(found, False)
    for a, b, before, g in zip(*map(jax.tree.leaves, (*after, PARAMS, slope)), strict=True):
        assert np.abs(a - before).max() > 1e-3
        # Adam's first step is the sign of the gradient: where that is rounding noise, signs differ.
        sure = np.abs(g) > 1e-5 * np.abs(g).max() + 1e-8
        np.testing.assert_allclose(a[sure], b[sure], rtol=1e-5, atol=1e-5)


@pytest.mark.optimised
def test_in_bfloat16_the_error_is_no_larger_than_the_flat_forms():
    def error(shared, seed):
        exact, _ = gradient(one_minibatch(seed), False)
        rounded, _ = gradient(one_minibatch(seed), shared, dtype=jnp.bfloat16)
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact)) / optax.tree.norm(exact))

    shared, flat = ([error(form, seed) for seed in range(2)] for form in (True, False))
    assert 1e-4 < np.mean(flat) < 0.2
    assert np.mean(shared) <= 1.1 * np.mean(flat), (shared, flat)


def test_blocks_of_queries_do_not_change_the_gradient(monkeypatch):
    theirs, _ = gradient(one_minibatch(), False)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    fresh = dataclasses.replace(learner())  # hashed by identity: compiled anew
    params = jax.tree.map(jnp.asarray, PARAMS)
    ours, _ = fresh.gradient(params, bundles_of(one_minibatch(), 1, 1000))
    assert_same(jax.device_get(ours), theirs)


def test_the_second_epoch_is_clipped_and_the_first_is_not():
    found, own = one_minibatch(), learner()
    bundles = bundles_of(found, 1, 64)
    state = init_state(own.placement, own.optimizer, AXES, PARAMS)
    rows = []
    for bundle in bundles:  # as the policy itself samples: its own log-probabilities
        chunks = [dataclasses.replace(chunk, old_logprob=logprobs(bundle, chunk)) for chunk in bundle.chunks]
        rows.append(dataclasses.replace(bundle, chunks=tuple(chunks)))
    told = []
    for _ in range(2):
        state, metrics = own.update(state, rows)
        told.append(jax.device_get(metrics))
    first, second = told
    assert first["clip_low"] == first["clip_high"] == 0.0
    assert first["abs_log_ratio_max"] < 1e-4
    assert second["clip_low"] + second["clip_high"] > 0.0
    assert second["ratio_min"] < 1 < second["ratio_max"]


def logprobs(bundle, chunk):
    """Log-probabilities [rows, T] of a chunk under PARAMS, from whole sequences padded to one length."""
    found, trunks = np.zeros(chunk.token.shape, np.float32), bundle.trunks.token[0]
    rows = [
        np.concatenate([trunks[trunk, :prefix], token])
        for trunk, prefix, token in zip(chunk.trunk, chunk.prefix, chunk.token, strict=True)
    ]
    whole = np.stack([np.pad(row, (0, 64 - len(row))) for row in rows])
    logprob = np.asarray(jax.nn.log_softmax(logits(TINY, PARAMS, whole, list(map(len, rows)))))
    for i, (row, prefix) in enumerate(zip(rows, chunk.prefix, strict=True)):
        place = np.arange(prefix, len(row) - 1)
        found[i, 1:] = logprob[i, place, row[place + 1]]
    return found


# --- objectives, means and weights


def weighted_minibatch(aggregate, order=slice(None)):
    """One minibatch whose tokens have weights, a third of them 0, and whose rollouts have shares."""
    found = one_minibatch()
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.5], found.token.shape).astype(np.float32)
    found = dataclasses.replace(found, weight=weight)
    found = jax.tree.map(lambda x: x[order], found)
    return with_shares(found, LossConfig(aggregate=aggregate))


LAID = [("gspo", "sequence", 64, (2, 2, 2))]
LAID += [
    pytest.param(*others, marks=pytest.mark.slow)
    for others in (
        ("cispo", "prompt", 32, (1, 1, 1)),
        ("cispo", "prompt", 1000, (8, 1, 1)),
        ("clip", "constant", 32, (2, 2, 2)),
    )
]


@pytest.mark.optimised
@pytest.mark.parametrize(("objective", "aggregate", "budget", "mesh"), LAID)
def test_no_objective_or_mean_depends_on_layout_order_or_mesh(objective, aggregate, budget, mesh):
    """And the loss is that of float64."""
    options = {"objective": objective, "dual_clip": DUAL, "sequence_clip_low": 0.2, "sequence_clip_high": 0.2}
    found = weighted_minibatch(aggregate)
    theirs, expected = gradient(found, False, **options)
    bounds = (0.2, 0.2) if objective == "gspo" else (0.22, 0.28)
    new, _ = learner_logprobs(learner(), jax.tree.map(jnp.asarray, PARAMS), found, 64)
    tokens = (new, found.logprob, found.advantage, found.length, found.source[:, 0])
    loss = loss_slowly(objective, aggregate, bounds, *tokens, RESPONSE, found.weight)
    np.testing.assert_allclose(expected["loss"], loss, rtol=1e-4)
    assert 0 < expected["left_out"] < 1
    mixed = weighted_minibatch(aggregate, np.array([2, 0, 3, 1]))
    ours, metrics = gradient(mixed, True, budget, mesh=mesh, **options)
    assert_same(ours, theirs)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_kl_and_entropy_bonus_are_of_the_same_mean_as_the_objective():
    """The constant mean is the token mean times how full the answers are, in every term."""
    found = one_minibatch()
    reference = jax.tree.map(lambda x: x * 1.1, PARAMS)
    options = {"reference": reference, "kl_coefficient": 0.3, "entropy_coefficient": 0.2}
    theirs, expected = gradient(found, True, **options)
    constant = with_shares(found, LossConfig(aggregate="constant"))
    ours, metrics = gradient(constant, True, **options)
    full = found.length.mean() / RESPONSE
    np.testing.assert_allclose(metrics["loss"], full * expected["loss"], rtol=1e-5)
    assert_same(ours, jax.tree.map(lambda x: np.float32(full) * x, theirs))
    for name in ("entropy", "reference_kl"):  # which stay means over tokens
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_the_learners_log_probabilities_of_a_batch_are_those_of_whole_sequences(mesh):
    found, own = one_minibatch(), learner(mesh)
    params = jax.device_put(PARAMS, own.placement.shardings(AXES, PARAMS))
    logprob, bundles = learner_logprobs(own, params, found, 64)
    seen = np.zeros(logprob.shape, bool)
    for bundle in bundles_of(found, 1, 64):
        for chunk, origin in zip(bundle.chunks, bundle.origin, strict=True):
            expected = logprobs(bundle, chunk)
            for i in np.flatnonzero(origin[:, 0] >= 0):
                (state, rollout), new = origin[i], slice(chunk.start[i], chunk.length[i])
                own_tokens = slice(0, new.stop - new.start)
                np.testing.assert_array_equal(found.token[state, rollout, own_tokens], chunk.token[i, new])
                computed = logprob[state, rollout, own_tokens]
                np.testing.assert_allclose(computed, expected[i, new], rtol=1e-4, atol=1e-4)
                seen[state, rollout, own_tokens] = True
    np.testing.assert_array_equal(seen, np.arange(RESPONSE) < found.length[..., None])
    assert not logprob[~seen].any() and len(bundles) > 0
