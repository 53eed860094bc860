"""What the authors' release gets wrong, one test (or a few) per fault.

The rounds here run through the program's own code, from `open_round` to the learner's rows, with an
engine that writes instead of samples: every token id says which query, trajectory, state and rollout it
belongs to, so that anything that is mixed up is seen.
"""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, mesh_of, whole_rows

from fr3e_jax.algorithm.credit import accept_states, modulated_advantage
from fr3e_jax.algorithm.loss import policy_loss
from fr3e_jax.config import (
    Config,
    CreditConfig,
    ExploreConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
)
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner import groups
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import Text
from fr3e_jax.pretrained.tokenizer import character_tokenizer
from fr3e_jax.problems.additions import CarryAddition
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verdict import Verdict
from fr3e_jax.rewards.verify import Verifier, whole_answer
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.step.rounds import Round, close_round, open_round
from fr3e_jax.step.update import train_step
from fr3e_jax.types import Problem, Queries, Rollouts, States

B, R, K, M, P, S = 3, 4, 2, 4, 4, 12
J = K + 1
QUERIES = 9  # of the written world


# --- a written world: query q has R base trajectories, of which 0 is right and the others are wrong

RNG = np.random.default_rng(0)
QUERY_LENGTH = RNG.integers(1, P + 1, QUERIES)
BASE_LENGTH = RNG.integers(6, S + 1, (QUERIES, R))
BASE_LENGTH[0] = [12, 2, 7, 5]  # side by side, one of them too short for two positions
# Where the entropy of each is highest, at places of its own.
PEAKS = np.zeros((QUERIES, R, K), np.int32)
for q, b in np.ndindex(QUERIES, R):
    places = np.arange(1, BASE_LENGTH[q, b])
    PEAKS[q, b, : len(places)] = sorted(RNG.choice(places, min(K, len(places)), replace=False))
REWARD = (RNG.random((QUERIES, R, J, M)) < 0.5).astype(np.float32)
REWARD[1, 0, 1] = 1.0  # a state in the middle of a trajectory that is always right, and is rejected
REWARD[2, 1] = 0.0  # a trajectory without any right rollout


def query_id(q, t):
    return 5_000_000 + 100 * q + t


def base_id(q, b, t):
    return 1_000_000 + 10_000 * q + 1000 * b + t


def own_id(q, b, j, m, t):
    return 9_000_000 + 100_000 * q + 10_000 * b + 1000 * j + 100 * m + t


