"""The stages in a notebook: what README shows, run as it is written, and what is refused."""

import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from environment import REPOSITORY

import fr3e_jax as fr3e
from fr3e_jax.config import ConfigError

QUESTIONS = ["347+285=", "118+904=", "560+439="]


@pytest.fixture(scope="module")
def model():
    return fr3e.Model.load("quickstart")


@pytest.fixture(scope="module")
def base(model):
    return model.engine(max_response=40).first_return(model.encode(QUESTIONS), count=4, seed=1)


def right(question, answer):
    """The last number is the sum."""
    a, b = question.rstrip("=").split("+")
    return answer.rpartition("=")[2] == str(int(a) + int(b))


@pytest.mark.slow
def test_the_stages_from_a_model_to_an_updated_one(model, base):
    states = fr3e.states(base, rule="entropy", count=2)
    assert states.valid.sum() == 3 * 4 * 3  # padding has none
    rollouts = base.engine.explore(base, states, count=8)
    answers = model.texts(states, rollouts)
    reward = fr3e.judge(answers, right)
    advantage, value, _ = fr3e.modulated_advantage(reward, states.valid)
    np.testing.assert_allclose(np.asarray(value)[states.valid], reward.mean(axis=2)[states.valid])
    learner = model.learner(fr3e.LossConfig(), fr3e.OptimizerConfig(learning_rate=1e-6))
    batch = fr3e.groups(states, rollouts, advantage)
    mixed = states.valid & (reward.min(axis=2) < reward.max(axis=2))
    assert len(batch.query) == mixed.sum() > 0
    state, metrics = learner.update(learner.init(), batch)
    assert metrics["abs_log_ratio_max"] < 1e-3 and np.isfinite(metrics["loss"])
    options = fr3e.LossConfig(aggregate="sequence", mismatch="truncate", top_entropy_share=0.5)
    weighing = model.learner(options, fr3e.OptimizerConfig(learning_rate=1e-6))
    _, metrics = weighing.update(weighing.init(), batch)
    assert metrics["mismatch/outside"] == 0 and metrics["left_out"] == pytest.approx(0.5, abs=0.01)
    after = model.updated(state)
    again = after.engine(max_response=40).first_return(after.encode(QUESTIONS), count=4, seed=1)
    assert (again.rollouts.logprob != base.rollouts.logprob).any()
    shown = repr(states.with_values(value))
    assert f"V={float(value[0, 0]):.2f}" in shown and repr(QUESTIONS[0]) in shown
    assert QUESTIONS[0] in repr(base) and "987,264 parameters" in repr(model) and "such as" in repr(answers)


def test_what_the_readme_shows_runs_as_it_is_written(model, monkeypatch):
    """On the model of the other tests, with the programs that are compiled for it."""
    monkeypatch.setattr(fr3e.Model, "load", lambda name: model)
    page = (REPOSITORY / "README.md").read_text()
    shown = re.search(r"## In a notebook\n\n((?:    .*\n|\n)+)", page)[1]
    names = {}
    exec(textwrap.dedent(shown), names)
    assert np.isfinite(names["metrics"]["loss"]) and 0 < names["reward"].mean() < 1


@pytest.fixture(scope="module")
def explored(base):
    """States of the base trajectories, and their partial rollouts."""
    states = fr3e.states(base, rule="uniform", count=2)
    return states, base.engine.explore(base, states, count=8)


def test_segments_of_base_trajectories_are_rows_of_groups(base, explored):
    """They are whole base trajectories together; and what does not count has no tokens."""
    states, rollouts = explored
    shape = (len(states.valid), 3, 8)
    # The first state is worth 1/2, the second 1/4, the third, of which five rollouts count, 1; an answer 0.
    right, drawn = (np.array(numbers)[None, :, None] for numbers in ([4, 2, 8], [8, 8, 5]))
    reward = np.broadcast_to(np.arange(8) < right, shape).astype(np.float32)
    counted = np.broadcast_to(np.arange(8) < drawn, shape)
    credit = {"counted": counted, "base_reward": np.zeros(len(reward), np.float32), "estimator": "edge"}
    advantage, *_ = fr3e.modulated_advantage(reward, states.valid, **credit)
    batch = fr3e.groups(states, rollouts, advantage, counted)
    assert len(batch.length) == states.valid.sum() and batch.length.shape[1] == 9
    assert batch.length[:, 8].sum() == base.rollouts.length[: len(QUESTIONS)].sum()
    last = batch.source[:, 2] == 2  # there for their segments alone
    assert (batch.length[last, :8] == 0).all() and (batch.length[~last] > 0).all()
    np.testing.assert_array_equal(batch.advantage[last, 8], -1)


