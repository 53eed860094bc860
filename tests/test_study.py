"""Studies: the file, the runs that are missing, the results, and what is drawn from them."""

import dataclasses
import json
import random
import re
import shutil

import pytest
from environment import REPOSITORY
from support import call

from fr3e_jax.cli import parse
from fr3e_jax.config import Config
from fr3e_jax.study import command, commits, runner
from fr3e_jax.study.results import read_results
from fr3e_jax.study.runs import own_options, reported_runs, sweep_runs
from fr3e_jax.study.settings import read_study

STUDY = """
question: Which number of rollouts?
settings:
  steps: 3
  optimizer: {minibatches: 1}
tasks:
  easy: {}
  hard: {settings: {data: {max_digits: 4}, rollout: {max_prompt: 10}}}
arms:
  eight: {explore: {rollouts: 8}}
  four: {explore: {rollouts: 4}}
reference: four
seeds: [0, 1]
metrics: [states/accepted]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in for training."""
    monkeypatch.setattr(runner, "TRAIN", (str(REPOSITORY / "tests" / "fake_train.py"),))
    monkeypatch.setattr(runner, "LOOK_AT_PROCESSES", 0.01)
    monkeypatch.setattr(runner, "AGAIN", 0.0)


@pytest.fixture
def drawn_study(stand_in, tmp_path):
    """A function that runs the command on `tmp_path / "out"`."""
    return lambda *arguments: call("study.__main__", *arguments, "--out", tmp_path / "out")


@pytest.fixture
def study(drawn_study, monkeypatch):
    """The same without a report, which takes most of its time."""
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    return drawn_study


@pytest.fixture
def one_task(file):
    """The study on one task alone, four runs."""
    file.write_text(STUDY.replace("  hard:", "  # hard:"))
    return file


def results_in(out):
    return read_results([out / "results.jsonl"], print)


def starts(out):
    """How often each run was started: run -> number."""
    return {file.parent.name: len(file.read_text().split()) for file in out.glob("runs/*/*/*/*/starts")}


# --- the file


def test_an_arm_goes_before_its_task_its_study_and_their_configuration(file):
    named = read_study(str(file), "mine")
    assert list(named.configs) == [(t, a) for t in ("easy", "hard") for a in ("eight", "four")]
    easy, hard = named.configs["easy", "eight"], named.configs["hard", "four"]
    assert (easy.data.max_digits, hard.data.max_digits) == (3, 4)
    assert (easy.explore.rollouts, hard.explore.rollouts) == (8, 4)
    assert easy.steps == 3 and easy.optimizer.minibatches == 1 and easy.optimizer.warmup_updates == 4
    assert named.reference == "four"


def test_settings_become_what_the_command_line_makes_of_them(tmp_path):
    """Lists of sources, numbers that are whole, sections within sections."""
    text = "steps: 3\ndata: {source: [{name: math500, weight: 2, where: {level: [1]}}]}\n"
    text += "optimizer: {max_grad_norm: 2}\nloss: {dual_clip: 10}\nrollout: {stop: [a]}\n"
    (tmp_path / "train.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text(f"config: {tmp_path}/train.yaml\narms: {{one: {{}}}}\n")
    ours = read_study(str(tmp_path / "mine.yaml"), "mine").configs["task", "one"]
    theirs = parse(Config, "train", str(tmp_path / "train.yaml"), [], lambda _: None)[0]
    assert ours == theirs and ours.data.source[0].weight == 2 and type(ours.optimizer.max_grad_norm) is float


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("minibatches: 1", "minibatchs: 1", r"line 5: .*settings.optimizer.minibatches\?"),
        ("rollouts: 8", "rollouts: 1", r"line 10: arms.eight.explore.rollouts is 1, must be at least 2"),
        ("max_digits: 4", "max_digits: four", r"line 8: tasks.hard.settings.data.max_digits is 'four'"),
        ("reference: four", "reference: five", "line 12: reference is 'five'; choose one of eight, four"),
        ("question:", "questoin:", r"line 2: there is no option questoin; did you mean question\?"),
        ("eight:", "a/b:", "line 10: arms has 'a/b', which must be of letters"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "line 13: seeds is .*must be different"),
        (
            "seeds: [0, 1]",
            "sweep: {values: [1e-5], seeds: [3, 4]}",
            "line 13: sweep.seeds has 3, 4, which is",
        ),
        ("seeds: [0, 1]", "sweep: {values: [0]}", r"line 13: sweep.values\[0\] is 0, must be above 0"),
        (
            "{minibatches: 1}",
            "{learning_rate: 1e-5}\nsweep: {values: [1e-5]}",
            "line 5: settings.optimizer.learning_rate is set, and sweep.values too",
        ),
        ("minibatches: 1", "minibatches: 3", "^mine, arm eight on task easy: .*does not divide"),
    ],
)
def test_a_mistake_in_a_study_is_one_line_that_says_where(file, study, old, new, line):
    file.write_text(STUDY.replace(old, new))
    refused = study(file)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("fr3e_jax.study: error: ") and refused.stderr.count("\n") == 1
    message = refused.stderr.removeprefix("fr3e_jax.study: error: ")
    assert re.search(line, message), message
    assert line.startswith("^") or message.startswith(f"{file}, line ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard=5/4"], "shard is '5/4', must be i/n"),
        (["--report", "--verify"], "exclude each other"),
        (["--topology=v5e-1"], "is for --dry_run"),
        (["--report"], "there is no .*results.jsonl"),
        ([], "name a study file"),
    ],
)
def test_options_that_cannot_stand_together_are_refused(study, arguments, message):
    refused = study(*arguments)
    assert refused.returncode == 2 and re.search(message, refused.stderr)