def where_from(token):
    """(query, base, state, rollout) of a continuation's token."""
    return tuple(int(token) // 10**place % 10 for place in (5, 4, 3, 2))


def own_length(q, b, j, m):
    return 1 + (q + 2 * b + 3 * j + m) % 4


def logprob_of(token):
    return -(np.asarray(token) % 997) / np.float32(500.0)


def rollouts_of(token, length, entropy=None):
    token = np.asarray(token, np.int32)
    inside = np.arange(S) < np.asarray(length)[..., None]
    entropy = np.zeros(token.shape, np.float32) if entropy is None else entropy
    return Rollouts(
        token=np.where(inside, token, 0),
        logprob=np.where(inside, logprob_of(token), 0).astype(np.float32),
        sampled_logprob=np.where(inside, logprob_of(token), 0).astype(np.float32),
        entropy=np.where(inside, entropy, 0).astype(np.float32),
        length=np.asarray(length, np.int32),
        stopped=np.ones(np.shape(length), bool),
    )


def first_return(params, queries, key, step, count, sampling):
    """Base trajectories as they are written, and no caches."""
    token = [[[base_id(q, b, t) for t in range(S)] for b in range(count)] for q in queries.index]
    entropy = np.full((len(queries.index), count, S), 0.1)
    for i, q in enumerate(queries.index):
        for b in range(count):
            entropy[i, b, PEAKS[q, b]] = 2.0
    entropy[..., 0] = 9.0  # the most uncertain token of all is the first, which is no position
    return rollouts_of(token, BASE_LENGTH[queries.index], entropy), None, token_count(token)


def token_count(token):
    """Rows decoded, had none idled."""
    return np.size(token)


def arrange(kept):
    """More trajectories than there are, the others invalid."""
    query, trajectory = np.nonzero(kept)
    real = np.arange(2 * B * R) < len(query)
    query, trajectory = np.pad([query, trajectory], [(0, 0), (0, len(real) - len(query))])
    return query.astype(np.int32), trajectory.astype(np.int32), real


def explore(params, queries, caches, states, key, step, rollouts, sampling):
    """Continuations that say which state they were started from."""
    n, j_count = states.valid.shape
    token = np.zeros((n, j_count * rollouts, S), np.int32)
    length = np.zeros((n, j_count * rollouts), np.int32)
    for i, j, m in np.ndindex(n, j_count, rollouts):
        if states.valid[i, j]:
            q, b = int(queries.index[states.query[i]]), int(states.base[i])
            token[i, j * rollouts + m] = [own_id(q, b, j, m, t) for t in range(S)]
            length[i, j * rollouts + m] = own_length(q, b, j, m)
    return rollouts_of(token, length), token_count(token)


def reward_of(response, answer):
    """Base trajectory 0 is right; rollouts score what REWARD says, if prefix and problem are theirs."""
    response = [int(token) for token in response.split()]
    q, b, j, m = where_from(response[-1])
    if response[-1] < 9_000_000:
        q, b, size = response[-1] // 10_000 % 10, response[-1] // 1000 % 10, BASE_LENGTH
        assert response == [base_id(q, b, t) for t in range(size[q, b])]
        reward = float(b == 0)
    else:
        expected = [base_id(q, b, t) for t in range(PEAKS[q, b][j - 1] if j else 0)]
        expected += [own_id(q, b, j, m, t) for t in range(own_length(q, b, j, m))]
        assert response == expected
        reward = float(REWARD[q, b, j, m])
    assert answer == f"answer {q}"
    return reward


def take(position, count):
    index = np.arange(position, position + count, dtype=np.int32)
    token = np.array([[query_id(q, t) for t in range(P)] for q in index], np.int32)
    length = QUERY_LENGTH[index].astype(np.int32)
    token = np.where(np.arange(P) < length[:, None], token, 0)
    return Queries(token, length, index), [Problem(f"query {q}", f"answer {q}", "written") for q in index]


def begin(asked):
    """What a pool of workers does, here."""
    verdicts = [Verdict(reward_of(a.response, a.answer) > 0, "") for a in asked]
    return SimpleNamespace(result=lambda: verdicts)


def written_run(**settings):
    """A run on the written world; `settings` are sections of the configuration."""
    sections = {
        "rollout": RolloutConfig(queries=B, base_trajectories=R, max_prompt=P, max_response=S),
        "explore": ExploreConfig(positions=K, rollouts=M),
        "optimizer": OptimizerConfig(batch_states=4, minibatches=2, micro_tokens=64),
        **settings,
    }
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2})
    at_home = SimpleNamespace(place=lambda x: x, place_rows=lambda tree, row_axis=0: tree, mesh=mesh)

    def written(rows, stopped=None):
        return [" ".join(map(str, row)) for row in rows]

    text = SimpleNamespace(decode=written, answers=written, trimmed=lambda rollouts, states=None: rollouts)
    hosts = Hosts(mesh_of(), 1)
    return SimpleNamespace(
        config=Config(**sections),
        engine=SimpleNamespace(
            placement=at_home,
            arrange=arrange,
            first_return=first_return,
            explore=explore,
        ),
        placement=at_home,
        model=TINY,
        sampling=Sampling(),
        reference=None,
        key=jax.random.key,
        sampling_params=lambda params: params,
        verifier=Verifier(text, hosts, SimpleNamespace(begin=begin, timed_out=0)),
        hosts=hosts,
        stream=SimpleNamespace(take=take, text=text),
        interruption=SimpleNamespace(check=lambda: None),
    )


