"""Alarms: each goes off on the history that it is named after, and on no run that learns."""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
from environment import REPOSITORY
from etils import epath
from support import SMALL, call, changed

from fr3e_jax.cli import parse
from fr3e_jax.config import AlarmsConfig, Config, ConfigError, check
from fr3e_jax.config.alarms import AlarmName
from fr3e_jax.run.alarms import ALARM_TABLE, alarm_news, alarm_to_end, alarms_on
from fr3e_jax.run.ending import shared_reason
from fr3e_jax.run.reporter import Reporter, read_metrics, step_line
from fr3e_jax.run.saved import Progress
from fr3e_jax.step.metrics import summarize_step
from fr3e_jax.step.sources import source_metrics
from fr3e_jax.types import Problem

DEFAULT = AlarmsConfig()
HEALTHY = json.loads((REPOSITORY / "tests" / "healthy_runs.json").read_text())


def healthy(name):
    """The lines of a real run, in which `null` stands where a line lacks a metric."""
    columns = HEALTHY[name]
    rows = zip(*columns.values(), strict=True)
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def history(steps=40, evaluate_every=5, **changes):
    """A made-up run that learns, with some metrics changed: name -> a function of the step, from 0 to 1."""
    rng = np.random.default_rng(0)
    usual = {
        "entropy/mean": lambda t: 0.4 - 0.1 * t,
        "reward/base_mean": lambda t: 0.3 + 0.3 * t,
        "response/cut": lambda t: 0.05,
        "response/length": lambda t: 800 + 200 * t,
        "advantage/accepted_mean": lambda t: 1e-9,
        "advantage/accepted_std": lambda t: 0.45,
        "update/abs_log_ratio": lambda t: 0.01,
        "update/grad_norm": lambda t: 0.3 * rng.lognormal(0, 0.5),
        "update/loss": lambda t: 0.005 * rng.standard_normal(),
        "update/skipped": lambda t: 0,
        "states/accepted": lambda t: 32,
        "states/rejected": lambda t: 48,
        "states/all_right": lambda t: 16,
        "states/all_wrong": lambda t: 32,
        "tokens/generated": lambda t: 100_000,
        "reward/timed_out": lambda t: 0,
        "sources/asked/a": lambda t: 8,
        "sources/asked/b": lambda t: 8,
        "sources/accepted/a": lambda t: 20,
        "sources/accepted/b": lambda t: 12,
        "eval/accuracy": lambda t: 0.3 + 0.3 * t + 0.02 * rng.standard_normal(),
    } | changes
    lines = [{"step": 0, "eval/accuracy": 0.3}]
    for step in range(1, steps + 1):
        line = {name: of(step / steps) for name, of in usual.items()}
        if step % evaluate_every:
            del line["eval/accuracy"]
        lines.append({"step": step, **line})
    return lines


def at(*steps, of, value, usual):
    """A metric that has a value at some of 40 steps, and is as usual at others."""
    return {of: lambda t: value if round(40 * t) in steps else usual}


TRIPPED = {
    "entropy": (
        {"entropy/mean": lambda t: 0.4 * 0.02**t},
        "collapsed from 0.234 to 0.0124 nats a token at a reward of 0.57",
    ),
    "no_signal": (
        {
            "states/rejected": lambda t: 968,
            "states/all_wrong": lambda t: 968,
            "states/all_right": lambda t: 0,
        },
        "97% of the states of a step teach nothing (all right 0%, all wrong 97%); "
        "about 968,000 of the last 1,000,000 tokens were drawn for them; questions are too hard",
    ),
    "advantage_mean": ({"advantage/accepted_mean": lambda t: -0.1}, "mean advantage is -0.1, away from 0"),
    "advantage_spread": (
        {"advantage/accepted_std": lambda t: 0.45 * 0.05**t},
        "shrunk from 0.298 to 0.0315",
    ),
    "cut": (
        {"response/cut": lambda t: 0.5 * t, "response/length": lambda t: 800 + 2000 * t},
        "44% of the answers reach rollout.max_response without an end (7% at first; the mean length went "
        "from 1075 to 2575 tokens); answers grow longer",
    ),
    "mismatch": ({"update/abs_log_ratio": lambda t: 0.15}, "mean absolute log-ratio of a token is 0.15 nats"),
    "spike": (
        at(33, 38, of="update/grad_norm", value=40.0, usual=0.3),
        "step 33: gradient norm 40 (0.3); step 38: gradient norm 40 (0.3)",
    ),
    "timeouts": ({"reward/timed_out": lambda t: 20}, "on 200 answers to 800 states"),
    "source": (
        {"sources/accepted/b": lambda t: 1, "sources/accepted/a": lambda t: 31},
        "97% of the states that are trained on are of the source a, and 50% of the questions",
    ),
    "held_out": (
        {"eval/accuracy": lambda t: 0.3 + 0.4 * t if t < 0.6 else 0.9 - 0.6 * t},
        "fell from 49.2% (evaluations of steps 15 to 25) to 37.5% while the reward rose",
    ),
}


