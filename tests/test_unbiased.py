"""Which advantages make the sum of the gradients an unbiased estimate, and of what: by enumeration.

A policy with a logit for each of 7 prefixes draws 3 tokens, each 0 or 1, and every answer has its reward. All
base trajectories with all rollouts of their states are enumerated with their probabilities, in float64. The
gradients of log-probabilities are derived by hand: y - sigmoid(logit) at the prefix that y was drawn at.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from environment import REPOSITORY

from fr3e_jax.algorithm.choose import choose_positions
from fr3e_jax.algorithm.credit import modulated_advantage

STEPS, ROLLOUTS = 3, 2
ANSWERS = list(itertools.product((0, 1), repeat=STEPS))
PREFIXES = [answer[:n] for n in range(STEPS) for answer in sorted({a[:n] for a in ANSWERS})]
PREFIXES = list(dict.fromkeys(PREFIXES))
LOGIT = dict(zip(PREFIXES, [0.3, -0.9, 0.7, 1.4, -0.2, 0.5, -1.1], strict=True))
REWARD = dict(zip(ANSWERS, [0.0, 1.0, 0.5, 0.0, 1.0, 0.5, 0.0, 1.0], strict=True))
BOTH = [list(range(1, STEPS))] * len(ANSWERS)  # positions 1 and 2 of every answer

advantage_of = jax.jit(
    modulated_advantage, static_argnames=("estimator", "baseline", "state_weight", "normalize_std")
)


def probability(answer, start=0):
    """Of the tokens of an answer from `start` on."""
    return np.prod([chance(answer[:n])[answer[n]] for n in range(start, len(answer))])


def chance(prefix):
    one = 1 / (1 + np.exp(-LOGIT[prefix]))
    return 1 - one, one


def score(answer, start=0, end=STEPS):
    """Gradient of the log-probability of the tokens from `start` up to `end`, by the 7 logits."""
    gradient = np.zeros(len(PREFIXES))
    for n in range(start, end):
        gradient[PREFIXES.index(answer[:n])] += answer[n] - chance(answer[:n])[1]
    return gradient


def value_gradient(start):
    """E grad V(S) of the prefix S of `start` tokens: the part of grad V(S_0) that is of the tokens behind."""
    return sum(probability(a) * REWARD[a] * score(a, start) for a in ANSWERS)


@functools.cache
def world(hindsight=False):
    """All outcomes: (probability, rewards [N, J, M], base rewards, scores [N, J, M + 1, 7], base answers)."""
    outcomes = []
    for base, positions in zip(ANSWERS, by_entropy() if hindsight else BOTH, strict=True):
        groups = []
        for start, end in zip([0, *positions], [*positions, STEPS], strict=True):
            drawn = [a for a in ANSWERS if a[:start] == base[:start]]
            one = [(probability(a, start), REWARD[a], score(a, start)) for a in drawn]
            segment = score(base, start, end)
            groups.append(
                [
                    (
                        np.prod([p for p, _, _ in own]),
                        [r for _, r, _ in own],
                        [*(s for _, _, s in own), segment],
                    )
                    for own in itertools.product(one, repeat=ROLLOUTS)
                ]
            )
        for states in itertools.product(*groups):
            chances, rewards, scores = zip(*states, strict=True)
            outcomes.append((probability(base) * np.prod(chances), rewards, REWARD[base], scores, base))
    p, reward, base_reward, scores, base = zip(*outcomes, strict=True)
    return np.array(p), np.float32(reward), np.float32(base_reward), np.array(scores), list(base)


def by_entropy():
    """The one position of each answer whose token was drawn at the highest entropy."""
    entropy = np.array([[entropy_of(chance(a[:n])) for n in range(STEPS)] for a in ANSWERS], np.float32)
    return np.asarray(choose_positions(entropy, np.full(len(ANSWERS), STEPS), 1)[0]).tolist()


def entropy_of(chances):
    return -sum(p * np.log(p) for p in chances)


def expected_gradient(hindsight=False, kept=None, **options):
    """Expectation of the sum over rows of advantage times gradient; `kept` weighs base answers."""
    p, reward, base_reward, scores, base = world(hindsight)
    assert abs(p.sum() - 1) < 1e-12
    advantage = advantage_of(reward, np.ones(reward.shape[:2], bool), base_reward=base_reward, **options)[0]
    advantage = np.asarray(advantage, np.float64)
    weight = p if kept is None else p * np.array([kept[a] for a in base])
    return np.einsum("n,njr,njrg->g", weight, advantage, scores[:, :, : advantage.shape[2]])


def parts(*weights):
    """A weighted sum of the parts of grad V(S_0) that the tokens of the segments have."""
    ends = [value_gradient(start) for start in range(STEPS + 1)]
    return sum(w * (ends[j] - ends[j + 1]) for j, w in enumerate(weights))


# estimator, baseline, state_weight: how often the tokens of segments 0, 1, 2 count in the expected gradient,
# for M = 2 rollouts and J = 3 states (None: it is no such sum), and what it is in general, for the page.
CASES = {
    ("paper", "mean", "rollout"): (None, "no sum of value gradients: alpha_j follows the rewards"),
    ("paper", "mean", "trajectory"): (None, "the same, weighted"),
    ("paper", "leave_one_out", "rollout"): (None, "alpha_j still follows them"),
    ("paper", "leave_one_out", "trajectory"): (None, "the same, weighted"),
    ("value", "mean", "rollout"): ((1, 2, 3), "(M - 1) sum_j grad V(S_j)"),
    ("value", "mean", "trajectory"): ((1.5, 2.25, 3), "(M - 1) sum_j w_j grad V(S_j)"),
    ("value", "leave_one_out", "rollout"): ((2, 4, 6), "M sum_j grad V(S_j)"),
    ("value", "leave_one_out", "trajectory"): ((3, 4.5, 6), "M sum_j w_j grad V(S_j)"),
    ("edge", "mean", "rollout"): ((2, 3, 4), "grad V(S_0) + (M - 1) sum_j grad V(S_j)"),
    ("edge", "mean", "trajectory"): ((6, 5, 4), "rollouts count (M - 1) / M of what balances the segments"),
    ("edge", "leave_one_out", "rollout"): ((3, 5, 7), "grad V(S_0) + M sum_j grad V(S_j)"),
    ("edge", "leave_one_out", "trajectory"): ((7, 7, 7), "(1 + J M) grad V(S_0)"),
}


def test_the_enumerated_gradient_is_that_of_the_expected_reward():
    """By differences of V(S_0) itself."""
    differences = []
    for prefix, logit in list(LOGIT.items()):
        values = []
        for change in (1e-5, -1e-5):
            LOGIT[prefix] = logit + change
            values.append(sum(probability(a) * REWARD[a] for a in ANSWERS))
        LOGIT[prefix] = logit
        differences.append((values[0] - values[1]) / 2e-5)
    np.testing.assert_allclose(value_gradient(0), differences, atol=1e-9)
    np.testing.assert_allclose(parts(1, 1, 1), differences, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_expected_gradient_of_each_choice(case):
    estimator, baseline, state_weight = case
    found = expected_gradient(estimator=estimator, baseline=baseline, state_weight=state_weight)
    weights = CASES[case][0]
    if weights is not None:
        np.testing.assert_allclose(found, parts(*weights), rtol=1e-5, atol=1e-6)
    else:
        assert distance_from_sums(found) > 0.01


def distance_from_sums(gradient):
    """Distance of a gradient from the nearest weighted sum of the segments' parts, relative to its length."""
    basis = np.stack([parts(*row) for row in np.eye(STEPS)], axis=1)
    nearest = basis @ np.linalg.lstsq(basis, gradient, rcond=None)[0]
    return np.linalg.norm(gradient - nearest) / np.linalg.norm(gradient)


