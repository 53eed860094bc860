"""A world that is written instead of sampled, for rounds that run through the program's own code.

Its engine writes: every token id says which query, trajectory, state and rollout it belongs to, so that
anything that is mixed up on the way from `open_round` to the learner's rows is seen.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support import TINY, placement, whole_rows

from fr3e_jax.config import (
    Config,
    CreditConfig,
    ExploreConfig,
    OptimizerConfig,
    RolloutConfig,
)
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import TrainState
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.parallel.hosts import Hosts, gather
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.rewards.verdict import Verdict
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.update import train_step
from fr3e_jax.types import Problem, Queries, Rollouts, States

B, R, K, M, P, S = 3, 4, 2, 4, 4, 12
J = K + 1
QUERIES = 9  # of the written world
ON_MESH = placement(data=3)  # each query of a round lies on a device of its own


# Query q has R base trajectories, of which 0 is right and the others are wrong.

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


def prefix_of(q, b, j):
    """Tokens of a base trajectory that a state keeps."""
    return [base_id(q, b, t) for t in range(PEAKS[q, b][j - 1] if j else 0)]


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


class WrittenEngine(Engine):
    """Writes what a model would sample, where the engine itself leaves it: on the devices of its mesh."""

    def sample(self, params, queries, seed_key, step, count, sampling):
        """Write base trajectories."""
        index = gather(queries.index)
        token = [[[base_id(q, b, t) for t in range(S)] for b in range(count)] for q in index]
        entropy = np.full((len(index), count, S), 0.1, np.float32)
        for i, q in enumerate(index):
            for b in range(count):
                entropy[i, b, PEAKS[q, b]] = 2.0
        entropy[..., 0] = 9.0  # the most uncertain token of all is the first, which is no position
        return self.placed(rollouts_of(token, BASE_LENGTH[index], entropy))

    def arrange(self, kept):
        """Lay trajectories out as the engine does, with as much padding again in each part of the mesh."""
        parts = row_parts(self.placement.mesh)
        query, trajectory, real = (x.reshape(parts, -1) for x in super().arrange(kept))
        doubled = (query, query), (trajectory, 0 * trajectory), (real, np.zeros_like(real))
        return tuple(np.concatenate(both, axis=1).reshape(-1) for both in doubled)

    def explore(self, params, queries, states, *, rollouts, **others):
        """Write continuations that say which state they were started from."""
        queries, states = gather((queries, states))
        n, j_count = states.valid.shape
        token = np.zeros((n, j_count * rollouts, S), np.int32)
        length = np.zeros((n, j_count * rollouts), np.int32)
        for i, j, m in np.ndindex(n, j_count, rollouts):
            if states.valid[i, j]:
                q, b = int(queries.index[states.query[i]]), int(states.base[i])
                assert states.response[i, : states.prefix_length[i, j]].tolist() == prefix_of(q, b, j)
                token[i, j * rollouts + m] = [own_id(q, b, j, m, t) for t in range(S)]
                length[i, j * rollouts + m] = own_length(q, b, j, m)
        return self.placed(rollouts_of(token, length))

    def placed(self, rollouts):
        """Put rollouts on the mesh, and count the rows decoded, had none idled."""
        row_steps = self.placement.place(np.int32(rollouts.token.size))
        return self.placement.place_rows(rollouts), row_steps


def reward_of(response, answer):
    """Base trajectory 0 is right; rollouts score what REWARD says, if prefix and problem are theirs."""
    response = [int(token) for token in response.split()]
    q, b, j, m = where_from(response[-1])
    if response[-1] < 9_000_000:
        q, b, size = response[-1] // 10_000 % 10, response[-1] // 1000 % 10, BASE_LENGTH
        assert response == [base_id(q, b, t) for t in range(size[q, b])]
        reward = float(b == 0)
    else:
        expected = prefix_of(q, b, j)
        expected += [own_id(q, b, j, m, t) for t in range(own_length(q, b, j, m))]
        assert response == expected
        reward = float(REWARD[q, b, j, m])
    assert answer == f"answer {q}"
    return reward


def take(position, count, rates=None):
    index = np.arange(position, position + count, dtype=np.int32)
    token = np.array([[query_id(q, t) for t in range(P)] for q in index], np.int32)
    length = QUERY_LENGTH[index].astype(np.int32)
    token = np.where(np.arange(P) < length[:, None], token, 0)
    problems = [Problem(f"query {q}", f"answer {q}", "written") for q in index]
    return Queries(token, length, index), problems, position + count


def begin(asked):
    """What a pool of workers does, here."""
    verdicts = [Verdict(reward_of(a.response, a.answer) > 0, "") for a in asked]
    return SimpleNamespace(result=lambda: verdicts)


def written_run(**settings):
    """The configuration and the parts of a run on the written world, without a learner.

    Args:
      settings: sections of the configuration.
    """
    sections = {
        "rollout": RolloutConfig(queries=B, base_trajectories=R, max_prompt=P, max_response=S),
        "explore": ExploreConfig(positions=K, rollouts=M),
        "optimizer": OptimizerConfig(batch_states=4, minibatches=2, micro_tokens=64),
        **settings,
    }

    def written(rows, stopped=None):
        return [" ".join(map(str, row)) for row in rows]

    text = SimpleNamespace(decode=written, answers=written, trimmed=lambda rollouts, states=None: rollouts)
    hosts = Hosts(ON_MESH.mesh, 1)
    parts = Parts(
        policy=SimpleNamespace(model=SimpleNamespace(config=TINY), sampling_params=lambda params: params),
        text=text,
        engine=WrittenEngine(graph_of(TINY), ON_MESH, S, end_tokens=()),
        learner=None,
        corpus=SimpleNamespace(tasks=["one"]),
        stream=SimpleNamespace(take=take, difficulty=None),
        verifier=Verifier(text, hosts, SimpleNamespace(begin=begin, timed_out=0)),
    )
    return Config(**sections), parts


def sample_round(config, parts, position):
    watch = Stopwatch()
    return close_round(config, parts, open_round(config, parts, {}, 1, position, watch), watch)


@functools.cache
def round_at(position, credit=None, keep="first_of_each"):
    """The accepted states of one round."""
    run = written_run(
        credit=credit or CreditConfig(), explore=ExploreConfig(positions=K, rollouts=M, keep=keep)
    )
    return sample_round(*run, position)[0]


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
        expected = [query_id(q, t) for t in range(QUERY_LENGTH[q])]
        expected += prefix_of(q, b, j)
        assert start == len(expected)
        expected += [own_id(q, b, j, m, t) for t in range(own_length(q, b, j, m))]
        assert token[:length].tolist() == expected and not token[length:].any()
        np.testing.assert_allclose(logprob[start:length], logprob_of(token[start:length]))
        assert advantage == pytest.approx(expected_advantage(q, b, j)[m], abs=1e-6)
        found.append((q, b, j, m))
    return sorted(found)


def one_step(config, parts, seen, carried, progress, measured=None):
    """A step whose updates change nothing, and add the rows that they are given to `seen`.

    Args:
      measured: metrics that each update gives, beside a loss of 0; `entropy_coefficient` there is a list to
        which the weight of each update is added.
    """
    measured = dict(measured or {})
    weights = measured.pop("entropy_coefficient", [])

    def update(state, rows, reference, entropy_coefficient):
        seen.append(check_rows(rows))
        weights.append(entropy_coefficient)
        return state, {"loss": np.float32(0), "skipped": np.float32(0), **measured}

    parts = dataclasses.replace(parts, learner=SimpleNamespace(update=update, placement=ON_MESH))
    state = TrainState(params={}, optimizer=None)
    return train_step(config, parts, None, state, carried, progress, StepProgress(print))


def one_trajectory(response, prefix_length, valid):
    """States of the first base trajectory of the first query."""
    zero = np.zeros(1, np.int32)
    return States(zero, zero, response, np.array([prefix_length], np.int32), np.array([valid]))
