"""The update against the slow, obvious form: row by row, full logits, one plain sum."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import TINY, placement, tiny_params

from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.learner.state import init_state, make_optimizer, state_shardings
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.types import Batch, Bundle

ROWS, WIDTH = 8, 16
GRAPH, AXES = graph_of(TINY), logical_axes(TINY)
PARAMS = tiny_params(scale=2.0)
LOSS = LossConfig(clip_low=0.22, clip_high=0.28)


def make_batch(off_policy=0.3, seed=0):
    """Ragged rows, some right up to the edge, with old log-probabilities near the policy's."""
    rng = np.random.default_rng(seed)
    length = np.array([16, 9, 12, 5, 16, 7, 3, 10], np.int32)
    start = np.array([4, 3, 11, 1, 8, 7, 2, 5], np.int32)  # row 5 has no continuation at all
    token = rng.integers(0, TINY.vocab_size, (ROWS, WIDTH)).astype(np.int32)
    token = np.where(np.arange(WIDTH) < length[:, None], token, 0).astype(np.int32)
    logprob = np.asarray(reference_logprob(PARAMS, token))
    old = logprob + off_policy * rng.standard_normal(logprob.shape)
    inside = (np.arange(WIDTH) >= start[:, None]) & (np.arange(WIDTH) < length[:, None])
    old = np.where(inside, old, 0.0).astype(np.float32)
    none = np.zeros(ROWS, np.int32)
    return Batch(token, length, start, old, rng.standard_normal(ROWS).astype(np.float32), none, none)


def in_chunks(batch, parts):
    """The flat form, in `parts` chunks."""
    cut = [jax.tree.map(lambda x, i=i: np.split(x, parts)[i], batch) for i in range(parts)]
    return [Bundle(None, tuple(cut), (0,) * parts)]


@jax.jit
def full_logits(params, token):
    """Logits [rows, T, V] of whole rows."""
    model = nnx.merge(GRAPH, params)
    return jax.vmap(lambda x: model.logits(model(x, jnp.arange(WIDTH), jnp.int32(WIDTH))[0]))(token)


@jax.jit
def reference_logprob(params, token):
    """log pi(token_t | token_<t) for every row, from full logits; 0 at t = 0."""
    policy = jax.nn.log_softmax(full_logits(params, token)[:, :-1])
    drawn = jnp.take_along_axis(policy, token[:, 1:, None], axis=2)[..., 0]
    return jnp.pad(drawn, ((0, 0), (1, 0)))


def reference_loss(params, batch, kl_coefficient=0.0, reference=None):
    """Clip-higher, token by token in a Python loop."""
    logprob = reference_logprob(params, batch.token)
    total, count, kl = 0.0, 0, 0.0
    for i in range(ROWS):
        for t in range(int(batch.start[i]), int(batch.length[i])):
            ratio = jnp.exp(logprob[i, t] - batch.old_logprob[i, t])
            a = float(batch.advantage[i])
            total += -min_of(ratio * a, jnp.clip(ratio, 1 - 0.22, 1 + 0.28) * a)
            count += 1
            if reference is not None:
                d = reference[i, t] - logprob[i, t]
                kl += jnp.exp(d) - d - 1
    return (total + kl_coefficient * kl) / count


def min_of(a, b):
    return jnp.where(a < b, a, b)


def learner(mesh=(1, 1, 1), chunk=WIDTH, remat=False, loss=LOSS, optimizer=None):
    return Learner(
        GRAPH,
        placement(*mesh),
        optimizer or optax.sgd(1.0),
        loss,
        compute_dtype=jnp.float32,
        logit_chunk=chunk,
        remat=remat,
    )


def gradient(batch, parts=1, mesh=(1, 1, 1), reference=None, **options):
    """Gradient and metrics of the project's update, over `parts` chunks."""
    own = learner(mesh, **options)
    params = jax.device_put(PARAMS, own.placement.shardings(AXES, PARAMS))
    return jax.device_get(own.gradient(params, in_chunks(batch, parts), reference))


@functools.cache
def expected():
    value, expected_gradient = jax.value_and_grad(reference_loss)(
        jax.tree.map(jnp.asarray, PARAMS), make_batch()
    )
    return float(value), jax.device_get(expected_gradient)


def assert_same(ours, theirs, atol=1e-6):
    scale = float(optax.tree.norm(theirs))
    assert scale > 1e-3  # a gradient of zeros would agree with anything
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=atol)


