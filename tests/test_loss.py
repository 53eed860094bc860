"""The clip-higher surrogate and k3: by hand, token by token, and by the released functions."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fr3e_jax.algorithm.loss import kl_k3, masked_sum, policy_loss

GOLDEN = json.loads((Path(__file__).parent / "golden_fr3e.json").read_text())["policy_loss"]
LOW, HIGH = 0.22, 0.28

jitted_loss = jax.jit(policy_loss)


@jax.jit
def one_token(logprob, advantage, dual_clip):
    def loss(logprob):
        one = jnp.ones(1, bool)
        return policy_loss(logprob[None], jnp.zeros(1), advantage[None], one, 1.0, LOW, HIGH, dual_clip)

    return jax.value_and_grad(loss, has_aux=True)(logprob)


def token_loss(ratio, advantage, dual_clip=None):
    """Loss, gradient in the log-probability and metrics of one token."""

    logprob = np.float32(math.log(ratio))
    (value, metrics), gradient = one_token(logprob, np.float32(advantage), dual_clip)
    return float(value), float(gradient), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "bound"),
    [
        (1.0, 2.0, None, -2.0, None),
        (1.0, -2.0, None, 2.0, None),
        (1.27, 2.0, None, -2.54, None),  # within the higher bound, above the lower one's mirror image
        (1.5, 2.0, None, -2.56, "clip_high"),
        (0.5, 2.0, None, -1.0, None),  # a good token that became unlikely is still pulled back
        (0.5, -2.0, None, 1.56, "clip_low"),
        (0.79, -2.0, None, 1.58, None),
        (1.5, -2.0, None, 3.0, None),  # a bad token that became likely is still pushed down
        (20.0, -2.0, None, 40.0, None),
        (20.0, -2.0, 10.0, 20.0, "clip_dual"),
        (9.0, -2.0, 10.0, 18.0, None),
        (20.0, 2.0, 10.0, -2.56, "clip_high"),  # the dual bound is for negative advantages only
        (0.5, -2.0, 10.0, 1.56, "clip_low"),
        (1.5, 0.0, 10.0, 0.0, None),
    ],
)
def test_one_token_by_hand(ratio, advantage, dual_clip, loss, bound):
    value, gradient, metrics = token_loss(ratio, advantage, dual_clip)
    assert value == pytest.approx(loss, rel=1e-5)
    # Where a bound decides, the loss does not depend on the policy: d(-A rho)/d log pi = -A rho else.
    assert gradient == pytest.approx(0.0 if bound else -advantage * ratio, rel=1e-5, abs=1e-7)
    fractions = {name: metrics[name] for name in ("clip_low", "clip_high", "clip_dual")}
    assert fractions == {name: float(name == bound) for name in fractions}
    assert metrics["approx_kl"] == pytest.approx(-math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_the_released_settings_give_the_released_loss(case):
    given_case = GOLDEN[case]
    assert given_case["loss_agg_mode"] == "token-mean"
    old, new, advantage = (
        jnp.asarray(given_case[name], jnp.float32) for name in ("old_logprob", "logprob", "advantages")
    )
    mask = jnp.asarray(given_case["mask"], bool)
    loss, metrics = jitted_loss(
        new,
        old,
        advantage,
        mask,
        jnp.sum(mask).astype(jnp.float32),
        given_case["clip_low"],
        given_case["clip_high"],
        given_case["clip_ratio_c"],
    )
    found = {
        "loss": float(loss),
        "clip_fraction": float(metrics["clip_low"] + metrics["clip_high"]),
        "approx_kl": float(metrics["approx_kl"]),
    }
    assert found == pytest.approx({name: given_case[name] for name in found}, abs=1e-5)
    # The released fraction of dual clipping is compared with a count instead: it reads 0 even in the
    # case whose released loss shows that a token was bounded.
    bounded = np.asarray(mask & (advantage < 0) & (jnp.exp(new - old) > given_case["clip_ratio_c"]))
    assert float(metrics["clip_dual"]) == pytest.approx(bounded.sum() / np.asarray(mask).sum())


def test_one_of_the_released_losses_is_decided_by_the_dual_bound():
    """Or the comparison above would say nothing about it."""
    found = 0
    for case in GOLDEN:
        old, new, advantage = (np.array(case[name]) for name in ("old_logprob", "logprob", "advantages"))
        ratio, mask = np.exp(new - old), np.array(case["mask"], bool)
        clipped = np.clip(ratio, 1 - case["clip_low"], 1 + case["clip_high"])
        without = -np.minimum(ratio * advantage, clipped * advantage)[mask].mean()
        found += abs(without - case["loss"]) > 1e-2
    assert found == 1


def example(seed=0, shape=(8, 6)):
    """Tokens far enough off policy that every bound decides some of them."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-1.5, 0.5, shape).astype(np.float32)
    new = (old + rng.normal(0, 0.8, shape)).astype(np.float32)
    advantage = rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[-1] = False  # a row that is not trained at all
    return new, old, advantage, mask


@jax.jit
def with_gradient(new, old, advantage, mask, denominator):
    """((loss, metrics), gradient) with both kinds of clipping."""

    def loss(new):
        return policy_loss(new, old, advantage, mask, denominator, LOW, HIGH, 1.5)

    return jax.value_and_grad(loss, has_aux=True)(new)


