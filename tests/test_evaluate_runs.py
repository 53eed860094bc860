"""Evaluations of runs: a run is asked as it was trained, and compared with where it began."""

import json

import numpy as np
import pytest
import yaml
from evaluations import answers, settings, write_suite
from support import call

from fr3e_jax.evaluate import evaluate
from fr3e_jax.evaluation import asked_model
from fr3e_jax.evaluation.record import ANSWERS, SETTINGS, SUMMARY
from fr3e_jax.run.trained import read_trained


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("data") / "sums.jsonl")


def test_a_run_is_asked_with_its_own_limits_and_its_parameters_are_read_once(
    whole_run, suite, tmp_path, monkeypatch
):
    reads = []

    def counted(*arguments):
        reads.append(arguments)
        return read_trained(*arguments)

    monkeypatch.setattr(asked_model, "read_trained", counted)
    changed = {"model": str(whole_run[0]), "max_response": 0, "template": "auto", "samples": 1, "limit": 8}
    summary = evaluate(settings(suite, tmp_path / "e", **changed))
    assert len(reads) == 1 and summary["step"] == 4
    (told,) = summary["benchmarks"]
    assert (told["settings"]["max_response"], told["settings"]["template"]) == (40, "plain")
    held = yaml.safe_load((tmp_path / "e" / SETTINGS).read_text())
    assert held["max_response"] == 40
    assert evaluate(settings(suite, tmp_path / "e", **changed)) == summary and len(reads) == 1


@pytest.mark.slow
def test_the_command_shows_its_table_and_a_checkpoint_is_compared_with_where_it_began(suite, tmp_path):
    flags = ["--suite", suite, "--samples=1", "--max_response=48", "--template=auto", "--rows=8"]
    small = ["--steps=2", "--checkpoint.every=1", "--rollout.queries=8", "--explore.positions=1"]
    small += ["--explore.rollouts=4", "--optimizer.batch_states=4", "--data.held_out=8", "--evaluate.rows=8"]
    trained = call("train", *small, "--run_dir", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    before = call("evaluate", "--model=quickstart", *flags, "--template=plain", "--out", tmp_path / "before")
    assert before.returncode == 0, before.stderr
    both = ["--out", tmp_path / "after", "--compare", tmp_path / "before"]
    after = call("evaluate", "--model", tmp_path / "run", *flags, *both)
    assert after.returncode == 0, after.stderr
    assert f"step 2 of {tmp_path / 'run'}" in after.stdout
    assert "sums" in after.stdout and "avg@1" in after.stdout and "a - b" in after.stdout
    assert str(tmp_path / "after" / ANSWERS) in after.stdout
    summary = json.loads((tmp_path / "after" / SUMMARY).read_text())
    (row,) = summary["compared_with"]["rows"]
    shares = [np.mean([line["right"] for line in answers(tmp_path / name)]) for name in ("after", "before")]
    assert row["difference"] == pytest.approx(shares[0] - shares[1])
    # The run goes on, and the same command still asks the checkpoint that it began with.
    again = call("train", *small, "--steps=3", "--run_dir", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    same = call("evaluate", "--model", tmp_path / "run", *flags, *both)
    assert same.returncode == 0, same.stderr
    assert json.loads((tmp_path / "after" / SUMMARY).read_text()) == summary
    missing = call("evaluate", "--model", tmp_path / "run", *flags, "--step=7", "--out", tmp_path / "no")
    assert missing.returncode == 2 and "it holds those of steps 2, 3" in missing.stderr
