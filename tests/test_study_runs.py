"""Studies: what is made of their runs, when a run ends, and the whole command by real training."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from environment import REPOSITORY
from rich.console import Console
from support import SMALL, call, run
from support import command as start_of

from fr3e_jax.config import EndConfig
from fr3e_jax.run.ending import reason_to_end
from fr3e_jax.run.reporter import read_metrics
from fr3e_jax.run.saved import Progress
from fr3e_jax.study.analysis import analyse
from fr3e_jax.study.results import RunResult, StudyHeader, header_of, read_results
from fr3e_jax.study.runner import usable_cpus
from fr3e_jax.study.scores import budget_of, chosen_rates
from fr3e_jax.study.settings import read_study
from fr3e_jax.study.verify import as_many_cpus

# --- numbers


def made(arm, seed, accuracy, tokens, decided=False, sweep=False, rate=1e-5, status="complete"):
    curve = {name: list(tokens) for name in ("step", "tokens", "flops", "seconds")}
    curve["accuracy"] = list(accuracy)
    ends = (accuracy or [None])[-1]
    return RunResult(
        *("s", "t", arm, seed, rate, sweep, "hash", "", status, "", decided, curve, {}, ends, None)
    )


def test_runs_are_compared_at_the_most_that_each_of_them_tells_of():
    decided = made("a", 0, [0.1, 1.0], [0, 50], decided=True)
    slow, fast = made("b", 0, [0.1, 0.5], [0, 200]), made("b", 1, [0.1, 0.6], [0, 100])
    assert budget_of([decided, slow, fast], "tokens") == 100
    assert budget_of([decided, made("a", 1, [0, 1], [0, 70], decided=True)], "tokens") == 70
    failed = made("b", 2, [0.1, 0.2], [0, 10], status="failed")
    assert budget_of([decided, slow, failed], "tokens") == 200  # it would end all others' curves


HEADER = StudyHeader(
    *("s", "?", "", "a", ["t"], ["a", "b", "c"], [0, 1, 2], [1e-5, 2e-5], [7], 0.9, "area", [], {})
)


def test_an_arm_takes_the_rate_with_the_largest_area_and_of_equal_ones_the_smallest():
    swept = [
        made("a", 7, [0, 0.5], [0, 100], sweep=True, rate=1e-5),
        made("a", 7, [0, 0.9], [0, 100], sweep=True, rate=2e-5),
        made("b", 7, [0, 0.5], [0, 100], sweep=True, rate=2e-5),
        made("b", 7, [0, 0.5], [0, 100], sweep=True, rate=1e-5),
        made("c", 7, [0, 0.5], [0, 100], sweep=True, rate=1e-5),
    ]
    assert chosen_rates(HEADER, swept) == {"a": 2e-5, "b": 1e-5}  # that of c is not complete
    failed = made("c", 7, [], [], sweep=True, rate=2e-5, status="failed")
    assert chosen_rates(HEADER, [*swept, failed])["c"] == 1e-5


def test_an_analysis_of_made_up_runs_gives_what_is_worked_out_by_hand():
    runs = [made("a", seed, [0.0, 0.5 + 0.1 * seed], [0, 100]) for seed in range(3)]
    runs += [made("b", seed, [0.0, 0.6 + 0.1 * seed], [0, 200]) for seed in range(3)]
    found = analyse(HEADER, runs)
    assert found.budgets["tokens"] == {"t": 100} and found.seeds() == "3 seeds"
    [a, b] = found.arms
    assert a.scores["accuracy", "tokens"].value == pytest.approx(0.6)
    assert b.scores["accuracy", "tokens"].value == pytest.approx(0.35)  # half way to 0.7
    assert a.scores["area", "tokens"].value == pytest.approx(0.3)
    [at_tokens, at_flops] = found.comparisons
    assert (at_tokens.arm, at_tokens.cost, at_flops.cost) == ("b", "tokens", "flops")
    assert at_tokens.improvement.value == 0.0
    by_hand = np.mean([(0.6 + 0.1 * seed) / 4 - (0.5 + 0.1 * seed) / 2 for seed in range(3)])
    assert at_tokens.difference.estimate.value == pytest.approx(by_hand)
    assert at_tokens.difference.p == 0.25 and at_tokens.corrected == 0.5  # 2 of 2^3 signs, 2 comparisons
    assert [one.reached for one in found.tasks] == [0, 0]


# --- when a run ends


def test_a_run_ends_when_an_accuracy_is_reached_in_a_row_or_a_budget_is_spent():
    progress = Progress(step=4, tokens_generated=1000, flops=5e9)
    once, twice = {0: 0.3, 2: 0.95, 4: 0.8}, {0: 0.3, 4: 0.95, 2: 0.9}
    assert reason_to_end(EndConfig(), twice, progress) == ""
    assert reason_to_end(EndConfig(accuracy=0.9), once, progress) == ""
    assert reason_to_end(EndConfig(accuracy=0.9), {0: 0.95}, progress) == ""  # one evaluation is not two
    assert "end.accuracy 0.9 is reached in 2" in reason_to_end(EndConfig(accuracy=0.9), twice, progress)
    assert reason_to_end(EndConfig(accuracy=0.9, evaluations=3), twice, progress) == ""
    assert reason_to_end(EndConfig(tokens=1001, flops=5.1e9), once, progress) == ""
    assert reason_to_end(EndConfig(tokens=1000), once, progress) == "end.tokens 1,000 are spent"
    assert reason_to_end(EndConfig(flops=5e9), once, progress) == "end.flops 5e+09 are spent"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_repeated_run_gets_as_many_cpus_as_its_line_names(capsys):
    """XLA orders its sums by their number."""
    console, before = Console(width=200), os.sched_getaffinity(0)
    for cpus in (1, None, len(before)):
        with as_many_cpus(cpus, console):
            assert usable_cpus() == (cpus or len(before))
            seen = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
            assert int(subprocess.check_output(seen)) == usable_cpus()  # what is started inherits it
        assert os.sched_getaffinity(0) == before
    assert not capsys.readouterr().out
    with as_many_cpus(len(before) + 1, console):
        assert usable_cpus() == len(before)
    assert f"it had {len(before) + 1} CPUs" in capsys.readouterr().out


FEW = """
settings:
  steps: 2
  data: {held_out: 32}
  rollout: {queries: 8}
  explore: {positions: 2, rollouts: 4}
  optimizer: {batch_states: 8}
  evaluate: {rows: 32}