def sample_round(run, position):
    watch = Stopwatch()
    return close_round(run, open_round(run, None, 1, position, watch), watch)


@functools.cache
def round_at(position, credit=None, keep="first_of_each"):
    """The accepted states of one round."""
    run = written_run(
        credit=credit or CreditConfig(), explore=ExploreConfig(positions=K, rollouts=M, keep=keep)
    )
    return sample_round(run, position)[0]


def states_in(q, b):
    """States of a trajectory: a short answer has fewer."""
    return min(K, int(BASE_LENGTH[q, b]) - 1) + 1


def expected_advantage(q, b, j):
    """The paper's, by hand: alpha_j (r - V(S_j)), alpha_j = 1 / exp(V(S_j) - V(S_{j-1}))."""
    value = [sum(map(float, REWARD[q, b, i])) / M for i in range(J)]
    alpha = math.exp(value[j - 1] - value[j]) if j else 1.0
    return [alpha * (float(r) - value[j]) for r in REWARD[q, b, j]]


def laid_out(part):
    return bundles_of(part, 2, 64)


def check_rows(bundles):
    """Each row of a minibatch is one rollout, whole, with its own prefix, log-probabilities and advantage.

    Returns:
      (query, base, state, rollout) of every row, state by state.
    """
    found = []
    for token, length, start, logprob, advantage in whole_rows(bundles):
        q, b, j, m = where_from(token[start])
        cut = PEAKS[q, b][j - 1] if j else 0
        expected = [query_id(q, t) for t in range(QUERY_LENGTH[q])]
        expected += [base_id(q, b, t) for t in range(cut)]
        assert start == len(expected)
        expected += [own_id(q, b, j, m, t) for t in range(own_length(q, b, j, m))]
        assert token[:length].tolist() == expected and not token[length:].any()
        np.testing.assert_allclose(logprob[start:length], logprob_of(token[start:length]))
        assert advantage == pytest.approx(expected_advantage(q, b, j)[m], abs=1e-6)
        found.append((q, b, j, m))
    return sorted(found)


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


def one_trajectory(response, prefix_length, valid):
    """States of the first base trajectory of the first query."""
    zero = np.zeros(1, np.int32)
    return States(zero, zero, response, np.array([prefix_length], np.int32), np.array([valid]))


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


# --- inert clipping


def test_clipping_acts_from_the_second_minibatch_on():
    """A policy of one choice of four, trained on two minibatches of the same samples.

    In the first the ratio is exactly 1 and nothing is clipped; the step is large, and in the second,
    whose old log-probabilities are still those of sampling, the bounds decide and stop the gradient.
    """
    settings = LossConfig()
    logits = jnp.zeros(4)
    token = jnp.array([0, 1, 2, 3])
    old = jax.nn.log_softmax(logits)[token]
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])

    @jax.jit
    def minibatch(logits):
        def loss(logits):
            logprob = jax.nn.log_softmax(logits)[token]
            mask = jnp.ones(4, bool)
            return policy_loss(
                logprob, old, advantage, mask, jnp.float32(4), settings.clip_low, settings.clip_high
            )

        return jax.value_and_grad(loss, has_aux=True)(logits)

    (_, first), gradient = minibatch(logits)
    assert float(first["clip_low"]) == float(first["clip_high"]) == 0.0
    assert float(jnp.abs(gradient).max()) > 0.1
    (_, second), stopped = minibatch(logits - 4.0 * gradient)
    # Right tokens are more likely by more than 28%, wrong ones less likely by more than 22%.
    assert float(second["clip_low"]) == float(second["clip_high"]) == 0.5
    np.testing.assert_array_equal(stopped, np.zeros(4))


def test_the_default_settings_let_clipping_act():
    optimizer = Config().optimizer
    assert optimizer.minibatches * optimizer.epochs > 1