def angle(gradient):
    """1 - cosine between a gradient and grad V(S_0)."""
    true = value_gradient(0)
    return 1 - gradient @ true / np.linalg.norm(gradient) / np.linalg.norm(true)


UNBIASED = {"estimator": "edge", "baseline": "leave_one_out", "state_weight": "trajectory"}


def test_dividing_by_the_standard_deviation_is_biased():
    assert distance_from_sums(expected_gradient(estimator="value", normalize_std=True)) > 0.01


def test_choosing_trajectories_by_their_rewards_biases_segments_but_not_the_roots_rollouts():
    """As `first_of_each` does: of four base trajectories it keeps the first right and the first wrong one."""
    right = sum(probability(a) for a in ANSWERS if REWARD[a] == 1)
    mean_kept = {True: (1 - (1 - right) ** 4) / right, False: (1 - right**4) / (1 - right)}
    kept = {a: mean_kept[REWARD[a] == 1] for a in ANSWERS}
    assert distance_from_sums(expected_gradient(**UNBIASED)) < 1e-6
    assert distance_from_sums(expected_gradient(kept=kept, **UNBIASED)) > 0.01
    # The rollouts of the root, which alone train its logit, know nothing of the base trajectory.
    times = sum(probability(a) * kept[a] for a in ANSWERS)
    found = expected_gradient(kept=kept, estimator="value")[0]
    np.testing.assert_allclose(found, times * expected_gradient(estimator="value")[0], rtol=1e-5)


def test_positions_that_are_chosen_with_hindsight_bias_segments():
    """Whether a token is a position depends, by the highest entropy, on the tokens behind it."""
    assert len({tuple(position) for position in by_entropy()}) == 2
    assert angle(expected_gradient(hindsight=True, **UNBIASED)) > 0.01


def test_the_page_says_which_are_unbiased():
    page = (REPOSITORY / "fr3e_jax" / "step" / "README.md").read_text()
    for (estimator, baseline, state_weight), (weights, what) in CASES.items():
        unbiased = "yes" if weights and len(set(weights)) == 1 else "no"
        assert f"| `{estimator}` | `{baseline}` | `{state_weight}` | {what} | {unbiased} |" in page
