"""The position rules that look beyond what sampling records: gradient, attention and sentence, by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr3e_jax.algorithm.positions import (
    POSITION_RULES,
    by_attention,
    by_entropy,
    by_gradient,
    by_sentence,
    positions_of,
)
from fr3e_jax.algorithm.rules import Rule, RuleError, needs_of
from fr3e_jax.algorithm.trajectories import NEEDS, Measures, Trajectories

NAMES = ("gradient", "attention", "sentence")


def trajectories(length, entropy=None, count=2, min_gap=0, **measures):
    """Trajectories of these measures [N, S]; the entropy is of no interest unless it is given."""
    some = np.asarray(next(iter(measures.values())))
    entropy = np.zeros(some.shape) if entropy is None else entropy
    keys = jax.random.split(jax.random.key(0), len(some))
    found = {name: np.asarray(x, bool if name == "sentence" else np.float32) for name, x in measures.items()}
    told = np.asarray(entropy, np.float32)
    return Trajectories(told, -told, np.asarray(length), keys, count, min_gap, measures=Measures(**found))


def drawn(seed=0, n=6, s=16):
    """Random trajectories with all measures, of consistent attention."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, s + 1, n)
    weight = np.tril(rng.random((n, s, s)) ** 3, -1)
    run = np.arange(s) < length[:, None] - 1  # the last token is not run
    weight = weight * run[:, :, None] * run[:, None, :]
    at = np.stack([[np.trace(w, -d) for d in range(s)] for w in weight])
    return trajectories(
        length,
        rng.random((n, s)),
        gradient=rng.random((n, s)),
        attention=weight.sum(axis=1),
        attention_at=at,
        sentence=rng.random((n, s)) < 0.4,
    ), weight


def test_gradient_takes_the_largest_norms():
    base = trajectories([5], gradient=[[9.0, 0.1, 0.7, 0.2, 0.8]])
    assert positions_of("gradient", base)[0].tolist() == [[2, 4]]


def usual_slowly(weight, length):
    """What tokens get on average at each distance, and their sum over the later ones of each token."""
    n = length - 1
    mean = [np.mean([weight[t + d, t] for t in range(n - d)]) if d < n else 0.0 for d in range(len(weight))]
    return np.array([sum(mean[1 : n - t]) for t in range(len(weight))])


def test_attention_is_what_a_token_receives_over_what_is_usual_at_its_place():
    base, weight = drawn()
    found = np.asarray(by_attention(base))
    for n, size in enumerate(base.length):
        usual = usual_slowly(weight[n], size)
        followed = np.arange(16) < size - 2
        expected = weight[n].sum(axis=0)[followed] / usual[followed]
        np.testing.assert_allclose(found[n][followed], expected, rtol=1e-5)
        assert not found[n][~followed].any()


