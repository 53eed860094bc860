"""Rounds that do not wait for their last rollouts: the same queries, states and credit, only later."""

import dataclasses

import jax
import numpy as np
import pytest
from support import restored
from test_step import small_parts

from fr3e_jax.config import rows_of_state
from fr3e_jax.learner import groups
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step import batch
from fr3e_jax.step.continued import continue_round, real_roots
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.sources import source_metrics
from fr3e_jax.step.update import train_step
from fr3e_jax.types import Problem, Rollouts

EARLY, ROUNDS = "--rollout.wait_for=0.6", 2
USUAL = ["--explore.adaptive=true", "--credit.estimator=edge"]  # of all tests, so that little is compiled
ROUNDS_OF = [
    USUAL,
    pytest.param(["--explore.rule=mutual_information", "--explore.temperature=1.5"], marks=pytest.mark.slow),
    pytest.param(
        ["--explore.rule=random", "--rollout.stop=['7']", "--reward.cut=masked"], marks=pytest.mark.slow
    ),
    pytest.param(["--algorithm=grpo++"], marks=pytest.mark.slow),
]
FOUND = ("token", "logprob", "sampled_logprob", "entropy", "length", "advantage")


def by_source(found):
    """(query, trajectory, state) -> arrays of an accepted state; it is there once."""
    named = [(tuple(source), n) for n, source in enumerate(found.source.tolist())]
    assert len(dict(named)) == len(named)
    return {source: {name: getattr(found, name)[n] for name in FOUND} for source, n in named}


@pytest.mark.parametrize("options", ROUNDS_OF, ids=lambda options: options[0][2:])
def test_nothing_is_lost_or_changed_by_not_waiting(options):
    """With parameters that stay: rollouts of all lengths, the states of all questions, and their credit.

    And what is recorded of the positions. The rollouts are as many, so that any distribution is the same.
    """
    config, parts = small_parts(*options, EARLY)
    params = parts.policy.sampling_params(parts.policy.fresh_state(parts.learner).params)
    count, watch = config.rollout.queries, Stopwatch()
    rounds = [open_round(config, parts, params, 1, count * n, watch, recorded=True) for n in range(ROUNDS)]
    waited = [close_round(config, parts, opened, watch) for opened in rounds]
    unfinished, found, position, later, asked, late_rounds = None, [], 0, 0, [], []
    for number in range(20):
        begun = count if number < ROUNDS else 0
        before = 0 if unfinished is None else unfinished.in_the_middle
        given = params, 1, position, watch, None, True, begun, unfinished
        unfinished, opened, costs, position = continue_round(config, parts, *given)
        assert costs["explore"]["tokens/generated"] > 0
        later += before
        if opened is not None:
            asked += opened.queries.index.tolist()
            late_rounds.append(opened)
            found.append(close_round(config, parts, opened, watch))
        if unfinished is None and number >= ROUNDS:
            break
    parts.verifier.pool.close()
    assert unfinished is None and later > 0
    assert sorted(asked) == list(range(count * ROUNDS))
    ours, theirs = by_source(joined(found)), by_source(joined(waited))
    assert ours.keys() == theirs.keys() and len(theirs) > 5
    for source, its in theirs.items():
        for name, x in its.items():
            np.testing.assert_allclose(ours[source][name], x, atol=2e-5, err_msg=f"{source} {name}")
    (statistic, notes), (expected, wanted) = recorded(late_rounds), recorded(rounds)
    assert statistic.keys() == expected.keys() and notes == wanted
    for index, values in expected.items():
        np.testing.assert_allclose(statistic[index], values, atol=1e-4)
    rates = [
        np.concatenate([one[3] for one in rounds])[np.argsort(order)]
        for rounds, order in ((found, asked), (waited, list(range(count * ROUNDS))))
    ]
    np.testing.assert_allclose(*rates)


def test_queries_that_are_padding_belong_to_no_source():
    """Three queries of two sources, whose rows are padded to four."""
    problems = [Problem("q", "a", "exact", source) for source in ("first", "second", "first")]
    nothing, length = np.zeros((4, 2, 3), np.float32), np.ones((4, 2), np.int32)
    answers = Rollouts(nothing.astype(np.int32), nothing, nothing, nothing, length, length > 0)
    states = real_roots(answers, np.array([True, True, True, False]))
    told = source_metrics(problems, states.valid & np.array([[1], [0], [1], [1]], bool), states.query)
    assert told == {
        "sources/asked/first": 2,
        "sources/asked/second": 1,
        "sources/accepted/first": 2,
        "sources/accepted/second": 0,
    }


