"""launch/tpu.sh creates, deletes and installs slices."""

import os
import pty
import subprocess

import pytest
from laptop import TPU, TRAINING, needs_tools, tpus

pytestmark = needs_tools


# ---- creating and deleting


@pytest.mark.parametrize(
    ("type_", "runtime", "named"),
    [
        ("v5e-16", "v2-alpha-tpuv5-lite", "v5litepod-16"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite", "v5litepod-8"),
        ("v6e-256", "v2-alpha-tpuv6e", "v6e-256"),
        ("v5p-128", "v2-alpha-tpuv5", "v5p-128"),
        ("v4-64", "tpu-ubuntu2204-base", "v4-64"),
    ],
)
def test_each_type_gets_its_runtime_version(rent, type_, runtime, named):
    laptop = rent(TYPE=type_)
    laptop.call("create")
    assert laptop.said("queued-resources create") == [
        tpus(
            "queued-resources",
            "create",
            "--node-id=fr3e-7b",
            f"--accelerator-type={named}",
            f"--runtime-version={runtime}",
            "--spot",
        )
    ]


def test_capacity_decides_how_a_slice_is_asked_for(rent):
    now, queued = rent(CAPACITY="on-demand", RUNTIME="my-runtime"), rent(CAPACITY="queued")
    now.call("create")
    # --version here, --runtime-version there
    assert now.said(" create ") == [
        tpus("tpu-vm", "create", "--accelerator-type=v5p-16", "--version=my-runtime")
    ]
    assert not now.said("queued-resources")
    queued.call("create")
    (command,) = queued.said(" create ")
    assert command[2] == "queued-resources" and "--spot" not in command


def test_create_waits_for_the_queue_and_shows_how_it_moves(rent):
    laptop = rent()
    (laptop.cloud / "states-queued-resources").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    (laptop.cloud / "states-tpu-vm").write_text("CREATING READY")
    shown = laptop.call("create")
    places = [
        shown.index(s) for s in ("WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "READY", "is ready")
    ]
    assert places == sorted(places)


def test_create_of_a_slice_that_is_there_asks_for_no_second_one(rent):
    laptop = rent()
    laptop.call("create")
    laptop.forget()
    assert "asked for before" in laptop.call("create")
    assert not laptop.said(" create ")


def test_create_gives_up_in_time_and_leaves_the_request_in_the_queue(rent):
    laptop = rent(WAIT_MINUTES="0")
    (laptop.cloud / "states-queued-resources").write_text("WAITING_FOR_RESOURCES " * 5)
    assert "not ready within 0 minutes" in laptop.call("create", expect=1)
    laptop.forget()
    laptop.call("create", expect=1)
    assert not laptop.said(" create ") and not laptop.said(" delete ")


def test_create_says_why_there_is_no_slice(rent):
    laptop = rent(CAPACITY="on-demand")
    (laptop.cloud / "no_capacity").touch()
    assert "no more capacity" in laptop.call("create", expect=1)


def test_a_network_that_is_down_is_not_a_slice_that_is_gone(rent):
    laptop = rent().ready()
    (laptop.cloud / "broken").write_text("Could not reach the server")
    for words in (["create"], ["install"], ["delete", "--yes"]):
        assert "Could not reach the server" in laptop.call(*words, expect=1)
    assert not laptop.said(" create ") and not laptop.said(" delete ") and not laptop.said(" ssh ")


def test_a_failed_request_is_left_to_the_person(rent):
    laptop = rent()
    laptop.call("create")
    (laptop.cloud / "request").write_text("FAILED")
    laptop.forget()
    assert "launch/tpu.sh delete" in laptop.call("create", expect=1)
    assert not laptop.said(" create ") and not laptop.said(" delete ")


def test_nothing_is_deleted_without_a_person_or_their_yes(rent):
    laptop = rent().ready()
    assert "--yes" in laptop.call("delete", expect=2)
    assert not laptop.said(" delete ")
    laptop.call("delete", "--yes")
    assert laptop.said(" delete ") == [tpus("queued-resources", "delete", "--force")]
    laptop.forget()
    assert "no slice" in laptop.call("delete", "--yes")
    assert not laptop.said(" delete ")


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("", 1), ("\x04", 1), ("y", 0)])
def test_delete_asks_on_a_terminal(rent, answer, code):
    laptop = rent(CAPACITY="on-demand").ready()
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [TPU, "delete"], env=laptop.environment(), stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
    )
    os.write(controller, f"{answer}\n".encode())
    assert b"Delete fr3e-7b (v5p-16, READY)" in process.communicate(timeout=20)[1]
    os.close(controller)
    os.close(terminal)
    assert process.returncode == code
    assert laptop.said(" delete ") == ([] if code else [tpus("tpu-vm", "delete")])


# ---- installing


def test_every_worker_installs_the_ref_in_locked_versions(rent, origin):
    laptop = rent(TYPE="v5e-16", DATA="gs://my-bucket/data")
    (laptop.cloud / "worker_bin" / "gcloud").write_text('#!/bin/bash\necho "$*" >>"$HOME/gcloud.log"\n')
    (laptop.cloud / "worker_bin" / "gcloud").chmod(0o755)
    laptop.call("create")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=origin, capture_output=True, text=True).stdout
    assert f"installed {head.strip()} on 4 workers" in laptop.call("install")
    for number in range(4):
        home = laptop.worker(number)
        assert (home / "fr3e_venv" / "installed").read_text() == head
        log = (home / "uv.log").read_text()
        assert "--python 3.12" in log and "--constraint requirements.lock" in log and ".[tpu]" in log
        assert "rsync --recursive gs://my-bucket/data" in (home / "gcloud.log").read_text()
    laptop.call("install")  # again, over the first


def test_a_worker_that_fails_to_install_is_named_and_no_run_starts(rent):
    laptop = rent(TYPE="v5e-16")
    laptop.call("create")
    (laptop.cloud / "failing").write_text("2")
    shown = laptop.call("install", expect=1)
    assert "worker 2 failed to install" in shown and "worker 2: No space left" in shown
    assert "worker 1 failed" not in shown
    assert "launch/tpu.sh install" in laptop.call("run", "first", *TRAINING, expect=1)
    assert not laptop.said("worker.sh start") and not list(laptop.cloud.glob("started-*"))


def test_install_leaves_a_run_that_is_going_on_alone(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    assert "a run is going on here" in laptop.call("install", expect=1)
    assert "running" in laptop.call("status")


def test_workers_are_spoken_to_a_few_at_a_time(rent):
    laptop = rent(TYPE="v5e-32", PARALLEL="3")
    laptop.call("create")
    laptop.call("install")
    workers = [c[-3] for c in laptop.said("git fetch")]
    assert sorted(workers) == sorted(f"--worker={n}" for n in range(8))
    for start in (0, 3):
        assert set(workers[start : start + 3]) == {f"--worker={n}" for n in range(start, start + 3)}