def loss_slowly(new, old, advantage, mask):
    """Token by token: the minimum of the plain and the clipped objective, over the trained tokens."""
    total = 0.0
    for n, o, a in zip(*(x[mask].astype(float) for x in (new, old, advantage)), strict=True):
        ratio = math.exp(n - o)
        objective = min(ratio * a, min(max(ratio, 1 - LOW), 1 + HIGH) * a)
        total -= objective if a >= 0 else max(objective, 1.5 * a)
    return total / mask.sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_mean_over_trained_tokens(seed):
    new, old, advantage, mask = example(seed)
    (loss, metrics), _ = with_gradient(new, old, advantage, mask, np.float32(mask.sum()))
    assert float(loss) == pytest.approx(loss_slowly(new, old, advantage, mask), rel=1e-4)
    assert all(metrics[name] > 0 for name in ("clip_low", "clip_high", "clip_dual"))


def test_gradients_are_those_of_finite_differences():
    new, old, advantage, mask = example(1)
    _, gradient = with_gradient(new, old, advantage, mask, np.float32(mask.sum()))
    new = new.astype(np.float64)
    for index in np.ndindex(*new.shape):
        step = np.zeros_like(new)
        step[index] = 1e-6
        up, down = (loss_slowly(new + sign * step, old, advantage, mask) for sign in (1, -1))
        assert float(gradient[index]) == pytest.approx((up - down) / 2e-6, abs=1e-4)


def test_micro_batches_with_one_denominator_add_up_to_the_whole():
    new, old, advantage, mask = example(2)
    denominator = np.float32(mask.sum())
    (whole, metrics), gradient = with_gradient(new, old, advantage, mask, denominator)
    parts = [
        with_gradient(*(x[i : i + 2] for x in (new, old, advantage, mask)), denominator)
        for i in range(0, 8, 2)
    ]
    assert float(sum(loss for (loss, _), _ in parts)) == pytest.approx(float(whole), rel=1e-5)
    for name, value in metrics.items():
        assert float(sum(m[name] for (_, m), _ in parts)) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-5)
    # The parts hold different numbers of trained tokens: a mean of their own means is something else.
    means = [loss_slowly(*(x[i : i + 2] for x in (new, old, advantage, mask))) for i in (0, 2, 4)]
    assert abs(np.mean(means) - float(whole)) > 1e-3


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_what_is_masked_out_reaches_neither_the_value_nor_the_gradient(garbage):
    new, old, advantage, mask = example(3)
    denominator = np.float32(mask.sum())
    (clean, clean_metrics), clean_gradient = with_gradient(new, old, advantage, mask, denominator)
    dirty = [np.where(mask, x, np.float32(garbage)) for x in (new, old, advantage)]
    (loss, metrics), gradient = with_gradient(*dirty, mask, denominator)
    assert float(loss) == float(clean)
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in clean_metrics.items()}
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert not np.asarray(gradient)[~mask].any()


def test_masked_sum_leaves_out_what_is_not_finite_and_adds_in_float32():
    x = jnp.array([1.0, np.nan, 2.5, np.inf], jnp.bfloat16)
    assert float(masked_sum(x, jnp.array([True, False, True, False]))) == 3.5
    # 1,000 ones in bfloat16 would stop at 256.
    total = masked_sum(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, bool))
    assert total.dtype == jnp.float32 and float(total) == 1000.0


def test_one_advantage_per_row_serves_all_its_tokens():
    new, old, advantage, mask = example(4)
    arguments = (new, old, advantage[:, :1], mask, np.float32(mask.sum()))
    (loss, _), _ = with_gradient(*arguments)
    spread = np.repeat(advantage[:, :1], new.shape[1], axis=1)
    assert float(loss) == pytest.approx(loss_slowly(new, old, spread, mask), rel=1e-4)


# --- KL

probabilities = arrays(np.float64, 6, elements=st.floats(0.01, 1.0)).map(lambda x: x / x.sum())


@given(probabilities, probabilities)
def test_k3_is_unbiased(policy, reference):
    """Its mean under the policy, taken over every outcome, is the KL divergence."""
    estimate = kl_k3(jnp.log(jnp.asarray(policy, jnp.float32)), jnp.log(jnp.asarray(reference, jnp.float32)))
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    assert float(np.sum(policy * np.asarray(estimate))) == pytest.approx(exact, abs=1e-5)


@given(arrays(np.float32, 16, elements=st.floats(-20, 20, width=32)))
def test_k3_is_never_negative(difference):
    estimate = np.asarray(kl_k3(jnp.zeros(16), jnp.asarray(difference)))
    expected = np.expm1(difference.astype(np.float64)) - difference
    # Up to the rounding of the two numbers that it is the difference of.
    assert (estimate >= -2e-7 * np.abs(difference)).all()
    np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-6)


def test_k3_is_zero_where_the_policies_agree():
    logprob = jnp.array([-0.001, -1.0, -30.0])
    np.testing.assert_array_equal(kl_k3(logprob, logprob), np.zeros(3))
    # And its gradient pulls towards the reference: d k3 / d log pi = 1 - pi_ref / pi.
    gradient = jax.grad(lambda x: kl_k3(x, jnp.log(0.5)))(jnp.log(0.25))
    assert float(gradient) == pytest.approx(1 - 0.5 / 0.25)