def test_runs_come_seed_by_seed_and_are_told_apart_by_what_changes_them(file):
    named = read_study(str(file), "mine")
    runs = list(reported_runs(named))
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert len({run.settings for run in runs}) == 8
    one = runs[0]
    moved = dataclasses.replace(one, config=dataclasses.replace(one.config, run_dir="x", resume="never"))
    assert moved.settings == one.settings  # neither changes what is learned
    longer = dataclasses.replace(one, config=dataclasses.replace(one.config, steps=4))
    assert longer.settings != one.settings
    assert "steps" in own_options(one.config) and "rollout.temperature" not in own_options(one.config)
    assert list(sweep_runs(named)) == []
    assert [run.learning_rate for run in reported_runs(named, {"four": 1e-4})] == [1e-4] * 4


# --- the command


def test_a_study_runs_what_is_missing_and_reads_what_is_complete(file, study, tmp_path):
    out = tmp_path / "out"
    listed = study(file, "--dry_run")
    assert listed.returncode == 0 and "8 runs, 8 left" in listed.stdout and not out.exists()
    done = study(file, "--jobs=2")
    assert done.returncode == 0, done.stderr
    assert "mine: 8 runs, 0 complete, 8 to run" in done.stdout and "none to run" in done.stdout
    first = (out / "results.jsonl").read_text()
    assert set(starts(out).values()) == {1} and len(starts(out)) == 8

    # As where it was killed: one run was never begun, and one has no mark of its end.
    lost, cut = sorted(out.glob("runs/*/*/*/seed-0-*/summary.json"))[:2]
    shutil.rmtree(lost.parent)
    cut.unlink()
    (out / "results.jsonl").unlink()
    again = study(file)
    assert "mine: 8 runs, 6 complete, 2 to run" in again.stdout
    assert (out / "results.jsonl").read_text() == first
    assert sorted(starts(out).values()) == [1] * 7 + [2]

    shutil.rmtree(out / "runs")  # results alone are enough
    assert "mine: 8 runs, 8 complete, 0 to run" in study(file).stdout
    file.write_text(STUDY.replace("rollouts: 4", "rollouts: 6"))
    other = study(file)
    assert "mine: 8 runs, 4 complete, 4 to run" in other.stdout
    results = results_in(out)
    assert len(results.runs) == 12 and len(results.of("mine")) == 8


def test_a_line_of_results_says_what_the_run_directory_does(one_task, study, tmp_path):
    study(one_task)
    run = next(
        run
        for run in results_in(tmp_path / "out").of("mine")
        if (run.task, run.arm, run.seed) == ("easy", "eight", 1)
    )
    gain = 0.1 * 2 + 0.01 + 1000 * 2e-5
    assert run.curve == {
        "step": [0, 1, 2, 3],
        "tokens": [0, 800, 1600, 2400],
        "flops": [0, 10_000_000, 20_000_000, 30_000_000],  # rollouts and updates, and no utilisation
        "seconds": [1.5, 3, 4.5, 6],
        "accuracy": pytest.approx([0.2 + gain * step for step in range(4)]),
    }
    assert run.metrics == {"states/accepted": 15} and run.final_accuracy == run.curve["accuracy"][-1]
    assert run.tokens_to_threshold is None and run.complete and not run.decided and run.commit


def test_a_run_that_fails_is_said_with_its_reason_and_the_others_go_on(
    one_task, drawn_study, tmp_path, monkeypatch
):
    one_task.write_text(one_task.read_text().replace("rollouts: 8", "rollouts: 5"))
    failed = drawn_study(one_task)
    assert failed.returncode == 1
    assert "failed: easy, eight, seed 1: step 2 has no signal (exit code 1)" in failed.stdout
    runs = results_in(tmp_path / "out").of("mine")
    assert [run.status for run in runs].count("failed") == 2 and len(runs) == 4
    page = (tmp_path / "out" / "report.md").read_text()
    assert "eight (2 failed)" in page and "- easy, eight, seed 0: step 2 has no signal" in page
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    drawn_study(one_task)
    assert sorted(starts(tmp_path / "out").values()) == [1, 1, 2, 2]  # tried again


def test_a_run_that_another_process_is_at_is_tried_again(one_task, study):
    """As after a study that was killed, whose runs go on until their next step."""
    one_task.write_text(one_task.read_text().replace("rollouts: 4", "rollouts: 7"))
    done = study(one_task)
    assert done.returncode == 0 and done.stdout.count("another process is at it") == 2