def joined(rounds):
    """The accepted states of rounds."""
    return jax.tree.map(lambda *x: np.concatenate(x), *(one[0] for one in rounds))


def recorded(rounds):
    """What the rule gave the positions of each (query, trajectory), and how many verdicts have a note."""
    found, notes = {}, 0
    for opened in rounds:
        states, kept = opened.states, opened.for_record
        notes += len(kept.base_notes) + len(kept.notes)
        for n in np.flatnonzero(states.valid.any(axis=1)) if kept.statistic is not None else []:
            index = int(opened.queries.index[states.query[n]]), int(states.base[n])
            found[index] = kept.statistic[n]
    return found, notes


def judged_queries(monkeypatch):
    """The places in the stream of the queries that are judged from now on, in a list that grows."""
    judged = []

    def noting(config, parts, opened, *rest):
        judged.extend(opened.queries.index.tolist())
        return close_round(config, parts, opened, *rest)

    monkeypatch.setattr(batch, "close_round", noting)
    return judged


class Steps:
    """Steps of a small run, one after the other."""

    def __init__(self, *options):
        self.config, self.parts = small_parts(EARLY, *options)
        self.fresh = self.parts.policy.fresh_state(self.parts.learner)

    def begin(self):
        rollout = self.config.rollout
        carried = groups.empty_groups(rows_of_state(self.config), rollout.max_prompt, rollout.max_response)
        return jax.tree.map(lambda x: x.copy(), self.fresh), carried, Progress(seed=self.config.seed)

    def step(self, state, carried, progress):
        """The state, what is carried and progress after a step, and its metrics."""
        given = self.config, self.parts, None, state, carried, progress, StepProgress(lambda line: None)
        *after, metrics, _ = train_step(*given)
        return after, {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}


@pytest.fixture(scope="module")
def steps():
    made = Steps(*USUAL)
    yield made
    made.parts.verifier.pool.close()


def test_a_run_that_does_not_wait_goes_on_from_its_checkpoint_bit_for_bit(steps, tmp_path, monkeypatch):
    """And of all questions that it asked, each is judged once, or goes on."""
    judged = judged_queries(monkeypatch)
    now, told = steps.begin(), []
    for number in range(4):
        now, metrics = steps.step(*now)
        told.append(metrics)
        if number == 1:
            writer = Checkpoints(tmp_path, keep=1)
            writer.save(*now)
            writer.close()
            assert now[2].unfinished.count > 0 and now[2].unfinished.in_the_middle > 0
    left = now[2].unfinished
    goes_on = [] if left is None else left.queries.index.tolist()
    assert sorted(judged + goes_on) == list(range(now[2].data_position))
    again = list(restored(tmp_path, 2, steps.begin()[0]))
    assert again[2].unfinished.count == told[1]["queries/unfinished"]
    for metrics in told[2:]:
        again, resumed = steps.step(*again)
        assert resumed == metrics
    jax.tree.map(np.testing.assert_array_equal, now[0].params, again[0].params)
    assert max(metrics.get("tokens/staleness", 0) for metrics in told) > 0


@pytest.mark.slow
def test_what_is_unfinished_is_completed_where_a_run_goes_on_waiting(steps, monkeypatch):
    """With rollout.wait_for back at 1: first what was begun, then whole rounds as ever; each query once."""
    judged = judged_queries(monkeypatch)
    (*now, progress), _ = steps.step(*steps.begin())
    assert progress.unfinished is not None
    rollout = dataclasses.replace(steps.config.rollout, wait_for=1.0)
    waiting = Steps.__new__(Steps)
    waiting.config, waiting.parts = dataclasses.replace(steps.config, rollout=rollout), steps.parts
    for _ in range(8):
        (*now, progress), metrics = waiting.step(*now, progress)
        assert "queries/unfinished" not in metrics
        if progress.unfinished is None:
            break
    assert progress.unfinished is None
    assert sorted(judged) == list(range(progress.data_position))
