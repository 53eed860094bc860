"""Runs in a bucket, which is a stand-in on this machine: tests/fake_gcs.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from environment import COMPILED
from fake_gcs import FakeGCS, Refused
from support import SMALL, call, command, metrics, run

from fr3e_jax.run.saved import CHECKPOINTS

RUN = "gs://bucket/runs/a"
CACHE = "--compilation_cache=gs://bucket/compiled"
OFTEN = [*SMALL, "--checkpoint.every=1", "--checkpoint.keep=2"]


@pytest.fixture(scope="module")
def server():
    """The service, with an empty bucket."""
    server = FakeGCS("bucket")
    yield server
    server.close()


@pytest.fixture(scope="module")
def machine(server, tmp_path_factory):
    """A function that gives a command the environment and the working directory of a machine of its own."""

    def new():
        home = tmp_path_factory.mktemp("machine")
        return {"HOME": str(home), "TMPDIR": str(home), "cwd": home, **server.environment}

    return new


@pytest.fixture(scope="module")
def killed(server, machine, whole_run):
    """The run in the bucket, killed when a part of the second checkpoint is there; and the bucket then.

    Programs that a run in a directory compiled were there before.
    """
    for file in COMPILED.iterdir():
        server.put("bucket", f"compiled/{file.name}", file.read_bytes(), {})
    taken, dead = [], threading.Event()

    def refuse(method, path, name):
        if name is None or f"/{CHECKPOINTS}/2/" not in name:
            return None
        taken.append(name)
        if len(taken) <= 12:
            return None
        dead.wait(300)
        return Refused(503, "The caller is gone.")

    server.refuse = refuse
    process = subprocess.Popen(**command("train", *OFTEN, CACHE, "--run_dir", RUN, **machine()))
    deadline = time.monotonic() + 300
    while len(taken) <= 12:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    dead.set()
    server.refuse = lambda *_: None
    assert process.returncode == -signal.SIGKILL
    return server.files(RUN)


@pytest.fixture(scope="module")
def bucket_run(killed, server, machine):
    """The same on another machine, where it comes to its end; and a model lay there with more files."""
    server.put("bucket", "runs/a/model/model-00002-of-00002.safetensors", b"of a run before", {})
    started = machine()
    done = run("train", *OFTEN, CACHE, "--run_dir", RUN, **started)
    assert done.returncode == 0, done.stderr
    return done, server.files(RUN), list(Path(started["TMPDIR"]).iterdir())


def steps(files):
    """The steps of the checkpoints in the bucket, whole or not."""
    return {name.split("/")[1] for name in files if name.startswith(f"{CHECKPOINTS}/")}


@pytest.mark.slow
def test_a_run_killed_on_one_machine_goes_on_on_another(killed, bucket_run, whole_run, tmp_path):
    """From the last checkpoint that is whole; of the one after it there was a part."""
    assert steps(killed) == {"1", "2"} and "checkpoints/2/commit_success.txt" not in killed
    (done, files, _), (directory, _) = bucket_run, whole_run
    assert "resumed from the checkpoint of step 1" in done.stdout
    (tmp_path / "metrics.jsonl").write_bytes(files["metrics.jsonl"])
    assert metrics(tmp_path) == metrics(directory)
    assert files["samples.jsonl"] == (directory / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_a_bucket_holds_what_a_directory_holds(bucket_run, whole_run):
    (_, files, _), (directory, _) = bucket_run, whole_run
    assert {name.split("/")[0] for name in files} == {each.name for each in directory.iterdir()}
    rollouts = {each.name: each.read_bytes() for each in (directory / "rollouts").iterdir()}
    assert {n.removeprefix("rollouts/"): x for n, x in files.items() if n.startswith("rollouts/")} == rollouts
    model = {each.name: each.read_bytes() for each in (directory / "model").iterdir()}
    assert {n.removeprefix("model/"): x for n, x in files.items() if n.startswith("model/")} == model
    ours, theirs = (
        yaml.safe_load(x) for x in (files["config.yaml"], (directory / "config.yaml").read_text())
    )
    del ours["compilation_cache"], theirs["compilation_cache"], theirs["run_dir"]
    assert (ours.pop("checkpoint")["every"], theirs.pop("checkpoint")["every"]) == (1, 2)
    assert ours.pop("run_dir") == RUN
    assert ours == theirs
    ours, theirs = (json.loads(x) for x in (files["summary.json"], (directory / "summary.json").read_bytes()))
    assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
    assert ours == theirs
    log = files["log.txt"].decode()
    assert [f"step {step:>4} |" in log for step in range(5)] == [True] * 5
    assert log.count("resumed from the checkpoint") == 1


@pytest.mark.slow
def test_of_checkpoints_that_are_not_kept_nothing_is_left(bucket_run):
    assert steps(bucket_run[1]) == {"3", "4"}


@pytest.mark.slow
def test_nothing_of_a_run_in_a_bucket_is_left_here(bucket_run):
    assert not bucket_run[2]


@pytest.mark.slow
def test_compiled_programs_are_taken_from_the_bucket(killed, whole_run, server):
    read = {path for method, path in server.calls if method == "GET" and "compiled%2F" in path}
    assert len(read) > 20
    written = [path for method, path in server.calls if method == "POST" and "name=compiled/" in path]
    assert not [path for path in written if "jit_sample" in path or "jit_update" in path]


@pytest.mark.slow
def test_compiled_programs_are_kept_in_a_bucket(server, machine):
    program = (
        "import jax\nfrom fr3e_jax.run.compilation import keep_compiled\n"
        "print(keep_compiled('auto', 'gs://bucket/others/a'))\njax.jit(lambda x: x * 3)(1.0)"
    )
    environment = {k: v for k, v in {**os.environ, **machine()}.items() if k != "cwd"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True)
    assert done.stdout.strip() == "gs://bucket/others/compiled", done.stderr
    assert any("jit" in name for name in server.files("gs://bucket/others/compiled"))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_not_resumed_with_other_settings(bucket_run, machine):
    refused = run("train", *OFTEN, CACHE, "--run_dir", RUN, "--loss.clip_high=0.4", **machine())
    assert refused.returncode == 2
    assert f"{RUN} was started with other settings: loss.clip_high: 0.28 -> 0.4;" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_model_is_exported_from_a_bucket(bucket_run, machine, tmp_path):
    out = tmp_path / "model"
    done = run("export", "--run", RUN, "--out", out, **machine())
    assert done.returncode == 0, done.stderr
    files = bucket_run[1]
    assert {f"model/{each.name}": each.read_bytes() for each in out.iterdir()} == {
        name: content for name, content in files.items() if name.startswith("model/")
    }


def test_export_into_a_bucket_is_refused_in_one_line(tmp_path):
    refused = call("export", "--run", tmp_path, "--out", "gs://bucket/model")
    assert refused.returncode == 2
    assert "gcloud storage cp" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_bucket_that_takes_no_files_is_told_in_one_line(machine):
    closed = FakeGCS("bucket")
    closed.refuse = lambda method, path, name: name and Refused(403, "The account may only read.")
    done = run("train", *SMALL, "--run_dir", RUN, **{**machine(), **closed.environment})
    closed.close()
    assert done.returncode == 1
    assert f"{RUN}/lock.json could not be written" in done.stderr and "may only read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("auto", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_bucket_that_is_not_there_is_told_in_one_line(machine, auto):
    """Found when compiled programs are looked for beside the run, or when the run is."""
    place = {"JAX_COMPILATION_CACHE_DIR": ""} if auto else {}
    refused = run("train", *SMALL, "--run_dir", "gs://buckett/runs/a", **machine(), **place)
    assert refused.returncode == 2
    assert "gcloud storage buckets create gs://buckett" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
