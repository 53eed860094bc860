"""Remembered success rates: their average, which questions they pass over, and the order of those left."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problem_files import jsonl
from support import SMALL, call, mesh_of, restored
from support import metrics as metrics_of_run

from fr3e_jax.cli import parse
from fr3e_jax.config import QUICKSTART_MODEL, Config, ConfigError, DataConfig, resolve
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.additions import make_addition
from fr3e_jax.problems.corpus import make_corpus
from fr3e_jax.problems.difficulty import (
    Difficulty,
    SuccessRates,
    acceptance,
    retired,
    shares_in_parts,
    sources_at,
    unseen,
    visited,
)
from fr3e_jax.problems.sources import FileTask
from fr3e_jax.problems.stream import QueryStream, difficulty_of
from fr3e_jax.run.build import build
from fr3e_jax.run.build import mesh_of as run_mesh
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.ending import is_last
from fr3e_jax.run.resume import refuse_other_questions
from fr3e_jax.run.saved import DamagedError, Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.measured import Measured, success_rates
from fr3e_jax.step.update import train_step
from fr3e_jax.types import Problem, Rollouts, States


def task(label, count):
    return FileTask([Problem(f"{label}{i}", "1", "exact") for i in range(count)], [])


def rates_of(*shares):
    """Rates of questions, visited once each; None is one that is not."""
    return SuccessRates(
        np.array([share is not None for share in shares], np.int32),
        np.array([share or 0.0 for share in shares], np.float32),
    )


def order(*sizes, weights=None, retire_above=None, sample_by="uniform", seed=3):
    tasks = tuple(task("abc"[i], size) for i, size in enumerate(sizes))
    return Difficulty(tasks, tuple(weights or sizes), seed, retire_above, sample_by)


# --- rates


def test_the_first_visit_sets_a_rate_and_each_later_one_has_half_of_the_weight():
    """0.5; then 3 with visits of 1, 0 and 0.5: 1, 0.5, 0.5; a round whose answers do not count is none."""
    before = unseen(4)
    rates = visited(before, np.array([1, 3, 3, 3, 2]), np.array([0.5, 1.0, 0.0, 0.5, np.nan]))
    assert rates.visits.tolist() == [0, 1, 0, 3] and rates.rate.tolist() == [0, 0.5, 0, 0.5]
    assert visited(rates, np.array([1]), np.array([1.0])).rate.tolist() == [0, 0.75, 0, 0.5]
    assert not before.visits.any() and not before.rate.any()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_a_rate_lies_between_what_it_was_made_of(shares):
    rates = visited(unseen(1), np.zeros(len(shares), int), np.array(shares))
    assert rates.visits[0] == len(shares)
    assert min(shares) - 1e-6 <= rates.rate[0] <= max(shares) + 1e-6


def test_a_question_is_retired_at_its_rate_and_not_before_it_is_asked():
    rates = rates_of(None, 0.0, 0.79, 0.8, 1.0)
    assert retired(rates, 0.8).tolist() == [False, False, False, True, True]
    assert not retired(rates, None).any()
    nine = visited(unseen(1), np.array([0]), np.array([np.float32(9 / 10)]))
    assert retired(nine, 0.9).all()  # whatever the number of bits is that it is held in


def test_questions_near_even_odds_are_preferred_and_none_but_the_retired_is_lost():
    """4 p (1 - p): 0, .75, 1, .36, 0 with a floor of .1."""
    rates = rates_of(0.0, 0.25, 0.5, 0.9, 1.0, None)
    by_rate = acceptance(rates, None, "difficulty")
    np.testing.assert_allclose(by_rate, [0.1, 0.75, 1, 0.36, 0.1, 1], rtol=1e-6)
    np.testing.assert_allclose(acceptance(rates, 0.9, "difficulty"), [0.1, 0.75, 1, 0, 0, 1], rtol=1e-6)
    assert acceptance(rates, 0.9, "uniform").tolist() == [1, 1, 1, 0, 0, 1]
    # Of what is left the likeliest is always taken, so that a hopeless rest is not looked through in vain.
    assert acceptance(rates_of(0.0, 1.0), 1.0, "difficulty").tolist() == [1, 0]


def test_the_share_of_right_answers_is_that_of_the_bare_query():
    """Query 0: base 1, 0 and root rollouts 1, 1: 3/4. Query 1, not kept: 0 of 2. S_1 is not read."""
    reward = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    valid = np.array([[True, True], [False, False]])
    nothing = np.zeros((2, 3), np.int32)
    states = States(np.zeros(2, np.int32), np.zeros(2, np.int32), nothing, nothing[:, :2], valid)
    empty = np.zeros((2, 4, 3), np.float32)
    rollouts = Rollouts(
        empty.astype(np.int32), empty, empty, empty, np.ones((2, 4), np.int32), np.ones((2, 4), bool)
    )
    base_reward = np.array([[1, 0.6], [0.2, 0.0]], np.float32)
    rest = (reward.mean(axis=2), valid[..., None] * reward, np.ones((2, 2), np.float32), valid)
    value, advantage, alpha, accepted = rest
    measured = Measured(
        rollouts, base_reward, states, rollouts, reward, value, alpha, advantage, accepted, True
    )
    assert success_rates(measured).tolist() == [0.75, 0.0]
    assert success_rates(dataclasses.replace(measured, success_at=0.5)).tolist() == [1.0, 0.0]
    # Of those that count, the second base trajectory and a root rollout of query 0 are none.
    some = dataclasses.replace(
        measured,
        counted=np.array([[[True, False], [True, True]], [[True, True]] * 2]),
        base_counted=np.array([[True, False], [False, False]]),
    )
    np.testing.assert_array_equal(success_rates(some), [1.0, np.nan])
    # Without restarts the rollouts are the base trajectories, and count once.
    assert success_rates(dataclasses.replace(measured, restarts=False)).tolist() == [0.5, 0.0]


# --- the order


def test_every_epoch_asks_each_question_once_in_a_new_order():
    uniform = order(50)
    positions, following = uniform.positions(0, 150, unseen(50))
    assert positions.tolist() == list(range(150)) and following == 150
    epochs = uniform.numbers(positions).reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert order(50, seed=4).numbers(positions).tolist() != epochs.reshape(-1).tolist()


@pytest.mark.parametrize("weights", [[40_315, 8_523], [0.1, 0.9, 0.5], [1e-3, 2e-3, 1]])
def test_sources_have_their_shares_everywhere_and_each_goes_through_all_of_its_questions(weights):
    for start in (0, 10_007, 2**30):
        source, occurrence = sources_at(np.arange(start, start + 10_000), shares_in_parts(weights))
        for i, weight in enumerate(weights):
            mine = occurrence[source == i]
            assert np.diff(mine).tolist() == [1] * (len(mine) - 1)
            assert len(mine) == pytest.approx(10_000 * weight / sum(weights), abs=len(weights) + 0.1)
            if not start and len(mine):
                assert mine[0] == 0


def test_what_is_retired_comes_no_more_and_the_order_of_the_others_stays():
    some = order(30, 20, weights=[1, 1], retire_above=0.9)
    rates = rates_of(*[1.0, 0.5, None] * 16, 0.95, 0.1)
    positions, following = some.positions(7, 60, rates)
    asked = some.numbers(positions)
    gone = retired(rates, 0.9)
    every = some.numbers(np.arange(7, following))
    assert asked.tolist() == [number for number in every.tolist() if not gone[number]]
    assert some.left(rates) == 50 - gone.sum() == 33
    assert [some.problem(n).question for n in (0, 29, 30, 49)] == ["a0", "a29", "b0", "b19"]


@given(st.integers(0, 9000), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_however_it_is_cut_the_stream_is_the_same(start, counts):
    """A function of seed, position and rates: a run that goes on from a position asks what it would have."""
    by_rate = order(700, retire_above=0.9, sample_by="difficulty")
    rates = rates_of(*([0.0, 0.3, 0.5, 1.0, None] * 140))
    whole, end = by_rate.positions(start, sum(counts), rates)
    again, position = order(700, retire_above=0.9, sample_by="difficulty"), start
    parts = []
    for count in counts:
        part, position = again.positions(position, count, rates)
        parts += part.tolist()
    assert parts == whole.tolist() and position == end
    assert len(set(parts)) == sum(counts)  # a position, from which randomness is made, comes once


def test_questions_come_in_proportion_to_their_weight():
    by_rate = order(600, sample_by="difficulty")
    rates = rates_of(*([0.0] * 200 + [0.9] * 200 + [0.5] * 200))
    positions, _ = by_rate.positions(0, 40_000, rates)
    share = np.bincount(by_rate.numbers(positions) // 200) / 40_000
    np.testing.assert_allclose(share, np.array([0.1, 0.36, 1]) / 1.46, atol=0.01)


def test_a_hundred_thousand_questions_of_which_few_are_left_cost_no_second():
    large = Difficulty((range(100_000),), (1.0,), 3, 0.5, "uniform")
    gone = np.arange(100_000) < 99_968
    few = SuccessRates(gone.astype(np.int32), gone.astype(np.float32))
    began = time.perf_counter()
    positions, _ = large.positions(0, 32, few)
    assert time.perf_counter() - began < 1.0
    assert (large.numbers(positions) >= 99_968).all()


# --- what is refused


def small_corpus(tmp_path, count, **settings):
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(count)]
    data = DataConfig(source=jsonl(tmp_path, *rows), held_out=1, **settings)
    text = load_text(QUICKSTART_MODEL, "plain")
    return data, make_corpus(data, 0, text, 8), text


def test_what_cannot_be_remembered_is_refused_in_one_line(tmp_path, monkeypatch):
    data, corpus, text = small_corpus(tmp_path, 20, retire_above=0.9)
    assert difficulty_of(corpus, DataConfig(), 0, 8) is None
    assert difficulty_of(corpus, data, 0, 8).questions == 19
    with pytest.raises(ConfigError, match=r"19 questions, fewer than rollout\.queries 32"):
        difficulty_of(corpus, data, 0, 32)
    made = DataConfig(sample_by="difficulty")
    with pytest.raises(ConfigError, match=r"data\.sample_by difficulty .* carry_addition makes new ones"):
        difficulty_of(make_corpus(made, 0, text, 8), made, 0, 8)
    monkeypatch.setattr("fr3e_jax.problems.stream.MOST_QUESTIONS", 10)
    with pytest.raises(ConfigError, match=r"remembers up to 10 questions, and data\.source has 19"):
        difficulty_of(corpus, data, 0, 8)


def test_queries_have_the_positions_that_they_were_found_at(tmp_path):
    data, corpus, text = small_corpus(tmp_path, 40, retire_above=0.9)
    passing = difficulty_of(corpus, data, 5, 8)
    stream = QueryStream(corpus.stream(5), text, 8, Hosts(mesh_of(), 1), passing)
    rates = visited(unseen(39), np.arange(0, 39, 2), np.ones(20))
    queries, problems, following = stream.take(10, 8, rates)
    assert queries.index.dtype == np.int32 and following == queries.index[-1] + 1 > 18
    odd = {passing.problem(number).question for number in range(1, 39, 2)}
    assert {problem.question for problem in problems} <= odd
    for token, length, problem in zip(queries.token, queries.length, problems, strict=True):
        assert token[:length].tolist() == text.query(problem.question)


# --- a run


def added(count=60):
    """Sums of the quickstart as questions that come again."""
    made = make_addition("carry_addition", DataConfig())
    return FileTask([made[i] for i in range(count)], [])


@pytest.fixture(scope="module")
def small():
    """Configuration and parts of a small run with an adapted bonus, whose questions are remembered."""
    options = ["--data.retire_above=0.9", "--data.sample_by=difficulty"]
    others = [
        *("--loss.entropy_target=5", "--loss.entropy_coefficient=1e-3", "--loss.entropy_step=1e-3"),
        *("--reward.cut=shaped", "--reward.cut_slope=0.1", "--reward.success_at=0.4"),
    ]
    config = resolve(parse(Config, "train", "configs/quickstart.yaml", [*SMALL, *others])[0])
    parts = build(config, Hosts(run_mesh(config.mesh), timeout=60))
    config = resolve(parse(Config, "train", "configs/quickstart.yaml", [*SMALL, *options, *others])[0])
    passing = Difficulty((added(),), (1.0,), config.seed, 0.9, "difficulty")
    yield config, dataclasses.replace(parts, stream=dataclasses.replace(parts.stream, difficulty=passing))
    parts.verifier.pool.close()


def next_step(config, parts, state, carried, progress):
    """(Progress, metrics without times and memory) of a step, which uses the state up."""
    shown = StepProgress(print)
    _, _, progress, metrics, _ = train_step(config, parts, None, state, carried, progress, shown)
    return progress, {name: x for name, x in metrics.items() if not name.startswith(("time/", "memory/"))}


@pytest.mark.slow
def test_a_run_that_is_killed_between_steps_asks_what_it_would_have_asked(small, tmp_path):
    """From a checkpoint of a step after which 40 questions are known, 20 of them solved."""
    config, parts = small
    state = parts.policy.fresh_state(parts.learner)
    rates = visited(unseen(60), np.arange(40), np.arange(40) % 2)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    carried, progress = groups.empty_groups(*sizes), Progress(step=1, data_position=13, rates=rates)
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(state, carried, progress)
    writer.close()
    whole, metrics = next_step(config, parts, state, carried, progress)

    blank = parts.policy.fresh_state(parts.learner)
    again, carried, found = restored(tmp_path, 1, blank)
    assert found == progress and found.rates.rate.dtype == np.float32
    resumed, repeated = next_step(config, parts, again, carried, found)
    for name in ("visits", "rate"):
        assert getattr(resumed.rates, name).tobytes() == getattr(whole.rates, name).tobytes()
    assert resumed == whole and whole.data_position > 13 + 8 * metrics["rounds"]  # some were passed over
    assert metrics == repeated
    new = whole.rates.visits - rates.visits
    assert new.sum() == 8 * metrics["rounds"] and not new[rates.rate == 1].any()
    assert metrics["update/entropy_coefficient"] == 1e-3 and whole.entropy_coefficient == 2e-3
    assert 0 < metrics["update/entropy"] < 5
    assert metrics["questions/asked"] == (whole.rates.visits > 0).sum()
    assert metrics["questions/retired"] >= 20 and 0 < metrics["questions/rate"] < 1


def test_rates_of_other_questions_are_damage(tmp_path):
    refuse_other_questions(None, None)
    refuse_other_questions(vars(unseen(3)), unseen(3))
    for found, fresh in ((None, unseen(3)), (vars(unseen(3)), None), (vars(unseen(4)), unseen(3))):
        with pytest.raises(DamagedError, match="not those of the run's questions"):
            refuse_other_questions(found, fresh)


def test_a_run_is_complete_when_less_than_a_round_is_left(small):
    config, parts = small
    solved = visited(unseen(60), np.arange(52), np.ones(52))
    assert not is_last(config, parts, Progress(step=1, rates=solved))  # 8 are left, a round
    fewer = visited(solved, np.array([59]), np.ones(1))
    assert is_last(config, parts, Progress(step=1, rates=fewer))
    assert is_last(config, parts, Progress(step=4, rates=solved))


@pytest.mark.slow
def test_a_run_whose_questions_are_solved_is_complete_and_says_so(tmp_path):
    """Twelve sums, each of which is solved with one right answer of a few; a run that is started again."""
    sums = make_addition("carry_addition", DataConfig())
    rows = [
        {"question": sums[i].question, "answer": sums.solution(sums[i], np.random.default_rng(0))}
        for i in range(14)
    ]
    flags = [
        *SMALL,
        *("--data.source", jsonl(tmp_path, *rows), "--data.source.scorer=exact", "--data.held_out=2"),
        *("--data.retire_above=0.2", "--data.sample_by=difficulty", "--credit.short_batch=use"),
        *("--steps=9", "--evaluate.every=0", "--checkpoint.every=5", "--run_dir", tmp_path / "run"),
    ]
    done = call("train", *flags)
    assert done.returncode == 0, done.stderr
    lines = metrics_of_run(tmp_path / "run")
    last = lines[-1]
    assert 1 <= last["step"] < 9 and 12 - last["questions/retired"] < 8
    assert all(12 - line["questions/retired"] >= 8 for line in lines[1:-1])
    assert f"the run is complete after step {last['step']} of 9" in done.stdout
    assert "eval/accuracy" in last and (tmp_path / "run" / "model").is_dir()
    again = call("train", *flags)
    assert again.returncode == 0 and f"the run is complete after step {last['step']} of 9" in again.stdout
    assert metrics_of_run(tmp_path / "run") == lines
