"""Stands in for gcloud in the tests of launch/tpu.sh: records every command, refuses flags that it does not
have, and keeps a slice, its workers and a bucket as files. Commands for a worker run here, in its home.

The directory is $FAKE_GCLOUD:
  commands.jsonl           argv of each call
  request, node            state of the queued resource and of the slice; no file, no such thing
  states-KIND              states that describe says first, one a call
  broken                   text of the error that describe ends with
  no_capacity              create fails
  logged_out               text of the error that every command ends with
  unreachable              numbers of workers that cannot be reached
  worker-N/                home of a worker
  worker_bin/              programs that workers have besides the system's
  bucket/NAME/             what is in gs://NAME
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
from pathlib import Path

WIDE = {"--project", "--quiet", "--format"}
FLAGS = {
    ("compute", "tpus", "tpu-vm", "create"): {"--zone", "--accelerator-type", "--version", "--spot"},
    ("compute", "tpus", "tpu-vm", "describe"): {"--zone"},
    ("compute", "tpus", "tpu-vm", "delete"): {"--zone", "--async"},
    ("compute", "tpus", "tpu-vm", "ssh"): {"--zone", "--worker", "--command"},
    ("compute", "tpus", "queued-resources", "create"): {
        "--zone",
        "--node-id",
        "--accelerator-type",
        "--runtime-version",
        "--spot",
        "--metadata-from-file",
        "--service-account",
        "--internal-ips",
        "--valid-until-duration",
        "--async",
    },
    ("compute", "tpus", "queued-resources", "describe"): {"--zone"},
    ("compute", "tpus", "queued-resources", "delete"): {"--zone", "--force", "--async"},
    ("storage", "ls"): set(),
    ("storage", "cat"): {"--range"},
    ("storage", "rsync"): {"--recursive"},
}

home = Path(os.environ["FAKE_GCLOUD"])


def end(message, code=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(code)


def parse(argv):
    """The command, its flags and its other words, as gcloud's own parser would have them."""
    command = next((c for c in FLAGS if tuple(argv[: len(c)]) == c), None)
    if command is None:
        end(f"Invalid choice: {argv[:4]}", 2)
    flags, words = {}, []
    for word in argv[len(command) :]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            if name not in FLAGS[command] | WIDE:
                end(f"unrecognized arguments: {name}", 2)
            if name in flags:
                end(f"{name} is given twice", 2)
            flags[name] = value
        else:
            words.append(word)
    return command, flags, words


def end_processes():
    """What runs on the workers goes with the slice."""
    for file in home.glob("worker-*/pids"):
        for pid in file.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def describe(kind):
    if (home / "broken").exists():
        end((home / "broken").read_text())
    file = home / ("request" if kind == "queued-resources" else "node")
    if not file.exists():
        end("NOT_FOUND: Resource 'projects/p/locations/z/x' was not found.")
    states = home / f"states-{kind}"
    coming = states.read_text().split() if states.exists() else []
    if coming:
        file.write_text(coming[0])
        states.write_text("\n".join(coming[1:]))
    print(file.read_text())


def create(kind):
    file = home / ("request" if kind == "queued-resources" else "node")
    if file.exists():
        end("ALREADY_EXISTS: Resource already exists.")
    if (home / "no_capacity").exists():
        end("RESOURCE_EXHAUSTED: There is no more capacity in the zone.", 1)
    import shutil  # slow to import, and every command here is a process

    for worker in home.glob("worker-[0-9]*"):
        shutil.rmtree(worker)
    if kind == "queued-resources":
        file.write_text("ACTIVE")
    (home / "node").write_text("READY")


def delete(kind, flags):
    file = home / ("request" if kind == "queued-resources" else "node")
    if not file.exists():
        end("NOT_FOUND: no such resource")
    if kind == "queued-resources" and (home / "node").exists() and "--force" not in flags:
        end("FAILED_PRECONDITION: the nodes are still there: --force")
    end_processes()
    for name in ("request", "node"):
        (home / name).unlink(missing_ok=True)


def ssh(flags):
    worker = flags["--worker"]
    unreachable = home / "unreachable"
    if (home / "node").read_text() != "READY" or (unreachable.exists() and worker in unreachable.read_text()):
        end(f"cannot connect to worker {worker}")
    place = home / f"worker-{worker}"
    place.mkdir(exist_ok=True)
    environment = {
        "HOME": str(place),
        "PATH": f"{home / 'worker_bin'}:/usr/bin:/bin",
        "FAKE_GCLOUD": str(home),
        "WORKER": worker,
    }
    # As gcloud and ssh do: the command is split at spaces, joined again, and read by the login shell.
    command = " ".join(flags["--command"].split(" "))
    os.chdir(place)
    os.execve("/bin/bash", ["bash", "-c", command], environment)


def local(url):
    return home / "bucket" / url.removeprefix("gs://")


def storage(verb, words):
    if verb == "ls":
        path = local(words[0])
        if not path.exists():
            end("One or more URLs matched no objects.")
        for child in sorted(path.iterdir()) if path.is_dir() else [path]:
            print(f"gs://{child.relative_to(home / 'bucket')}{'/' if child.is_dir() else ''}")
    elif verb == "cat":
        path = local(words[0])
        if not path.exists():
            end("The following URLs matched no objects or files:")
        sys.stdout.write(path.read_text())
    else:
        if not Path(words[1]).is_dir():
            end("Destination (rsync) must be an existing directory")
        import shutil

        shutil.copytree(local(words[0]), words[1], dirs_exist_ok=True)


def main():
    argv = sys.argv[1:]
    with open(home / "commands.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(argv) + "\n")
    if (home / "logged_out").exists():
        end((home / "logged_out").read_text())
    command, flags, words = parse(argv)
    if command[0] == "storage":
        return storage(command[1], words)
    if len(words) != 1:
        end(f"one name is expected, not {words}", 2)
    kind, verb = command[2:]
    if verb == "describe":
        describe(kind)
    elif verb == "create":
        create(kind)
    elif verb == "delete":
        delete(kind, flags)
    else:
        ssh(flags)


if __name__ == "__main__":
    main()
