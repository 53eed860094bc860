"""A laptop with launch/tpu.sh and a stand-in of gcloud (fake_gcloud.py), and the cloud behind it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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

needs_tools = pytest.mark.skipif(
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


def make_origin(path: Path) -> Path:
    """A repository with what the workers need of this one, and room for slices that were installed once."""
    (path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch" / "worker.sh", path / "launch")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], cwd=path, check=True)
    Laptop.store = path.parent / f"{path.name}-installed"
    Laptop.store.mkdir()
    Laptop.installed.clear()
    return path


def renting(path: Path, origin: Path) -> Iterator[Callable[..., Laptop]]:
    """Yield what makes laptops with given settings; the processes of their clouds end after the test."""
    laptops: list[Laptop] = []

    def make(**settings: str) -> Laptop:
        laptops.append(Laptop(path / str(len(laptops)), origin, **settings))
        return laptops[-1]

    yield make
    for laptop in laptops:
        laptop.end()


def tpus(kind: str, verb: str, *flags: str) -> list[str]:
    return ["compute", "tpus", kind, verb, "fr3e-7b", *WHERE, *flags, "--quiet"]
