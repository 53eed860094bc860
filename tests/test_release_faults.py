"""What the authors' release gets wrong on the way to advantages, a test or a few per fault."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_of
from written_world import (
    PEAKS,
    QUERY_LENGTH,
    REWARD,
    B,
    M,
    R,
    base_id,
    check_rows,
    expected_advantage,
    laid_out,
    one_trajectory,
    query_id,
    round_at,
    states_in,
)

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.reject import accept_states
from fr3e_jax.config import (
    CreditConfig,
)
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import Text
from fr3e_jax.pretrained.tokenizer import character_tokenizer
from fr3e_jax.problems.additions import CarryAddition
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.types import Problem, Rollouts

# --- values mixed across states after the batch is reordered


def test_reordering_the_batch_does_not_mix_the_values_of_states():
    waiting = groups.concatenate(round_at(0), round_at(B))
    waiting, _ = groups.split(waiting, groups.count(waiting) // 2 * 2)
    seen, order = [], []
    for part in groups.minibatches(waiting, 2, np.random.default_rng(0)):
        order += part.source.tolist()
        seen += check_rows(laid_out(part))
    # Reordered it was, and nothing is missing or double.
    assert order != waiting.source.tolist()
    expected = [(*map(int, source), m) for source in waiting.source for m in range(M)]
    assert sorted(seen) == sorted(expected)
    advantages = {tuple(np.round(row, 6)) for row in waiting.advantage}
    assert len(advantages) > groups.count(waiting) / 2  # a mix-up would show


# --- splits taken from other responses


@pytest.mark.parametrize("keep", ["first_of_each", "all"])
def test_a_response_is_cut_at_its_own_uncertain_tokens(keep):
    found = round_at(0, CreditConfig(reject="none"), keep)
    kept = range(R) if keep == "all" else range(2)
    expected = [(q, b, j) for q in range(B) for b in kept for j in range(states_in(q, b))]
    assert [tuple(source) for source in found.source.tolist()] == expected
    for i, (q, b, j) in enumerate(expected):
        assert found.prefix_length[i] == (PEAKS[q, b][j - 1] if j else 0)
        size = found.prefix_length[i]
        assert found.prefix[i, :size].tolist() == [base_id(q, b, t) for t in range(size)]
    # Answers side by side were cut at different places.
    assert len({tuple(PEAKS[0, b]) for b in kept}) > 1


# --- groups merged across prompts in accumulation


def test_accumulated_rounds_do_not_merge_groups_of_different_prompts():
    """Row 0 is another prompt in every round."""
    first, second = round_at(0), round_at(B)
    both = groups.concatenate(first, second)
    assert groups.count(both) == groups.count(first) + groups.count(second)
    assert set(both.source[:, 0]) == set(first.source[:, 0]) | set(second.source[:, 0])
    assert not set(first.source[:, 0]) & set(second.source[:, 0])
    for i, (q, b, j) in enumerate(both.source.tolist()):
        np.testing.assert_allclose(both.advantage[i], expected_advantage(q, b, j), atol=1e-6)
        assert both.query[i, : QUERY_LENGTH[q]].tolist() == [query_id(q, t) for t in range(QUERY_LENGTH[q])]


def test_rejection_by_query_looks_at_one_prompt_of_one_round():
    reward = jnp.array([[[1, 1]], [[0, 0]]], jnp.float32)
    valid = jnp.ones((2, 1), bool)
    for query in ([0, 1], [1, 0]):
        assert not np.asarray(accept_states(reward, valid, jnp.array(query), "query")).any()
    # In the same round the same rewards belong to one prompt where the query is one.
    assert np.asarray(accept_states(reward, valid, jnp.array([1, 1]), "query")).all()


# --- modulation against the previous survivor


def test_modulation_is_against_the_previous_state_though_it_was_rejected():
    """Values 1/2, 1, 1/4: the middle state is rejected, and the third is modulated against it."""
    reward = jnp.array([[[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]], jnp.float32)
    valid = jnp.ones((1, 3), bool)
    accepted = accept_states(reward, valid, jnp.zeros(1, jnp.int32), "state")
    np.testing.assert_array_equal(accepted, [[True, False, True]])
    advantage, _, alpha = modulated_advantage(reward, valid)
    assert float(alpha[0, 2]) == pytest.approx(math.exp(0.75))  # exp(1/4) against the survivor
    np.testing.assert_allclose(
        advantage[0, 2], math.exp(0.75) * np.array([0.75, -0.25, -0.25, -0.25]), rtol=1e-6
    )


def test_a_round_modulates_against_rejected_states():
    found = round_at(0)
    sources = [tuple(source) for source in found.source.tolist()]
    assert (1, 0, 1) not in sources  # always right
    after = sources.index((1, 0, 2))
    np.testing.assert_allclose(found.advantage[after], expected_advantage(1, 0, 2), atol=1e-6)
    value = REWARD[1, 0].mean(axis=1)
    assert value[1] == 1.0 and value[0] != 1.0  # against the survivor it would be another number
    assert not any(source[:2] == (2, 1) for source in sources)  # never right


# --- rewards on the continuation alone


def verified(problem, response, prefix_length, continuations):
    """Rewards of continuations of one state, through the program's own verification."""
    tokenizer = character_tokenizer(CarryAddition.alphabet)
    end = tokenizer.eos_token_id

    def encode(text):
        return [*tokenizer.encode(text, add_special_tokens=False), end]

    base = np.zeros((1, 40), np.int32)
    base[0, : len(response) + 1] = encode(response)
    own = [encode(text) for text in continuations]
    token = np.zeros((1, 2 * len(own), 40), np.int32)
    length = np.zeros((1, 2 * len(own)), np.int32)
    for m, ids in enumerate(own):  # of state 1; the root is invalid here
        token[0, len(own) + m, : len(ids)], length[0, len(own) + m] = ids, len(ids)
    nothing = np.zeros(token.shape, np.float32)
    text, pool = Text(tokenizer, (end,), "plain"), ScoringPool(["carry_addition"])
    reward = Verifier(text, Hosts(mesh_of(), 1), pool).whole(
        one_trajectory(base, [0, prefix_length], [False, True]),
        Rollouts(token, nothing, nothing, nothing, length, length > 0),
        [problem],
    )()
    assert not reward[0, 0].any()  # an invalid state has no rewards
    return reward[0, 1].tolist()


PROBLEM = Problem("47+85=", "132", "carry_addition")
RESPONSE = "7+5+0=12,1;4+8+1=13,1;=132"


@pytest.mark.parametrize("kept", range(1, len(RESPONSE)))
def test_the_reward_is_of_the_whole_answer_wherever_it_is_cut(kept):
    right = RESPONSE[kept:]
    wrong = right[:-1] + ("3" if right[-1] == "2" else "2")
    assert verified(PROBLEM, RESPONSE, kept, [right, wrong, right + "0"]) == [1.0, 0.0, 0.0]


def test_a_cut_within_the_final_answer_still_scores():
    """Of the answer `...;=132` the prefix holds `...;=13`; the continuation alone is `2`."""
    kept = RESPONSE.index(";=13") + 4
    assert verified(PROBLEM, RESPONSE, kept, ["2", "3", "22", ""]) == [1.0, 0.0, 0.0, 0.0]
    # Nor does a continuation score that would be right alone, but not after its prefix.
    assert verified(PROBLEM, RESPONSE, kept, [";=132", "=132", ";=1322", "132"]) == [1.0, 0.0, 0.0, 0.0]