@pytest.mark.optimised
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_and_gradient_equal_the_plain_form_for_any_number_of_chunks(parts):
    ours, metrics = gradient(make_batch(), parts)
    value, expected_gradient = expected()
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, atol=1e-6)
    assert_same(ours, expected_gradient)


@pytest.mark.optimised
@pytest.mark.parametrize("options", [{"chunk": 4}, {"chunk": 7}, {"chunk": 8, "remat": True}])
def test_chunks_of_logits_and_recomputed_layers_do_not_change_the_gradient(options):
    ours, _ = gradient(make_batch(), 2, **options)
    assert_same(ours, expected()[1])


@pytest.mark.optimised
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 2)])
def test_loss_and_gradient_do_not_depend_on_the_mesh(mesh):
    ours, metrics = gradient(make_batch(), 1, mesh)
    value, expected_gradient = expected()
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, atol=1e-6)
    assert_same(ours, expected_gradient)


@pytest.mark.optimised
def test_kl_to_a_reference_is_part_of_loss_and_gradient():
    other = jax.tree.map(lambda x: x * 1.1, PARAMS)
    batch = make_batch()
    theirs = np.asarray(reference_logprob(other, batch.token))
    value, expected_gradient = jax.value_and_grad(reference_loss)(
        jax.tree.map(jnp.asarray, PARAMS), batch, 0.5, theirs
    )
    loss = LossConfig(clip_low=0.22, clip_high=0.28, kl_coefficient=0.5)
    ours, metrics = gradient(batch, 2, reference=other, loss=loss)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert metrics["reference_kl"] > 0.01
    assert_same(ours, jax.device_get(expected_gradient))


@pytest.mark.optimised
def test_an_entropy_bonus_lowers_the_loss_by_the_mean_entropy():
    batch, bonus = make_batch(), 0.25
    logits = np.asarray(full_logits(PARAMS, batch.token), np.float64)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    policy = weight / weight.sum(axis=-1, keepdims=True)
    entropy = -(policy * np.log(policy)).sum(axis=-1)  # [rows, T], of the token after each
    drawn_from = [entropy[i, batch.start[i] - 1 : batch.length[i] - 1] for i in range(ROWS)]
    loss = LossConfig(clip_low=0.22, clip_high=0.28, entropy_coefficient=bonus)
    _, metrics = gradient(batch, 2, loss=loss)
    mean = np.concatenate(drawn_from).mean()
    np.testing.assert_allclose(metrics["entropy"], mean, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected()[0] - bonus * mean, rtol=1e-4)


@pytest.mark.optimised
def test_an_adapted_weight_of_the_entropy_is_that_of_a_fixed_one_and_compiles_nothing_anew():
    batch, fixed = make_batch(), LossConfig(clip_low=0.22, clip_high=0.28, entropy_coefficient=0.25)
    adapted = dataclasses.replace(fixed, entropy_coefficient=0.0, entropy_target=0.5)
    theirs, expected_metrics = gradient(batch, 2, loss=fixed)
    own = learner(loss=adapted)
    params = jax.device_put(PARAMS, own.placement.shardings(AXES, PARAMS))
    ours, metrics = own.gradient(params, in_chunks(batch, 2), entropy_coefficient=0.25)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    assert_same(jax.device_get(ours), theirs)
    count = Learner.add_chunk._cache_size()
    _, other = own.gradient(params, in_chunks(batch, 2), entropy_coefficient=0.5)
    assert Learner.add_chunk._cache_size() == count
    np.testing.assert_allclose(other["loss"] - metrics["loss"], -0.25 * metrics["entropy"], rtol=1e-4)


@pytest.mark.optimised
def test_the_first_minibatch_is_on_policy_and_never_clipped():
    _, metrics = gradient(make_batch(off_policy=0.0), 2)
    assert metrics["abs_log_ratio"] < 1e-6
    assert metrics["clip_low"] == metrics["clip_high"] == 0.0


@pytest.mark.optimised
def test_a_stale_batch_is_clipped():
    _, metrics = gradient(make_batch(off_policy=0.5), 2)
    assert metrics["clip_low"] > 0.05
    assert metrics["clip_high"] > 0.05