def test_every_alarm_has_a_threshold_of_its_name_and_a_history_that_trips_it():
    thresholds = {field.name for field in dataclasses.fields(AlarmsConfig)} - {"window", "stop"}
    assert list(ALARM_TABLE) == list(TRIPPED) == list(get_args(AlarmName)) and set(ALARM_TABLE) == thresholds


def test_a_made_up_run_that_learns_trips_none():
    lines = history(120)
    assert all(alarms_on(DEFAULT, lines[:n]) == {} for n in range(len(lines) + 1))


@pytest.mark.parametrize("name", TRIPPED)
def test_an_alarm_goes_off_on_the_history_that_it_is_named_after_and_no_other_does(name):
    changes, sentence = TRIPPED[name]
    lines = history(**changes)
    on = alarms_on(DEFAULT, lines)
    assert list(on) == [name] and sentence in on[name]
    # As a run that was killed reads it again; and where it is off.
    assert alarms_on(DEFAULT, json.loads(json.dumps(lines))) == on
    assert alarms_on(dataclasses.replace(DEFAULT, **{name: None}), lines) == {}
    # From a tenth of the history there is nothing to say yet.
    assert alarms_on(DEFAULT, lines[:5]) == {}


@pytest.mark.parametrize("run", HEALTHY)
def test_no_alarm_goes_off_in_a_run_that_learned(run):
    """Runs of small tasks with steps of 32 or 64 states, up to every one of their steps.

    The quickstart with 28 steps; and carries_6 with grpo and carries_10 with fr3e at the rate that learned
    best, from 3% to 95% and from 0.4% to 50%: the latter begins where 99% of the states are all wrong.
    """
    lines = healthy(run)
    assert len(lines) > 25
    assert {n: on for n in range(len(lines)) if (on := alarms_on(DEFAULT, lines[: n + 1]))} == {}


QUIET = {
    "an entropy that falls as far as the wrong answers": {
        "entropy/mean": lambda t: 0.4 * 0.02**t,
        "reward/base_mean": lambda t: 1 - 0.7 * 0.02**t,
    },
    "answers that learn their form, and still differ": {"entropy/mean": lambda t: 3 * 0.04**t},
    "some steps that sample much and find little": {
        "states/rejected": lambda t: 3168 if round(40 * t) % 10 < 4 else 259  # of 32 more: 99% and 89%
    },
    "one spike, however large": at(35, of="update/grad_norm", value=1e4, usual=0.3),
    "gradients that grow below the norm at which they are clipped": at(
        31, 33, 35, 37, of="update/grad_norm", value=0.9, usual=0.01
    ),
    "losses that are far from a median near 0": at(31, 33, 35, of="update/loss", value=0.2, usual=1e-4),
    "a fall of the reward with that of the accuracy": {
        "eval/accuracy": lambda t: 0.3 + 0.4 * t if t < 0.6 else 0.9 - 0.6 * t,
        "reward/base_mean": lambda t: 0.5 - 0.1 * t,
    },
    "one evaluation that is low": {"eval/accuracy": lambda t: 0.6 if t < 1 else 0.35},
    "evaluations of few questions": {"eval/accuracy": lambda t: 0.5 + (0.2 if round(8 * t) % 2 else -0.2)},
    "a source that is most of the questions": {
        "sources/asked/a": lambda t: 60,
        "sources/asked/b": lambda t: 4,
        "sources/accepted/a": lambda t: 30,
        "sources/accepted/b": lambda t: 2,
    },
    "means of advantages that differ from step to step": {
        "advantage/accepted_mean": lambda t: 0.3 if round(40 * t) % 3 else -0.2
    },
    "partial rewards, from which states without a right answer are trained on": {
        "states/all_wrong": lambda t: 80,
        "states/rejected": lambda t: 10,
    },
}


