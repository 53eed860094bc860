"""Schedules, moments in bfloat16, and updates that are skipped."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import TINY, placement, tiny_params

from fr3e_jax.config import ConfigError, LossConfig, OptimizerConfig
from fr3e_jax.learner.state import (
    TrainState,
    apply_gradient,
    init_state,
    make_optimizer,
    make_schedule,
    round_at_random,
    state_shardings,
    with_bfloat16_moments,
)
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.types import Batch, Bundle

AXES = logical_axes(TINY)
ONE = {"w": ("embed",)}

# --- the learning rate


@pytest.mark.parametrize(
    ("schedule", "share", "rates"),
    [
        # Four updates of warm-up, then eight: update i has gone (i - 4) / 8 of the way.
        ("linear", 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0.0, 99: 0.0}),
        ("linear", 0.2, {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.8, 8: 0.6, 11: 0.3, 12: 0.2, 99: 0.2}),
        # cos 45 degrees is 0.7071068: (1 + that) / 2 = 0.8535534 after two of eight.
        ("cosine", 0.0, {2: 0.75, 4: 1.0, 6: 0.8535534, 8: 0.5, 10: 0.1464466, 12: 0.0, 99: 0.0}),
        ("cosine", 0.2, {2: 0.75, 4: 1.0, 6: 0.8828427, 8: 0.6, 10: 0.3171573, 12: 0.2, 99: 0.2}),
        ("constant", 0.2, {0: 0.25, 3: 1.0, 4: 1.0, 12: 1.0, 99: 1.0}),
    ],
)
def test_rates_of_a_run_of_twelve_updates(schedule, share, rates):
    settings = OptimizerConfig(learning_rate=3.0, warmup_updates=4, schedule=schedule, final_rate_share=share)
    rate = make_schedule(settings, 12)
    np.testing.assert_allclose(
        [float(rate(i)) for i in rates], 3.0 * np.array(list(rates.values())), rtol=1e-6
    )


def test_a_run_without_warm_up_goes_as_far_as_the_area_under_its_schedule():
    """Without momentum Adam's step is the rate: 1 + 3/4 + 2/4 + 1/4."""
    settings = OptimizerConfig(
        learning_rate=1.0, warmup_updates=0, schedule="linear", weight_decay=0.0, b1=0.0, b2=0.0, eps=1e-12,
        max_grad_norm=1e9,
    )  # fmt: skip
    optimizer = make_optimizer(settings, ONE, 4)
    params = {"w": jnp.zeros(1)}
    state, told = TrainState(params, optimizer.init(params)), []
    for _ in range(4):
        state, metrics = apply_gradient(optimizer, state, {"w": jnp.ones(1)}, jnp.float32(0))
        told.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(state.params["w"], -2.5, rtol=1e-5)
    np.testing.assert_allclose(told, [1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("updates", [None, 3, 4])
def test_a_decay_without_a_length_is_refused(updates):
    settings = OptimizerConfig(warmup_updates=4, schedule="cosine")
    with pytest.raises(ConfigError, match=r"optimizer.schedule cosine .*optimizer.warmup_updates 4"):
        make_optimizer(settings, ONE, updates)
    make_optimizer(settings, ONE, 5)
    make_optimizer(dataclasses.replace(settings, schedule="constant"), ONE, updates)


# --- moments in bfloat16


def rounded(x, count=40_000):
    """float64 [count]: as many roundings of one number."""
    drawn = round_at_random(jnp.full(count, x, jnp.float32), jax.random.key(7))
    assert drawn.dtype == jnp.bfloat16
    return np.asarray(drawn, np.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**-130, 2.0**90])  # 2^-130 has no leading one
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9375])
def test_a_number_is_rounded_to_its_neighbours_and_right_on_average(sign, scale, share):
    """bfloat16 has 1 and 1 + 2^-7, and nothing between; 1 + share x 2^-7 goes up that often."""
    # Below 2^-126 numbers are 2^-133 apart, whatever their size.
    gap = sign * max(2.0**-7 * scale, 2.0**-133)
    low = sign * scale
    drawn = rounded(np.float32(low + share * gap))
    assert set(drawn) == {low, low + gap}
    # A share of 40,000 draws has a standard deviation of at most 0.0025.
    assert abs(np.mean(drawn == low + gap) - share) < 0.0125


def test_what_bfloat16_has_is_kept():
    exact = jnp.arange(-256, 257, dtype=jnp.float32) * 2.0**-20
    for seed in range(4):
        ours = round_at_random(exact, jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(ours, np.float32), exact)


def second_moment(make, b2, first, then, updates):
    """float64 [256]: held after `updates` of gradient `then`, from `updates` of gradient `first`."""
    adam = make(optax.scale_by_adam(0.9, b2))

    def update(state, gradient):
        return adam.update({"w": jnp.full(256, gradient)}, state)[1], None

    gradients = jnp.repeat(jnp.array([first, then], jnp.float32), updates)
    state, _ = jax.jit(lambda: jax.lax.scan(update, adam.init({"w": jnp.zeros(256)}), gradients))()
    return np.asarray(state.nu["w"], np.float64)


