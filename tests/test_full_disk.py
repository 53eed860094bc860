"""A disk that is full: one line, at the step where it is, and the last checkpoint stands."""

import contextlib
import json
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
from etils import epath
from support import SMALL, command, files_of_at_most, metrics, placement, restored, run

from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.reporter import Reporter, read_metrics
from fr3e_jax.run.saved import Progress, saved_steps
from fr3e_jax.run.storage import StorageError


@pytest.fixture
def state():
    """A state of a megabyte that does not compress."""
    noise = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    leaf = placement(2, 2, 1).place(noise, "embed", None)
    return TrainState({"w": leaf}, {"m": leaf})


def test_a_save_that_a_full_disk_refuses_is_told_while_the_run_goes_on(state, tmp_path, capfd):
    carried, writer = groups.empty_groups(2, 3, 4), Checkpoints(tmp_path, keep=2)
    writer.save(state, carried, Progress(step=1))
    writer.manager.wait_until_finished()
    with files_of_at_most(100_000), pytest.raises(StorageError) as error:
        writer.save(state, carried, Progress(step=2))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # as training does before every step
            writer.check()
    said = str(error.value)
    assert "could not be written" in said and "goes on from the last checkpoint" in said
    assert "tensorstore" not in said and len(said) < 1000
    with contextlib.suppress(StorageError):
        writer.close()
    assert capfd.readouterr().err == ""
    # What it left does not hinder the next start.
    assert saved_steps(tmp_path) == [1]
    assert restored(tmp_path, 1, state)[2] == Progress(step=1)
    again = Checkpoints(tmp_path, keep=2)
    again.save(state, carried, Progress(step=2))
    again.close()
    found, _, _ = restored(tmp_path, 2, state)
    np.testing.assert_array_equal(jax.device_get(found.params["w"]), jax.device_get(state.params["w"]))


def test_a_checkpoint_is_not_saved_before_the_rollouts_of_its_steps(state, tmp_path):
    """Nor where they cannot be: what goes on from it would never write them."""
    there = []

    def refuse():
        there.append(writer.latest())
        if len(there) == 2:
            raise StorageError("the rollouts could not be written")

    carried, writer = groups.empty_groups(2, 3, 4), Checkpoints(tmp_path, keep=2, before=refuse)
    writer.save(state, carried, Progress(step=1))
    with pytest.raises(StorageError, match="rollouts"):
        writer.save(state, carried, Progress(step=2))
    writer.close()
    assert there == [None, 1] and saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("what", ["metrics", "log", "summary"])
def test_what_a_run_tells_is_an_error_of_storage_where_it_cannot_be_written(tmp_path, capfd, what):
    reporter = Reporter(epath.Path(tmp_path), total=4, start=0)
    reporter.step({"step": 0, "x": "y" * 100})
    told = pytest.raises(StorageError, match=r"could not be written.*File too large")
    with told, reporter, files_of_at_most(200):
        if what == "metrics":
            reporter.step({"step": 1, "x": "y" * 200})
        elif what == "log":
            reporter.say("x" * 300)
        else:
            reporter.summary({"x": "y" * 300}, {})
    assert "Error" not in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path)][:1] == [0]


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(whole_run, tmp_path):
    """At a line of metrics, and then at the arrays of the second checkpoint."""
    directory = shutil.copytree(whole_run[0], tmp_path / "run")  # as it was after two steps
    for later in ("checkpoints/4", "model"):
        shutil.rmtree(directory / later)
    (directory / "summary.json").unlink()
    for file in (directory / "metrics.jsonl", directory / "samples.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    for kilobytes, reached in ((3, 2), (4_000, 4)):  # as of `ulimit -f`
        told = command("train", *SMALL, "--run_dir", directory)
        told["args"] = ["bash", "-c", f'ulimit -f {kilobytes} && exec "$@"', "bash", *told["args"]]
        ended = subprocess.run(**told, timeout=600)
        assert ended.returncode == 1, ended.stdout
        assert len(ended.stderr.splitlines()) == 1 and "could not be written" in ended.stderr
        assert metrics(directory)[-1]["step"] == reached
    again = run("train", *SMALL, "--run_dir", directory)
    assert again.returncode == 0, again.stderr
    assert "resumed from the checkpoint of step 2" in again.stdout
    assert metrics(directory) == metrics(whole_run[0])