def test_answers_hold_the_prefixes_that_they_restart_from(model, base, explored):
    states, rollouts = explored
    answers = model.texts(states, rollouts)
    asked = dict(zip(QUESTIONS, base.texts, strict=True))
    for question, prefixes, row in zip(answers.question, states.prefixes, answers.text, strict=True):
        for prefix, texts in zip(prefixes, row, strict=True):
            assert (prefix is None) == (texts is None)
            if texts is not None:
                assert all(text.startswith(prefix) for text in texts)
                assert any(text.startswith(prefix) for text in asked[question])


@pytest.mark.slow
def test_a_cell_that_is_run_again_compiles_nothing_and_gives_the_same(model, base, caplog):
    """Of an engine that was asked for anew, and of base trajectories that were explored before."""

    def cell(max_response):
        engine = model.engine(max_response=max_response)
        found = engine.first_return(model.encode(QUESTIONS), count=4, seed=1)
        states = fr3e.states(found, count=2)
        return found.rollouts, engine.explore(found, states, 8), engine.explore(found, states, 8)

    def compiled(max_response):
        caplog.clear()
        with jax.log_compiles():
            results = cell(max_response)
        return results, [record.message for record in caplog.records if "Compiling" in record.message]

    first, explored, once_more = cell(40)
    (second, *others), programs = compiled(40)
    assert programs == []
    for other in (once_more, *others):
        jax.tree.map(np.testing.assert_array_equal, other, explored)
    jax.tree.map(np.testing.assert_array_equal, second, first)
    assert any("advance" in program for program in compiled(39)[1])  # another limit is other programs


def test_rules_that_need_more_than_sampling_records_measure_it(model, base):
    assert fr3e.states(base, rule="attention", count=2).valid.sum() == 3 * 4 * 3
    steps = fr3e.states(base, rule="sentence", count=2)
    kept = [prefix for row in steps.prefixes for prefix in row[1:] if prefix is not None]
    assert kept and all(prefix.endswith(";") for prefix in kept)
    # Also of base trajectories that were explored before: nothing of them is used up.
    again = base.engine.first_return(base.encoded, count=4, seed=1)
    base.engine.explore(again, fr3e.states(again, rule="uniform", count=2), count=8)
    assert fr3e.states(again, rule="sentence", count=2).prefixes == steps.prefixes
    assert fr3e.states(again, rule="gradient", count=2).valid.sum() == 3 * 4 * 3


def test_kept_trajectories_may_be_chosen_by_reward(base):
    reward = np.zeros((3, 4), np.float32)
    reward[1, 2] = 1.0
    states = fr3e.states(base, count=2, reward=reward, keep_rule="first_of_each")
    kept = states.valid.any(axis=1)
    where = zip(states.arrays.query[kept].tolist(), states.arrays.base[kept].tolist(), strict=True)
    assert sorted(where) == [(0, 0), (1, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda model, base: model.encode("1+1="), "list of questions"),
        (lambda model, base: fr3e.states(base, keep_rule="first_of_each"), r"float32 \[3, 4\]"),
        (lambda model, base: fr3e.states(base, reward=np.zeros((4, 3))), r"\[4, 3\], must be \[3, 4\]"),
        (lambda model, base: fr3e.states(base, count=2).with_values([1.0]), r"value has shape \[1\]"),
        (
            lambda model, base: base.engine.explore(
                base.engine.first_return(base.encoded, 4), fr3e.states(base), 2
            ),
            "other base trajectories",
        ),
    ],
)
def test_mistakes_say_what_should_have_been(model, base, mistake, message):
    with pytest.raises(ConfigError, match=message):
        mistake(model, base)


def test_a_missing_reference_is_told(model, base):
    states = fr3e.states(base, count=2)
    rollouts = base.engine.explore(base, states, count=8)
    batch = fr3e.groups(states, rollouts, np.ones((*states.valid.shape, 8), np.float32))
    learner = model.learner(fr3e.LossConfig(kl_coefficient=0.1))
    with pytest.raises(ConfigError, match="reference"):
        learner.update(learner.init(), batch)


def test_the_package_is_imported_without_jax():
    """And says what it has of a name that it has not."""
    program = (
        "import sys, fr3e_jax; assert 'jax' not in sys.modules; assert 'Model' in dir(fr3e_jax)\n"
        "try: fr3e_jax.Modle\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "no attribute 'Modle'" in done.stdout and "Model" in done.stdout


def test_a_setting_that_cannot_be_is_refused_as_on_the_command_line(model, base):
    with pytest.raises(ConfigError, match=r"^loss.clip_low is 2, must be at least 0 and at most 1$"):
        model.learner(fr3e.LossConfig(clip_low=2))
    with pytest.raises(
        ConfigError, match=r"^optimizer.moments is 'float16', must be one of float32, bfloat16$"
    ):
        model.learner(None, fr3e.OptimizerConfig(moments="float16"))
    with pytest.raises(ConfigError, match=r"^positions is -1, must be at least 0$"):
        fr3e.states(base, count=-1)