@pytest.mark.optimised
def test_an_empty_batch_has_a_finite_loss_and_no_gradient():
    batch = make_batch()
    empty = dataclasses.replace(batch, length=batch.start)
    ours, metrics = gradient(empty)
    assert metrics["loss"] == 0.0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(ours))


def test_weight_decay_leaves_norms_and_biases_alone():
    """With gradients of zero, AdamW changes exactly what is decayed."""
    settings = OptimizerConfig(learning_rate=0.1, warmup_updates=0, weight_decay=0.5)
    optimizer = make_optimizer(settings, AXES)
    params = jax.tree.map(jnp.asarray, PARAMS)
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        name = jax.tree_util.keystr(path)
        kept = "norm" in name or "bias" in name
        assert bool((change == 0).all()) == kept, name


def test_a_gradient_is_clipped_to_the_largest_norm_before_the_moments_see_it():
    """Of the norm 5: the first moment is (1 - b1) times what is left of it."""
    settings = OptimizerConfig(max_grad_norm=0.5, b1=0.75, weight_decay=0.0)
    optimizer, params = make_optimizer(settings, {"w": ("embed",)}), {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.25 * np.array([0.3, 0.4]), rtol=1e-6)


@pytest.mark.parametrize(("updates", "rate"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_warm_up_is_linear_and_then_constant(updates, rate):
    settings = OptimizerConfig(
        learning_rate=1.0, warmup_updates=4, weight_decay=0.0, b1=0.0, b2=0.0, eps=1e-12, max_grad_norm=1e9
    )
    optimizer = make_optimizer(settings, {"w": ("embed",)})
    params = {"w": jnp.zeros(1)}
    state = optimizer.init(params)
    for _ in range(updates + 1):
        change, state = optimizer.update({"w": jnp.ones(1)}, state, params)
    np.testing.assert_allclose(change["w"], -rate, rtol=1e-5)  # without momentum, Adam's step is the rate


@pytest.mark.optimised
def test_an_update_is_the_optimizers_step_on_that_gradient_on_any_mesh():
    settings = OptimizerConfig(learning_rate=1e-2, warmup_updates=0, max_grad_norm=0.5)
    batch = make_batch()
    expected_gradient = expected()[1]
    plain = make_optimizer(settings, AXES)
    params = jax.tree.map(jnp.asarray, PARAMS)
    changes, _ = plain.update(expected_gradient, plain.init(params), params)
    wanted = optax.apply_updates(params, changes)
    for mesh in ((1, 1, 1), (2, 2, 2)):
        own = learner(mesh, optimizer=make_optimizer(settings, AXES))
        state = init_state(own.placement, own.optimizer, AXES, PARAMS)
        state, _ = own.update(state, in_chunks(batch, 1))
        # Adam's first step is the sign of the gradient: where that is rounding noise, signs differ.
        clear = jax.tree.map(lambda g: np.abs(g) > 1e-5, expected_gradient)
        jax.tree.map(
            lambda a, b, sure: np.testing.assert_allclose(a[sure], b[sure], atol=1e-4),
            jax.device_get(state.params),
            jax.device_get(wanted),
            clear,
        )


def test_moments_lie_where_their_parameters_lie():
    place = placement(2, 2, 2)
    optimizer = make_optimizer(OptimizerConfig(), AXES)
    at = state_shardings(place, optimizer, AXES, jax.tree.map(jnp.asarray, PARAMS))
    leaves = jax.tree.leaves(at.optimizer)
    for sharding in jax.tree.leaves(at.params):
        assert sum(sharding == other for other in leaves) >= 2  # first and second moment


def test_a_second_update_compiles_nothing_and_moves_nothing():
    """On a mesh where a compiler is free to put what it returns elsewhere."""
    for mesh in ((1, 1, 1), (2, 2, 2)):
        own = learner(mesh, optimizer=make_optimizer(OptimizerConfig(), AXES))
        state = init_state(own.placement, own.optimizer, AXES, PARAMS)
        before = [x.sharding for x in jax.tree.leaves(state)]
        state, _ = own.update(state, in_chunks(make_batch(), 1))
        assert [x.sharding for x in jax.tree.leaves(state)] == before
        count = Learner.add_chunk._cache_size(), Learner.cast_and_zero_gradient._cache_size()
        own.update(state, in_chunks(make_batch(), 1))
        assert (Learner.add_chunk._cache_size(), Learner.cast_and_zero_gradient._cache_size()) == count