def test_attention_by_hand():
    """Three tokens that run: token 1 gets .2 of token 2, token 0 gets .4 of token 1 and .3 of token 2."""
    base = trajectories([4], attention=[[0.7, 0.2, 0.0, 0.0]], attention_at=[[0.0, 0.6, 0.3, 0.0]])
    # At distance 1 .3 is usual, at distance 2 .3: of token 0 .6, of token 1 .3.
    np.testing.assert_allclose(by_attention(base), [[0.7 / 0.6, 0.2 / 0.3, 0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("fall", [lambda d: 1.0 + 0 * d, lambda d: 0.5**d], ids=["far", "near"])
def test_attention_by_distance_alone_makes_no_place_a_position_before_another(fall):
    """Neither the beginning, which many tokens follow, nor the end, whose few followers are near."""
    size = 12
    later, earlier = np.mgrid[: size - 1, : size - 1]
    weight = np.where(later > earlier, fall((later - earlier).clip(0).astype(float)), 0.0)
    weight = np.pad(weight, (0, 1))
    at = [[np.trace(weight, -d) for d in range(size)]]
    base = trajectories([size], attention=[weight.sum(axis=0)], attention_at=at)
    np.testing.assert_allclose(by_attention(base)[0, : size - 2], 1.0, rtol=1e-5)
    weight[5:, 4] *= 2  # one that all later ones look at
    at = [[np.trace(weight, -d) for d in range(size)]]
    base = trajectories([size], attention=[weight.sum(axis=0)], attention_at=at, count=1)
    assert positions_of("attention", base)[0].tolist() == [[4]]


def test_sentences_are_forked_at_their_beginnings_by_their_mean_entropy():
    entropy = [[0.9, 0.9, 0.1, 0.5, 0.6, 9.0, 0.0, 0.7, 0.1]]
    begins = [[1, 0, 1, 1, 0, 0, 0, 1, 1]]  # means .9, .1, (.5 + .6 + 9 + 0) / 4, and within length 8 .7
    base = trajectories([8], entropy, sentence=begins)
    np.testing.assert_allclose(
        by_sentence(base),
        [[0.9, -np.inf, 0.1, 10.1 / 4, -np.inf, -np.inf, -np.inf, 0.7, -np.inf]],
        rtol=1e-6,
    )
    assert positions_of("sentence", base)[0].tolist() == [[3, 7]]
    assert positions_of("sentence", dataclasses.replace(base, min_gap=5))[1].tolist() == [[True, False]]


def test_an_answer_of_few_sentences_has_few_positions():
    base = trajectories([6, 6], sentence=[[1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]], count=3)
    position, valid = positions_of("sentence", base)
    assert position.tolist() == [[0, 0, 0], [3, 0, 0]] and valid.sum() == 1


@pytest.mark.parametrize("name", NAMES)
def test_rules_keep_to_the_gap_and_do_not_see_padding_or_other_rows(name):
    base, _ = drawn()
    base = dataclasses.replace(base, count=3, min_gap=4)
    position, valid = map(np.asarray, positions_of(name, base))
    for row, ok, size in zip(position, valid, base.length, strict=True):
        chosen = row[ok].tolist()
        assert all(1 <= t < size for t in chosen)
        assert all(b - a >= 4 for a, b in itertools.pairwise(chosen))
    assert valid.any(axis=1).sum() > 3

    order = np.array([3, 1, 5, 0, 4, 2])
    shuffled = jax.tree.map(lambda x: x[order], base.measures)
    changed = dataclasses.replace(
        base, measures=shuffled, entropy=base.entropy[order], length=base.length[order], key=base.key[order]
    )
    np.testing.assert_array_equal(positions_of(name, changed)[0], position[order])

    wider = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 8))), base.measures)
    padded = np.pad(base.entropy, ((0, 0), (0, 8)), constant_values=7.0)
    changed = dataclasses.replace(base, measures=wider, entropy=padded, logprob=-padded)
    np.testing.assert_array_equal(positions_of(name, changed)[0], position)


# --- what rules need


def test_rules_say_what_they_need_and_no_other_gets_it():
    needs = {name: needs_of(POSITION_RULES, name, NEEDS) for name in POSITION_RULES}
    assert {name: needs[name] for name in NAMES} == {name: (name,) for name in NAMES}
    assert not any(needs[name] for name in ("entropy", "surprisal", "random", "uniform"))
    assert needs_of(POSITION_RULES, by_gradient, NEEDS) == ("gradient",)
    assert needs_of(POSITION_RULES, by_entropy, NEEDS) == ()


def test_a_function_of_ones_own_says_what_it_needs_too():
    def steep(base):
        return base.measured("gradient") * base.entropy

    assert needs_of(POSITION_RULES, steep, NEEDS) == ()
    with pytest.raises(RuleError, match=r"uses gradient, .* function\.needs = \(\"gradient\",\)"):
        positions_of(steep, trajectories([3], sentence=[[1, 0, 1]]))
    steep.needs = ("gradient",)
    assert needs_of(POSITION_RULES, steep, NEEDS) == ("gradient",)
    base = trajectories([4], [[0.0, 1.0, 3.0, 1.0]], gradient=[[0.0, 3.0, 0.5, 0.1]], count=1)
    assert positions_of(steep, base)[0].tolist() == [[1]]
    steep.needs = "gradeint"
    with pytest.raises(RuleError, match="steep needs 'gradeint', which is none of gradient, attention"):
        needs_of(POSITION_RULES, steep, NEEDS)
    table = {"steep": Rule(steep, "steep", needs=("attention",))}
    assert needs_of(table, "steep", NEEDS) == ("attention",)


def test_a_rule_is_a_function_of_arrays_that_compiles():
    base, _ = drawn()

    def score(measures):
        return by_attention(dataclasses.replace(base, measures=measures))

    np.testing.assert_allclose(jax.jit(score)(base.measures), score(jax.tree.map(jnp.asarray, base.measures)))