def rounded_to_the_nearest(adam):
    """Adam with moments that are cast to bfloat16, as one would write it first."""

    def update(gradient, state, params=None):
        exact = state._replace(**{k: optax.tree.cast(getattr(state, k), jnp.float32) for k in ("mu", "nu")})
        changes, exact = adam.update(gradient, exact, params)
        return changes, optax.tree.cast(exact, jnp.bfloat16)._replace(count=exact.count)

    def init(params):
        state = adam.init(params)
        return optax.tree.cast(state, jnp.bfloat16)._replace(count=state.count)

    return optax.GradientTransformation(init, update)


def test_the_second_moment_follows_gradients_that_shrink():
    """At b2 = 0.999 a fall is at most a thousandth of the moment, of which the nearest bfloat16 knows
    nothing: half the gap to the next is 1/512 to 1/256. A rise ends where a thousandth of the rest is less.
    """
    exact = 0.01 + (1 - 0.999**2000 - 0.01) * 0.999**2000  # 0.1255
    found = second_moment(lambda adam: adam, 0.999, 1.0, 0.1, 2000)
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    ours = second_moment(with_bfloat16_moments, 0.999, 1.0, 0.1, 2000)
    # A move of 0.001 over a gap of at most 2^-7 has a variance of at most 0.001 x 2^-7. Errors fade as fast
    # as the moment itself falls, so that 2,000 of them make 0.125 of an element, 0.008 of the mean of 256.
    assert np.std(ours / exact) < 0.125
    assert abs(ours.mean() / exact - 1) < 0.03
    for then in (1.0, 0.1):  # 1 and 0.01 are to be approached
        assert (second_moment(rounded_to_the_nearest, 0.999, 1.0, then, 2000) == 0.25).all()


def test_steps_are_those_of_float32_moments_to_a_percent():
    rng = np.random.default_rng(0)
    gradients = (1 + rng.standard_normal((300, 512))).astype(np.float32)
    plain = optax.scale_by_adam(0.9, 0.95)
    states = [a.init({"w": jnp.zeros(512)}) for a in (plain, with_bfloat16_moments(plain))]
    travelled = np.zeros((2, 512))
    both = [jax.jit(a.update) for a in (plain, with_bfloat16_moments(plain))]
    for gradient in gradients:
        for i, update in enumerate(both):
            change, states[i] = update({"w": jnp.asarray(gradient)}, states[i])
            travelled[i] += np.asarray(change["w"])
    assert np.abs(travelled[0]).min() > 100
    np.testing.assert_allclose(travelled[1], travelled[0], rtol=0.01)
    assert abs((travelled[1] / travelled[0]).mean() - 1) < 1e-3  # no bias


def test_the_rounding_does_not_depend_on_the_mesh():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32))
    alone = jax.jit(round_at_random)(x, jax.random.key(3))
    split = jax.device_put(x, placement(1, 4, 2).sharding("embed", "mlp"))
    assert len({str(shard.index) for shard in split.addressable_shards}) == 8
    chex.assert_trees_all_equal(
        np.asarray(jax.jit(round_at_random)(split, jax.random.key(3))), np.asarray(alone)
    )


def test_moments_in_bfloat16_lie_like_their_parameters_and_take_half_the_memory():
    place, params = placement(2, 2, 2), tiny_params()
    sizes = {}
    for moments in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(moments=moments), AXES)
        state = init_state(place, optimizer, AXES, params)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
        sizes[moments] = sum(x.nbytes for x in jax.tree.leaves(state.optimizer) if x.ndim)
        at = state_shardings(place, optimizer, AXES, params)
        adam = state.optimizer[1]
        for moment in (adam.mu, adam.nu):
            where = jax.tree.map(lambda x: x.sharding, moment)
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, where, at.params))
    parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sizes == {"float32": 2 * parameters, "bfloat16": parameters}


# --- updates that are skipped

ROWS, WIDTH = 4, 8
SETTINGS = OptimizerConfig(learning_rate=1e-2, warmup_updates=4, max_grad_norm=0.5)


@functools.cache
def learner(moments="float32"):
    optimizer = make_optimizer(dataclasses.replace(SETTINGS, moments=moments), AXES)
    return Learner(
        graph_of(TINY),
        placement(),
        optimizer,
        LossConfig(),
        compute_dtype=jnp.float32,
        logit_chunk=WIDTH,
        remat=False,
    )


def fresh(moments="float32"):
    own = learner(moments)
    return init_state(own.placement, own.optimizer, AXES, tiny_params(scale=2.0))


def good(seed=0):
    """Rows whose tokens 3 to 6 are trained."""
    rng = np.random.default_rng(seed)
    full, none = np.full(ROWS, 3, np.int32), np.zeros(ROWS, np.int32)
    token = rng.integers(0, TINY.vocab_size, (ROWS, WIDTH)).astype(np.int32)
    old = -3 + 0.1 * rng.standard_normal(token.shape).astype(np.float32)
    return Batch(token, full + 4, full, old, rng.standard_normal(ROWS).astype(np.float32), none, none)