def test_shards_make_all_runs_together_and_are_put_together(one_task, study, tmp_path):
    out = tmp_path / "out"
    for part in ("1/3", "2/3", "3/3"):
        assert study(one_task, f"--shard={part}").returncode == 0
    assert len(starts(out)) == 4 and not (out / "results.jsonl").exists()
    assert "4 complete, 0 to run" in study(one_task).stdout
    assert len(results_in(out).of("mine")) == 4 and set(starts(out).values()) == {1}


def test_the_search_for_a_learning_rate_comes_first_and_is_not_reported(one_task, study, tmp_path):
    swept = one_task.read_text().replace(
        "seeds: [0, 1]", "seeds: [0, 1]\nsweep: {values: [1e-5, 5e-5, 2e-5], seeds: [7]}"
    )
    one_task.write_text(swept)
    waiting = study(one_task, "--shard=1/2")
    assert "the search for the learning rate is not complete" in waiting.stdout
    done = study(one_task)
    assert "eight: learning rate 5e-05, by the search" in done.stdout  # whose stand-in gains most
    runs = results_in(tmp_path / "out").of("mine")
    assert sorted(run.learning_rate for run in runs if run.sweep) == sorted([1e-5, 5e-5, 2e-5] * 2)
    assert {(run.learning_rate, run.seed) for run in runs if not run.sweep} == {(5e-5, 0), (5e-5, 1)}


def test_a_report_is_the_same_bytes_from_the_results_alone_in_any_order(file, drawn_study, tmp_path):
    drawn_study(file, "--jobs=2")
    out, other = tmp_path / "out", tmp_path / "other"
    drawn = {path.relative_to(out): path.read_bytes() for path in [*out.glob("*.md"), *out.glob("figures/*")]}
    assert len(drawn) == 6
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    other.mkdir()
    (other / "results.jsonl").write_bytes(b"".join(lines))
    assert call("study.__main__", "--report", "--out", other).returncode == 0
    assert {name: (other / name).read_bytes() for name in drawn} == drawn
    for name, text in drawn.items():
        if name.suffix == ".svg":
            assert b"2 seeds" in text and b"interval" in text and b"dc:date" not in text, name


def test_a_single_run_of_each_arm_has_no_figure(one_task, drawn_study, tmp_path):
    one_task.write_text(one_task.read_text().replace("[0, 1]", "[0]"))
    drawn_study(one_task)
    assert not (tmp_path / "out" / "figures").exists()
    assert "No figures" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_that_is_run_again_is_held_against_its_line(one_task, study, tmp_path):
    study(one_task)
    out = tmp_path / "out"
    agrees = study("--verify", "--seed=3")
    assert agrees.returncode == 0 and "4 evaluations agree" in agrees.stdout
    assert not any((out / "verify").iterdir())
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "run":
            line["curve"]["accuracy"][2] += 1e-5
            line["curve"]["seconds"][2] += 1  # which is the machine's
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    differs = study("--verify", "--seed=3")
    assert differs.returncode == 1 and "accuracy differs from evaluation 2 on" in differs.stdout
    assert "seconds" not in differs.stdout


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """Commits of a package whose training learns as the stand-in does, and then otherwise."""
    package = tmp_path / "repository" / "fr3e_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(commits, "PACKAGE", package)
    text = (REPOSITORY / "tests" / "fake_train.py").read_text()
    made = []
    (package / "__init__.py").touch()
    commits.git("-C", "..", "init")
    for gain in ("0.2 + gain", "0.3 + gain"):
        (package / "train.py").write_text(text.replace("0.2 + gain", gain))
        commits.git("add", ".")
        by = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        commits.git(*by, "commit", "-m", gain)
        made.append(commits.commit_of_code())
    (package / "train.py").write_text("an error")
    return made


def test_a_run_is_repeated_with_the_code_of_its_commit(one_task, study, versions, tmp_path, monkeypatch):
    """What is in the work tree, and in the current directory, is another version."""
    study(one_task)
    results, package = tmp_path / "out" / "results.jsonl", commits.PACKAGE
    made_by = f'"commit": "{versions[1]}+"'
    assert made_by in results.read_text()
    monkeypatch.chdir(package.parent)
    tells = "with the code of commit {}, which made it"

    def verified(commit):
        results.write_text(re.sub(r'"commit": "[^"]*"', f'"commit": "{commit}"', results.read_text()))
        monkeypatch.setattr(runner, "TRAIN", ("-m", "fr3e_jax.train"))
        return study("--verify")

    old = verified(f"{versions[1]} {versions[0]}")  # of several the last made its end
    assert old.returncode == 0 and tells.format(versions[0]) in old.stdout, old.stdout
    new = verified(versions[1])
    assert new.returncode == 1 and "accuracy differs from evaluation 0 on" in new.stdout
    assert tells.format(versions[1]) in new.stdout
    unknown = verified("0123456789ab")
    assert "commit 0123456789ab, which is not in this repository" in unknown.stdout
    assert len(commits.git("worktree", "list").splitlines()) == 1