@pytest.mark.parametrize("case", QUIET)
def test_what_looks_like_an_alarm_and_is_none(case):
    assert alarms_on(DEFAULT, history(**QUIET[case])) == {}


def test_updates_that_are_not_finite_are_spikes_and_so_are_losses_beyond_the_advantages():
    skipped = history(**at(36, 37, of="update/skipped", value=2, usual=0))
    assert "step 36: 2 updates not finite; step 37" in alarms_on(DEFAULT, skipped)["spike"]
    losses = history(**at(33, 38, of="update/loss", value=-3.0, usual=0.001))
    assert "step 33: loss -3 (0.001); step 38: loss -3" in alarms_on(DEFAULT, losses)["spike"]


def test_a_mismatch_that_grows_is_seen_where_the_loss_corrects_it():
    """The ratio in the update is then to the learner's own; that to the sampler's may begin high."""
    high = {"mismatch/outside": lambda t: 0.3}
    assert alarms_on(DEFAULT, history(**high)) == {}
    grows = alarms_on(DEFAULT, history(**{"mismatch/outside": lambda t: 0.3 * t}))
    assert "outside [0.9, 1.1] has grown from 4.1% to 26.6%" in grows["mismatch"]


def test_plain_grpo_wastes_what_it_does_not_reject():
    uniform = {
        "states/rejected": lambda t: 0,
        "states/all_right": lambda t: 30,
        "states/all_wrong": lambda t: 1,
    }
    sentence = alarms_on(DEFAULT, history(**uniform))["no_signal"]
    assert sentence.startswith("97% of the states") and "questions are too easy" in sentence


def test_steps_that_sample_nothing_and_lines_of_earlier_versions_are_passed_over():
    changes, _ = TRIPPED["no_signal"]
    lines = history(steps=20, **changes)
    sampled = [line for line in lines for line in (line, {"step": line["step"], "update/skipped": 0})]
    assert list(alarms_on(DEFAULT, sampled)) == ["no_signal"]
    assert alarms_on(DEFAULT, [{"step": n, "states/accepted": 1} for n in range(60)]) == {}
    assert alarms_on(DEFAULT, []) == alarms_on(DEFAULT, [{"step": 0}]) == {}
    falls = [{"step": n, "eval/accuracy": 1 - n / 20} for n in range(20)]
    assert alarms_on(DEFAULT, falls) == {}  # without rewards nobody knows that they rose


def test_first_and_last_steps_are_compared_once_they_are_apart():
    lines = history(**{"entropy/mean": lambda t: 0.4 if t < 0.17 else 0.001})
    on = [list(alarms_on(DEFAULT, lines[:n])) for n in range(len(lines) + 1)]
    assert on == [[]] * 21 + [["entropy"]] * 21


def test_a_line_says_what_goes_off_and_what_is_over_once():
    on = {"alarms": {"cut": "a", "spike": "b"}}
    assert alarm_news({}, {"step": 1}) == alarm_news(on, on) == []
    assert alarm_news({"alarms": {"cut": "a"}}, on) == ["ALARM spike"]
    assert alarm_news(on, {"alarms": {"cut": "c"}}) == ["alarm over: spike"]
    assert alarm_news({"alarms": {"entropy": ""}}, on) == ["ALARM cut, spike", "alarm over: entropy"]
    assert step_line({"step": 7, **on}, {}) == "step    7 | ALARM cut, spike"


def test_those_of_stop_end_a_run():
    lines = history(**TRIPPED["cut"][0])
    assert alarm_to_end(DEFAULT, lines) == ""
    assert alarm_to_end(AlarmsConfig(stop=["spike"]), lines) == ""
    assert alarm_to_end(AlarmsConfig(stop=["spike", "cut"]), lines) == "the alarm cut (alarms.stop) went off"


