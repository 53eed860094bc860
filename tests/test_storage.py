"""Runs in a bucket, which is a stand-in on this machine: tests/fake_gcs.py."""

import dataclasses
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
from etils import epath
from fake_gcs import FakeGCS, Refused
from support import SMALL, call, command, metrics, run

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run import storage
from fr3e_jax.run.lock import HeldError, Lock, this_process
from fr3e_jax.run.lock_file import lock_file
from fr3e_jax.run.saved import CHECKPOINTS
from fr3e_jax.run.storage import ChangedError, StorageError, location, writing

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


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A bucket that this process uses."""
    server = FakeGCS("bucket")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    storage.refuse_unusable.cache_clear()
    yield server
    storage.refuse_unusable.cache_clear()
    server.close()


def refused(path):
    """The message with which a place is refused."""
    with pytest.raises(ConfigError) as error:
        location(path)
    return str(error.value)


def test_without_credentials_it_is_said_how_to_log_in(here, monkeypatch):
    here.token = "another"
    assert "gcloud auth application-default login" in refused("gs://bucket/run")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")  # so that credentials are looked for, and not found
    assert "gcloud auth application-default login" in refused("gs://bucket/run")


def test_a_bucket_of_others_is_refused_with_the_roles_that_are_needed(here):
    here.refuse = lambda *_: Refused(403, "x@y does not have storage.buckets.get access.")
    assert "roles/storage.legacyBucketReader" in refused("gs://bucket/run")


def test_an_address_that_does_not_answer_is_told(here, monkeypatch):
    here.refuse = lambda *_: Refused(400, "Invalid bucket name")
    assert "gs://bucket cannot be reached: BadRequest" in refused("gs://bucket/run")


def test_without_gcsfs_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "pip install 'gcsfs" in refused("gs://bucket/run")


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://bucket", "gs://bucket/", "gs:///run", "://x"])
def test_other_addresses_are_refused(path):
    assert f"{path} is neither a directory nor of the form gs://BUCKET/PATH" in refused(path)


def test_what_others_write_is_seen_after_a_listing(here):
    """Which gcsfs would keep: then no host saw the checkpoint that another began."""
    program = (
        "import sys\nfrom fr3e_jax.run.storage import location\n"
        "place = location('gs://bucket/run')\n"
        "for _ in sys.stdin:\n"
        "  print(sorted(x.name for x in place.iterdir()), (place / 'b').exists(), flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for name, seen in {"a": "['a'] False", "b": "['a', 'b'] True"}.items():
        here.put("bucket", f"run/{name}", b"x", {})
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == seen
    process.communicate()


def test_a_listing_of_several_pages_is_read_to_its_end(here):
    """So that the stand-in answers as the service does."""
    for number in range(120):
        here.put("bucket", f"run/{number:03}", b"x", {})
    program = (
        "from fr3e_jax.run.storage import location\nprint(len(list(location('gs://bucket/run').iterdir())))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "120\n"


def test_the_lock_of_a_place_in_a_bucket_is_held_by_one_process(here):
    """By the generation of the object: of two that saw the same, one replaces it."""
    place = epath.Path("gs://bucket/run")
    files = [lock_file(place) for _ in range(2)]
    assert [file.read() for file in files] == [None, None]
    files[0].write(b"a")
    files[0].write(b"b")
    with pytest.raises(ChangedError):
        files[1].write(b"c")
    assert files[1].read() == b"b"
    files[1].write(b"d")
    with pytest.raises(ChangedError):
        files[0].remove()
    assert here.files("gs://bucket/run") == {"lock.json": b"d"}
    files[1].remove()
    assert here.files("gs://bucket/run") == {}


def test_a_run_in_a_bucket_is_refused_while_another_goes_on_and_takes_over_from_a_dead_one(here):
    place, hosts = epath.Path("gs://bucket/run"), Hosts(None, 9)
    with Lock("train", hosts) as first:
        first.take(place)
        with pytest.raises(HeldError, match="gs://bucket/run is in use by train, process"):
            Lock("train", hosts).take(place)
    assert here.files("gs://bucket/run") == {}
    owner = dataclasses.replace(this_process("train"), machine="another", host="spot-1", time=1e9)
    here.put("bucket", "run/lock.json", json.dumps(dataclasses.asdict(owner)).encode(), {})
    with Lock("train", hosts) as second:
        second.take(place)
        assert "was left by train, process" in second.messages[0] and "on spot-1" in second.messages[0]
        here.refuse = lambda *_: Refused(403, "May only read.")
    here.refuse = lambda *_: None
    assert here.files("gs://bucket/run").keys() == {"lock.json"}  # could not be given back: of a dead process


def test_only_what_was_not_taken_is_an_error_of_storage(tmp_path):
    with pytest.raises(ValueError, match="a fault"), writing(tmp_path / "x"):
        raise ValueError("a fault of the program")
    with pytest.raises(StorageError, match=r"x could not be written.*full"), writing(tmp_path / "x"):
        raise OSError("disk full")
    told = pytest.raises(StorageError, match=r"gs://bucket/x could not be written.*refused")
    with told, writing("gs://bucket/x"):
        raise OSError("refused")


def talking_to(program):
    """A process that runs Python text, with pipes to and from it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], **pipes)