@pytest.mark.parametrize("advantage", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_a_ratio_of_exactly_one_is_never_clipped(advantage):
    logprob = jnp.array([-1e-6, -0.3, -7.0, -25.0])

    def loss(logprob, low, high):
        old = jax.lax.stop_gradient(logprob)
        mask = jnp.ones(4, bool)
        return policy_loss(logprob, old, jnp.full(4, advantage), mask, jnp.float32(4), low, high, 10.0)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprob, 0.22, 0.28)
    assert float(value) == -advantage
    assert float(metrics["clip_low"] + metrics["clip_high"] + metrics["clip_dual"]) == 0.0
    # The gradient is that of plain policy gradient.
    np.testing.assert_allclose(gradient, -advantage / 4)


# --- truncation that splits a state's group


def test_a_batch_takes_whole_states_whatever_its_size():
    waiting = groups.concatenate(round_at(0), round_at(B))
    total = groups.count(waiting)
    for size in range(1, total):
        batch, rest = groups.split(waiting, size)
        rows, others = check_rows(laid_out(batch)), check_rows(laid_out(rest))
        assert len(rows) == size * M
        assert {row[:3] for row in rows}.isdisjoint({row[:3] for row in others})
        assert len(set(rows + others)) == total * M


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_minibatches_take_whole_states(parts):
    batch, _ = groups.split(groups.concatenate(round_at(0), round_at(B)), 8)
    cut = groups.minibatches(batch, parts, np.random.default_rng(3))
    found = [check_rows(laid_out(part)) for part in cut]
    assert [len(rows) for rows in found] == [8 // parts * M] * parts
    for rows in found:
        assert sorted(rows) == sorted({(*row[:3], m) for row in rows for m in range(M)})
    assert len({row for rows in found for row in rows}) == 8 * M


def test_steps_train_on_every_accepted_state_once_and_carry_the_surplus():
    """The rows of all updates of three steps, and what is left over, are what was sampled."""
    seen = []

    def update(state, rows, reference):
        seen.append(check_rows(rows))
        return state, {"loss": np.float32(0), "skipped": np.float32(0)}

    run = written_run(optimizer=OptimizerConfig(batch_states=10, minibatches=2, micro_tokens=64))
    run.learner = SimpleNamespace(update=update)
    state, carried, progress = SimpleNamespace(params=None), groups.empty_groups(M, P, S), Progress()
    surplus = []
    for _ in range(3):
        state, carried, progress, *_ = train_step(run, state, carried, progress)
        surplus.append(groups.count(carried))
    assert [len(rows) for rows in seen] == [5 * M] * 6  # two minibatches of five states a step
    trained = [row[:3] for rows in seen for row in rows[::M]]
    left = [tuple(source) for source in carried.source.tolist()]
    sampled = [
        tuple(source)
        for position in range(0, progress.data_position, B)
        for source in round_at(position).source.tolist()
    ]
    assert all(0 < size < 10 for size in surplus[:-1])  # on top of which a round was sampled
    # In the order of sampling: what was carried over goes first.
    for i in range(0, 30, 10):
        assert sorted(trained[i : i + 10]) == sorted(sampled[i : i + 10])
    assert left == sampled[30:]


def test_a_round_that_is_surely_needed_samples_while_verdicts_are_found_and_changes_nothing(monkeypatch):
    """Ahead or not, the same states are trained on in the same order, with the same metrics."""

    def steps():
        seen, order = [], []

        def update(state, rows, reference):
            seen.append(check_rows(rows))
            return state, {"loss": np.float32(0), "skipped": np.float32(0)}

        def sampled(*args):
            order.append("sample")
            return first_return(*args)

        def judged(asked):
            judging = begin(asked)
            return SimpleNamespace(result=lambda: order.append("verdicts") or judging.result())

        run = written_run(optimizer=OptimizerConfig(batch_states=20, minibatches=2, micro_tokens=64))
        run.learner = SimpleNamespace(update=update)
        run.engine.first_return = sampled
        run.verifier.pool.begin = judged
        told = train_step(run, SimpleNamespace(params=None), groups.empty_groups(M, P, S), Progress())
        kept = {name: value for name, value in told[3].items() if not name.startswith("time/")}
        return order, seen, told[1].source.tolist(), kept

    order, *ahead = steps()
    monkeypatch.setattr(Round, "most", property(lambda self: 10**9))  # then no round is surely needed
    waiting, *behind = steps()
    assert waiting == ["sample", "verdicts", "verdicts"] * (len(waiting) // 3)
    # The second round has sampled, and its base trajectories are judged, before the first's last verdicts.
    assert order[:5] == ["sample", "verdicts", "sample", "verdicts", "verdicts"]
    assert sorted(order) == sorted(waiting)
    assert ahead == behind


# --- infinite loss for small batches


def test_the_loss_of_an_empty_or_tiny_batch_is_finite():
    def loss(logprob, mask):
        return policy_loss(
            logprob, jnp.full(3, -1.0), jnp.ones(3), mask, jnp.maximum(mask.sum(), 1), 0.2, 0.3
        )

    for trained in (0, 1):
        mask = jnp.arange(3) < trained
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.full(3, -1.0), mask)
        assert float(value) == -trained
        assert all(np.isfinite(list(map(float, metrics.values()))))
        np.testing.assert_array_equal(gradient, [-trained, 0, 0])


def test_a_round_that_teaches_nothing_has_finite_metrics_and_no_states(monkeypatch):
    """Every rollout is right. The update of an empty batch is in test_update.py."""
    monkeypatch.setitem(globals(), "REWARD", np.ones_like(REWARD))
    found, metrics, excerpt = sample_round(written_run(), 0)
    assert groups.count(found) == 0 and excerpt is None
    assert metrics["states/accepted"] == 0 and metrics["value/mean"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())
    # Joined with the states of other rounds it changes nothing.
    other = round_at(B)
    for ours, theirs in zip(
        jax.tree.leaves(groups.concatenate(found, other)), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


# --- prefixes decoded and tokenized again

PIECES = {"1": 1, "2": 2, "12": 3, "=": 4}
WORDS = {number: piece for piece, number in PIECES.items()}


def encode_greedily(text):
    """A toy tokenizer with a merge, as byte pair encoding has: `12` is one token, never two."""
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(PIECES[piece])
        text = text[len(piece) :]
    return ids


def test_prefixes_go_to_the_learner_as_the_tokens_that_were_sampled():
    """`1` and `2` were sampled one by one; decoded and encoded again they would be one token."""
    query, response, own = [4], [1, 2, 4], [1, 2]
    again = encode_greedily("".join(WORDS[i] for i in response))
    assert again == [3, 4]  # not what was sampled

    def padded(ids, size):
        return np.array([ids + [0] * (size - len(ids))], np.int32)

    token = np.concatenate([padded(own, 6), padded([3], 6)])[None]
    zeros = np.zeros(token.shape, np.float32)
    rollouts = Rollouts(
        token, zeros - 0.5, zeros - 0.5, zeros, np.array([[2, 1]], np.int32), np.ones((1, 2), bool)
    )
    states = one_trajectory(padded(response, 6), [2], [True])
    queries = Queries(padded(query, 2), np.array([1], np.int32), np.array([0], np.int32))
    advantage = np.array([[[0.5, -0.5]]], np.float32)
    found = groups.collect(np.ones((1, 1), bool), queries, states, rollouts, advantage)
    # Between [1] and [2] of the prefix, and between the prefix and its continuation.
    rows = [(token[:length].tolist(), start) for token, length, start, *_ in whole_rows(laid_out(found))]
    assert sorted(rows) == [([4, 1, 2, 1, 2], 3), ([4, 1, 2, 3], 3)]
    whole = whole_answer(states, rollouts, 0, 0, 0)
    assert whole.tolist() == [1, 2, 1, 2]