def test_a_stop_by_what_is_no_alarm_or_is_off_is_refused(capsys):
    config, _ = parse(Config, "train", "configs/quickstart.yaml", ["--alarms.stop=[cut, spike]"])
    assert config.alarms.stop == ["cut", "spike"]
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(Config, "train", "configs/quickstart.yaml", ["--alarms.stop=[cuts]"])
    assert "alarms.stop is 'cuts', must be a list of these: entropy, no_signal" in capsys.readouterr().err
    off = changed(config, alarms__cut=None)
    with pytest.raises(ConfigError, match=r"^alarms\.stop names cut, and alarms\.cut is null"):
        check(off, row_parts=1, context=2048)


class OneProcess:
    """Stands for the processes of a run that has one."""

    def said(self, text, _):
        return text


def test_alarms_are_written_said_once_and_known_again_by_a_run_that_was_killed(tmp_path, capsys):
    """Killed behind its 37th step, it goes on from the 33rd; what it loses it writes and says again."""
    lines = history(**TRIPPED["mismatch"][0])
    end = changed(Config(), alarms__stop=["mismatch"])

    def report(start, steps):
        ends = []
        with Reporter(epath.Path(tmp_path), 40, start) as reporter:
            for line in lines[start + (start > 0) : steps]:
                before = shared_reason(end, reporter, Progress(), OneProcess(), line)
                reporter.step(line)
                assert before == shared_reason(end, reporter, Progress(), OneProcess())
                ends.append(before)
        return ends, capsys.readouterr().out

    ends, printed = report(0, 38)
    assert ends == [""] * 10 + ["the alarm mismatch (alarms.stop) went off"] * 28
    assert printed.count("ALARM mismatch") == 1 and printed.count("\nalarm mismatch: the policy that is") == 1
    ends, printed = report(33, 41)
    assert set(ends) == {"the alarm mismatch (alarms.stop) went off"} and "alarm" not in printed.lower()
    written = read_metrics(tmp_path)
    sentence = alarms_on(DEFAULT, lines[:11])["mismatch"]
    assert [line.pop("alarms", None) for line in written] == [None] * 10 + [{"mismatch": sentence}] * 31
    assert written == lines


@pytest.mark.slow
def test_a_run_that_an_alarm_ends_is_complete_and_goes_on_without_it(tmp_path):
    """At a threshold that every run passes, and a window of 3 steps."""
    out = tmp_path / "run"
    arguments = [*SMALL, "--run_dir", out, "--alarms.window=3", "--alarms.mismatch=1e-9"]
    reason = "the alarm mismatch (alarms.stop) went off"
    ended = call("train", *arguments, "--alarms.stop=[mismatch]")
    assert ended.returncode == 0 and f"after step 3 of 4: {reason}" in ended.stdout
    assert json.loads((out / "summary.json").read_text())["ended"] == reason
    assert "eval/accuracy" in read_metrics(out)[3] and (out / "checkpoints" / "3").is_dir()
    assert "nothing is left to do" in call("train", *arguments, "--alarms.stop=[mismatch]").stdout
    further = call("train", *arguments)
    assert "resumed from the checkpoint of step 3" in further.stdout and "ALARM" not in further.stdout
    alarms = [sorted(line.get("alarms", {})) for line in read_metrics(out)]
    assert alarms == [[], [], [], ["mismatch"], ["mismatch"]]


def test_queries_and_states_of_sources_are_counted_and_added_up():
    """Two trajectories of query 0, of which three states are trained on, none of query 1, one of query 2."""
    problems = [Problem("q", "a", "exact", source) for source in ("x", "y", "x", "z")]
    accepted = np.array([[True, True, False], [True, False, False], [False, True, False]])
    counts = source_metrics(problems, accepted, np.array([0, 0, 2]))
    asked = {"sources/asked/x": 2, "sources/asked/y": 1, "sources/asked/z": 1}
    states = {"sources/accepted/x": 4, "sources/accepted/y": 0, "sources/accepted/z": 0}
    assert counts == asked | states
    assert summarize_step([counts, counts], [])["sources/accepted/x"] == 8