@pytest.mark.slow
def test_a_checkpoint_of_which_a_part_came_is_an_error_and_not_chosen(here):
    program = (
        "import sys\nimport jax.numpy as jnp\n"
        "from fr3e_jax.run.checkpoints import Checkpoints\n"
        "from fr3e_jax.run.saved import Progress\n"
        "from fr3e_jax.learner.groups import empty_groups\n"
        "from fr3e_jax.run.storage import StorageError, location\n"
        "from fr3e_jax.learner.state import TrainState\n"
        "for _ in sys.stdin:\n"
        "    checkpoints, error = Checkpoints(location('gs://bucket/run'), keep=2), ''\n"
        "    latest = checkpoints.latest()\n"
        "    state = TrainState({'w': jnp.ones(9)}, {'m': jnp.zeros(9)})\n"
        "    try:\n"
        "        checkpoints.save(state, empty_groups(2, 4, 4), Progress((latest or 0) + 1))\n"
        "        checkpoints.close()\n"
        "    except StorageError as failed:\n"
        "        error = str(failed)\n"
        "    print(f'after {latest} {error}'.strip(), flush=True)\n"
    )
    process = talking_to(program)

    def save():
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert save() == "after None"
    here.refuse = lambda method, path, name: (
        Refused(403, "Out of order.")
        if name and "/2/optimizer/" in name and name.endswith(".ocdbt")
        else None
    )
    told = save()
    assert told.startswith("after 1 gs://bucket/run/checkpoints could not be written")
    assert "Out of order" in told
    here.refuse = lambda *_: None
    assert any(name.startswith("checkpoints/2/params/") for name in here.files("gs://bucket/run"))
    assert save() == "after 1"
    assert save() == "after 2"
    process.communicate()


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_bucket_is_told_and_moved_aside(here):
    program = (
        "import jax, jax.numpy as jnp\n"
        "from fr3e_jax.run.checkpoints import Checkpoints, abstract_leaves\n"
        "from fr3e_jax.run.resume import newest_whole, set_aside\n"
        "from fr3e_jax.learner.groups import empty_groups\n"
        "from fr3e_jax.run.saved import Progress\n"
        "from fr3e_jax.run.storage import location\n"
        "from fr3e_jax.learner.state import TrainState\n"
        "from fr3e_jax.parallel.hosts import Hosts\n"
        "run = location('gs://bucket/run')\n"
        "checkpoints = Checkpoints(run, keep=3)\n"
        "for step in (1, 2):\n"
        "    noise = jax.random.normal(jax.random.key(step), (999,))\n"
        "    state = TrainState({'w': noise}, {'m': jnp.zeros(9)})\n"
        "    checkpoints.save(state, empty_groups(2, 4, 4), Progress(step))\n"
        "checkpoints.close()\n"
        "input()\n"
        "read = lambda saved: {'params': saved.read('params', abstract_leaves(state.params))}\n"
        "whole = newest_whole(run, [1, 2], read, Hosts(None, 9))\n"
        "set_aside(run, list(whole.damaged))\n"
        "print(whole.step, whole.damaged, Checkpoints(run, keep=3).steps())\n"
    )
    process = talking_to(program)
    deadline = time.monotonic() + 60
    while f"{CHECKPOINTS}/2/commit_success.txt" not in here.files("gs://bucket/run"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    before = here.files("gs://bucket/run")
    arrays = {name: x for name, x in before.items() if f"{CHECKPOINTS}/2/params/ocdbt.process_0/d/" in name}
    name = max(arrays, key=lambda name: len(arrays[name]))
    content = arrays[name][:2000] + bytes(64) + arrays[name][2064:]
    here.put("bucket", f"run/{name}", content, {})
    told, _ = process.communicate("\n", timeout=100)
    assert told.startswith("1 {2: ") and "params" in told and told.endswith("} [1]\n")
    moved = {n.replace(f"{CHECKPOINTS}/2/", "damaged/2/"): x for n, x in (before | {name: content}).items()}
    assert here.files("gs://bucket/run") == moved


def test_files_and_directories_are_replaced_in_a_bucket(here, tmp_path):
    (tmp_path / "model" / "in").mkdir(parents=True)
    large = os.urandom(6_000_000)  # more than is sent at once
    (tmp_path / "model" / "in" / "large").write_bytes(large)
    (tmp_path / "model" / "empty").write_bytes(b"")
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from fr3e_jax.run.storage import location, upload, write_atomically\n"
        "upload(Path(sys.argv[1]), location('gs://bucket/run/model'))\n"
        "write_atomically(location('gs://bucket/run/text'), 'schön\\n')"
    )
    here.put("bucket", "run/model/old", b"x", {})
    here.put("bucket", "run/text", b"x", {})
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], check=True)
    assert here.files("gs://bucket/run") == {
        "model/in/large": large,
        "model/empty": b"",
        "text": "schön\n".encode(),
    }