"""


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_draws_the_same_report_again_and_is_verified(tmp_path):
    """The shipped one with two small steps, by the real train command."""
    out, study = tmp_path / "out", tmp_path / "short.yaml"
    shipped = REPOSITORY / "configs" / "studies" / "quickstart.yaml"
    study.write_text(f"base: {shipped}\n{FEW}")
    with subprocess.Popen(**start_of("study", study, "--out", out)) as killed:
        deadline = time.monotonic() + 300
        while not list(out.glob("runs/*/*/*/*/checkpoints/*")) and time.monotonic() < deadline:
            time.sleep(0.5)
            assert killed.poll() is None, killed.stderr.read()
        killed.kill()  # its training run goes on, and has the run directory
    done = run("study", study, "--out", out)
    assert done.returncode == 0, done.stderr + done.stdout
    results = read_results([out / "results.jsonl"], print)
    assert all(one.complete for one in results.of("short")) and len(results.runs) == 4
    drawn = {path: path.read_bytes() for path in [out / "report.md", *(out / "figures").iterdir()]}
    assert run("study", "--report", "--out", out).returncode == 0
    assert len(drawn) == 6 and {path: path.read_bytes() for path in drawn} == drawn
    verified = run("study", "--verify", "--out", out)
    assert verified.returncode == 0 and "as in its line" in verified.stdout, verified.stdout


@pytest.mark.slow
def test_a_training_run_ends_when_it_is_decided_and_goes_on_under_another_rule(tmp_path):
    out = tmp_path / "run"
    arguments = [*SMALL, "--end.accuracy=0.01", "--run_dir", out]
    assert "complete after step 2 of 4: end.accuracy 0.01 is reached in 2" in call("train", *arguments).stdout
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    assert "ended before its last step" in call("train", *arguments).stdout
    further = call("train", *arguments, "--end.evaluations=3")
    assert json.loads((out / "summary.json").read_text())["steps"] == 4, further.stdout
    assert [line["step"] for line in read_metrics(out) if "eval/accuracy" in line] == [0, 2, 4]
    spent = call("train", *SMALL, "--end.flops=1e6", "--run_dir", tmp_path / "spent")
    assert "complete after step 1 of 4: end.flops 1e+06 are spent" in spent.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "spent") if "eval/accuracy" in line] == [0, 1]


def test_shipped_studies_are_whole():
    files = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
    assert {path.stem for path in files} > {"base", "quickstart"}
    for path in (path for path in files if path.stem != "base"):
        named = read_study(str(path), path.stem)
        assert len(named.study.arms) > 1 and named.study.expected, Path(path).name


def test_shipped_results_are_of_the_shipped_studies_and_whole():
    """A study that is changed has to be run again, and its results are replaced."""
    results = read_results([REPOSITORY / "fr3e_jax" / "study" / "findings" / "results.jsonl"], pytest.fail)
    assert results.studies
    for name, header in results.studies.items():
        assert header == header_of(read_study(f"configs/studies/{name}.yaml", name)), name
        complete = [run for run in results.of(name) if run.complete]
        runs = len(header.tasks) * len(header.arms)
        assert sum(not run.sweep for run in complete) == runs * len(header.seeds), name
        assert sum(run.sweep for run in complete) == runs * len(header.rates) * len(header.sweep_seeds), name


def test_measurements_of_earlier_settings_are_left_out():
    results = read_results([REPOSITORY / "fr3e_jax" / "study" / "findings" / "results.jsonl"], pytest.fail)
    header = results.studies["rollouts"]
    assert len(results.values_of("rollouts")) == len(header.sizes) * len(header.seeds) * len(header.tasks)
    changed = {at: options | {"explore.min_gap": 2} for at, options in header.settings.items()}
    results.studies["rollouts"] = dataclasses.replace(header, settings=changed)
    assert results.values_of("rollouts") == []
