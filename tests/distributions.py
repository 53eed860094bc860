"""Draws of a sampler and the exact distribution that they are compared with."""

import functools
import math

import jax
import numpy as np

from fr3e_jax.engine.sampler import GREEDY, Drawn, Sampling, draw, draw_uniform, row_key

LAST = np.nextafter(np.float32(1), np.float32(0))  # the largest uniform below 1
ROUNDING = 1e-6  # of a float32 CDF, against the exact one
EVERYTHING = Sampling()


@functools.partial(jax.jit, static_argnums=(2, 3))
def drawn_batch(logits, uniform, sampling, parts):
    return jax.vmap(lambda u: draw(logits, u, sampling, parts))(uniform)


def drawn_many(logits, uniform, sampling=EVERYTHING, parts=1):
    """One draw per uniform number from one distribution, compiled as in the decoding loop.

    In batches of one size, so that however many the numbers, it is compiled once.
    """
    batches = np.zeros((-(-len(uniform) // 4096), 4096), np.float32)
    batches.ravel()[: len(uniform)] = uniform
    drawn = [drawn_batch(logits, batch, sampling, parts) for batch in batches]
    return Drawn(*(np.concatenate(x)[: len(uniform)] for x in zip(*drawn, strict=True)))


def draw_many(logits, uniform, sampling=EVERYTHING):
    return drawn_many(logits, uniform, sampling).token


def probabilities(logits, temperature=1.0):
    """Softmax in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def reference(logits, sampling):
    """The distribution to draw from, in float64: sorted, and filtered in the order of the fields."""
    if sampling.temperature == 0.0:
        return (np.arange(len(logits)) == np.argmax(logits)).astype(np.float64)
    probability = probabilities(logits, sampling.temperature)
    order = np.argsort(-logits, kind="stable")

    def keep_first(count):
        """The `count` most likely tokens and what is as likely as the last of them, renormalised."""
        kept = logits >= logits[order[min(count, len(order)) - 1]]
        return np.where(kept, probability, 0.0) / probability[kept].sum()

    if sampling.top_k:
        probability = keep_first(sampling.top_k)
    if sampling.top_p < 1.0:
        probability = keep_first(1 + np.searchsorted(np.cumsum(probability[order]), sampling.top_p))
    return probability


def random_logits(size, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def uniforms(count, seed=0):
    return np.random.default_rng(seed).random(count, np.float32)


@jax.jit
def numbers_of(seed, step, query, branch, position):
    def one(step, query, branch, position):
        return draw_uniform(row_key(jax.random.key(seed), step, query, branch), position)

    return jax.vmap(one)(step, query, branch, position)


def check_chi_square(token, probability):
    """Counts fit the distribution: within four standard deviations of the statistic's mean."""
    expected = probability * len(token)
    count = np.bincount(token, minlength=len(probability))
    common = expected >= 5  # the rare tokens are counted together
    expected = np.append(expected[common], expected[~common].sum())
    count = np.append(count[common], count[~common].sum())
    used = expected > 0
    assert not count[~used].any()
    statistic = ((count[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def check_inverse_cdf(token, uniform, probability):
    """Each token can be drawn, and its step of the CDF has its uniform number, up to rounding."""
    assert (probability[token] > 0).all()
    cdf = np.cumsum(probability)
    assert (uniform < cdf[token] + ROUNDING).all()
    assert (uniform > cdf[token] - probability[token] - ROUNDING).all()


def clear_of_steps(uniform, probability):
    """The numbers that rounding cannot carry over a step of the CDF."""
    distance = np.abs(uniform[:, None] - np.cumsum(probability)[None])
    clear = uniform[distance.min(axis=1) > ROUNDING]
    assert len(clear) > len(uniform) / 2
    return clear


FILTERS = [
    Sampling(top_k=50),
    Sampling(top_p=0.9),
    Sampling(0.7, 50, 0.9),
    Sampling(2.0, 50),
    Sampling(2.0, 0, 0.3),
    Sampling(2.0, 20, 0.9),  # of the 20, fewer have 0.9 than have 0.9 of everything
]
ALL = [EVERYTHING, Sampling(0.5), *FILTERS, GREEDY]
FEW = [EVERYTHING, Sampling(0.7, 50, 0.9), GREEDY]