def flat(rows):
    return [Bundle(None, (rows,), (0,))]


def spoiled(batch, field, value, where):
    array = getattr(batch, field).copy()
    array[where] = value
    return dataclasses.replace(batch, **{field: array})


FAULTS = {
    "advantage nan": ("advantage", np.nan, 2),
    "advantage inf": ("advantage", np.inf, 0),
    "old log-probability nan": ("old_logprob", np.nan, (1, 6)),
}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


def after(updates, moments="float32"):
    """The state after batches, its bits, and the metrics of each."""
    own, state, told = learner(moments), fresh(moments), []
    for batch in updates:
        state, metrics = own.update(state, flat(batch))
        told.append(jax.device_get(metrics))
    return state, told


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_batch_changes_nothing(fault):
    state, (told,) = after([spoiled(good(), *FAULTS[fault])])
    assert told["skipped"] == 1.0
    assert bits(state) == bits(fresh())


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["x", "xx", ".x.", "x.xx.", "..xx"])
def test_skipped_updates_might_as_well_not_have_been(pattern, moments):
    """Parameters, moments, the rate's count and the noise of rounding are those of the good updates alone."""
    faults = list(FAULTS.values())
    batches = [good(i) if mark == "." else spoiled(good(i), *faults[i % 3]) for i, mark in enumerate(pattern)]
    state, told = after(batches, moments)
    assert [m["skipped"] for m in told] == [float(mark == "x") for mark in pattern]
    alone, metrics = after(
        [batch for batch, mark in zip(batches, pattern, strict=True) if mark == "."], moments
    )
    assert bits(state) == bits(alone)
    taken = [m for m in told if not m["skipped"]]
    # The good updates did something, at rates that go on where they were.
    assert (bits(state) != bits(fresh(moments))) == ("." in pattern)
    np.testing.assert_allclose(
        [m["learning_rate"] for m in taken], [2.5e-3 * (i + 1) for i in range(len(taken))]
    )
    chex.assert_trees_all_equal(taken, metrics)


def test_a_nan_that_carries_no_loss_skips_nothing():
    batch = spoiled(good(), "old_logprob", np.nan, (1, 7))  # behind the row's end
    state, (told,) = after([batch])
    assert told["skipped"] == 0.0
    assert bits(state) == bits(after([good()])[0])


def test_parameters_that_are_not_finite_are_not_spread():
    own, state = learner(), fresh()
    params = jax.tree.map(lambda x: x, state.params)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    state = TrainState(params, state.optimizer)
    before = bits(state)
    for _ in range(2):
        state, metrics = own.update(state, flat(good()))
        assert metrics["skipped"] == 1.0
        assert bits(state) == before


@pytest.mark.parametrize(
    ("loss", "element", "skipped"),
    [
        (0.5, 1.0, False),
        (0.5, -1e15, False),
        (np.nan, 1.0, True),
        (-np.inf, 1.0, True),
        (0.5, np.nan, True),
        (0.5, np.inf, True),
        (0.5, 1e30, True),  # its square is not finite, and clipping would make a step of zeros of it
    ],
)
def test_loss_and_every_element_of_the_gradient_decide(loss, element, skipped):
    optimizer = make_optimizer(SETTINGS, {"v": ("embed",), "w": ("embed",)})
    params = {"v": jnp.ones(3), "w": jnp.ones((2, 2))}
    state = TrainState(params, optimizer.init(params))
    gradient = {"v": jnp.ones(3), "w": jnp.ones((2, 2)).at[1, 0].set(element)}
    stepped, metrics = jax.jit(functools.partial(apply_gradient, optimizer))(
        state, gradient, jnp.float32(loss)
    )
    assert bool(metrics["skipped"]) == skipped
    assert (bits(stepped) == bits(state)) == skipped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stepped))


def test_optax_skips_the_same_gradients_but_not_the_same_updates():
    """optax.apply_if_finite agrees on nan and inf; it knows no loss, and lets a norm overflow."""
    optimizer, params = make_optimizer(SETTINGS, ONE), {"w": jnp.ones(3)}
    theirs = optax.apply_if_finite(optimizer, max_consecutive_errors=9)

    def both(*updates):
        """Parameters after gradients of these elements, with these losses: ours, and those of optax."""
        state, other, moments = TrainState(params, optimizer.init(params)), params, theirs.init(params)
        for element, loss in updates:
            gradient = {"w": jnp.array([1.0, element, -2.0])}
            state, _ = apply_gradient(optimizer, state, gradient, jnp.float32(loss))
            change, moments = theirs.update(gradient, moments, other)
            other = optax.apply_updates(other, change)
        return bits(state.params) == bits(other)

    assert both((1.0, 0.5), (np.nan, 0.5), (3.0, 0.5), (np.inf, 0.5), (np.inf, 0.5), (-1.0, 0.5))
    assert not both((1.0, 0.5), (2.0, np.nan))
    assert not both((1.0, 0.5), (1e30, 0.5))
