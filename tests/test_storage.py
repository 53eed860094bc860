"""Places in a bucket, which is a stand-in on this machine: what is read, written and refused."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath
from fake_gcs import FakeGCS, Refused
from support import mesh_of

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run import storage
from fr3e_jax.run.lock import HeldError, Lock, this_process
from fr3e_jax.run.lock_file import lock_file
from fr3e_jax.run.saved import CHECKPOINTS
from fr3e_jax.run.storage import ChangedError, StorageError, location, writing


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
    place, hosts = epath.Path("gs://bucket/run"), Hosts(mesh_of(), 9)
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
        "from fr3e_jax.run.saved import Progress, saved_steps\n"
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
        "print(whole.step, whole.damaged, saved_steps(run))\n"
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
