"""Updates whose loss or gradient is not finite: skipped, counted, told, and the end of a run of them."""

import dataclasses
import json

import numpy as np
import pytest
from support import SMALL, call

from fr3e_jax.learner import groups
from fr3e_jax.run.jsonl import to_line
from fr3e_jax.run.reporter import read_metrics, step_line
from fr3e_jax.step.metrics import summarize_step
from fr3e_jax.step.update import skipped_in_a_row


def updates_of(*losses):
    """Metrics of updates; a loss of nan is that of a skipped one."""
    bad = np.isnan(losses)
    return [
        {"loss": np.float32(x), "ratio_max": np.float32(3 * x), "skipped": np.float32(b)}
        for x, b in zip(losses, bad, strict=True)
    ]


@pytest.mark.parametrize(
    ("before", "losses", "limit", "count"),
    [
        (0, (1, np.nan, np.nan), 5, 2),
        (2, (np.nan, np.nan), 5, 4),
        (4, (1, np.nan), 5, 1),
        (4, (np.nan, 1), 5, 5),  # reached, whatever comes after it
        (0, (np.nan, np.nan, np.nan, 1), 2, 2),
        (4, (1,), 5, 0),
        (0, (np.nan,), 1, 1),
        (4, (np.nan,), 3, 5),  # the limit was lowered when the run was resumed
    ],
)
def test_skipped_updates_are_counted_in_a_row_across_steps(before, losses, limit, count):
    assert skipped_in_a_row(before, updates_of(*losses), limit) == count


def test_of_skipped_updates_only_the_number_is_told():
    told = summarize_step([], updates_of(2.0, np.nan, 4.0, np.nan))
    assert told == {"update/loss": 3.0, "update/ratio_max": 12.0, "update/skipped": 2}
    assert summarize_step([], updates_of(np.nan)) == {"update/skipped": 1}
    json.loads(to_line(told), parse_constant=pytest.fail)  # NaN is no JSON
    assert "updates skipped: 2" in step_line({"step": 3, **told})
    assert "skipped" not in step_line({"step": 3, **summarize_step([], updates_of(1.0))})


@pytest.fixture
def run_spoiled(monkeypatch):
    """A run of three steps of two updates, of which those with an x have advantages of nan."""
    minibatches = groups.minibatches

    def start(updates, *flags):
        marks = iter(updates)

        def spoiled(*arguments):
            for part in minibatches(*arguments):
                bad = next(marks, ".") == "x"
                yield dataclasses.replace(part, advantage=part.advantage * (np.nan if bad else 1))

        monkeypatch.setattr(groups, "minibatches", spoiled)
        return call("train", *SMALL, "--steps=3", "--evaluate.every=0", *flags)

    return start


@pytest.mark.slow
def test_a_run_goes_on_after_a_skipped_update_at_the_rate_where_it_was(run_spoiled, tmp_path):
    flags = ["--optimizer.schedule=linear", "--optimizer.warmup_updates=2", "--optimizer.learning_rate=1e-4"]
    done = run_spoiled(".x", *flags, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")[1:]
    assert [line["update/skipped"] for line in lines] == [1, 0, 0]
    # Of the rates 1/2, 1, 1, 3/4, 1/2, 1/4 the second waits for the second update that is taken.
    rates = [line["update/learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, 1e-4 * np.array([0.5, 1.0, 0.625]), rtol=1e-6)
    assert all(np.isfinite(line["update/loss"]) for line in lines)
    assert "updates skipped: 1" in done.stdout


@pytest.mark.slow
def test_a_run_whose_updates_are_all_skipped_ends_and_may_be_resumed(run_spoiled, tmp_path):
    flags = ["--optimizer.max_skipped=3", "--run_dir", tmp_path / "run"]
    ended = run_spoiled("xxx.", *flags)  # over two steps, before an update that is fine
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "step 2: 3 updates in a row were skipped" in ended.stderr
    assert "optimizer.learning_rate" in ended.stderr and "optimizer.max_skipped" in ended.stderr
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "model").exists()
    # It goes on with the third step, and counts from 0.
    again = run_spoiled("xx", *flags)
    assert again.returncode == 0, again.stderr
    assert "resumed from the checkpoint of step 2" in again.stdout
    assert [line["update/skipped"] for line in read_metrics(tmp_path / "run")[1:]] == [2, 1, 2]
