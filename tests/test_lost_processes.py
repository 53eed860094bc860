"""One of two real processes never comes, or is killed: the other ends with one line that says where it was."""

import os
import re
import signal
import subprocess
import sys

import pytest
from support import SMALL, command, ends_of, free_port, start_pair

from fr3e_jax.host.metrics import read_metrics

TIMEOUT = 10
OFTEN = [*SMALL, "--checkpoint.every=1", "--evaluate.every=1"]
LINE = re.compile(
    r"fr3e_jax\.train: error: process (\d) of 2 waited (\d+) s for the others at (.+) "
    rf"\(--distributed\.timeout {TIMEOUT}\); one of them is gone or late: .+"
)

# A run whose process `number` is killed a moment after it has come to a place for the n-th time.
KILLED = """
import os, signal, sys, threading
from fr3e_jax.parallel import waiting
number, place, count, delay, *sys.argv[1:] = sys.argv[1:]
class Trap(list):
    came = 0
    def append(self, entry):
        super().append(entry)
        self.came += entry[0] == place
        if self.came == int(count) and entry[0] == place:
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
if os.environ["JAX_PROCESS_ID"] == number:
    waiting.HERE.places = Trap()
from fr3e_jax.train import main
main()
"""


def start_killed(number, place, count, delay, *arguments):
    """The pair, the one that is killed first."""
    port = free_port()
    started = []
    for n in (number, 1 - number):
        told = command("train", devices=4, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                       JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(n), FR3E_DISTRIBUTED="1")  # fmt: skip
        told["args"] = [sys.executable, "-c", KILLED, *map(str, (number, place, count, delay, *arguments))]
        started.append(subprocess.Popen(**told))
    return started


def assert_says_where(ended, number, place):
    """Exit code 1 and, last on stderr, the line; neither a traceback nor a stack."""
    code, _, said = ended
    assert code == 1, said
    assert "Traceback" not in said and "stack trace" not in said, said
    lines = said.splitlines()
    assert [line for line in lines if "error: process" in line] == lines[-1:], said
    found = LINE.fullmatch(lines[-1])
    assert found is not None and found[1] == str(number) and int(found[2]) <= 2 * TIMEOUT, said
    assert place in found[3], said


@pytest.mark.parametrize("comes", [0, 1])
def test_a_process_that_waits_for_one_that_never_comes_says_so(tmp_path, comes):
    told = command("train", *OFTEN, "--run_dir", tmp_path, "--distributed.timeout", 1, devices=4,
                   JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}", JAX_NUM_PROCESSES="2",
                   JAX_PROCESS_ID=str(comes), FR3E_DISTRIBUTED="1")  # fmt: skip
    done = subprocess.run(**told, timeout=100)
    assert done.returncode == 1
    found = re.fullmatch(
        rf"fr3e_jax\.train: error: process {comes} of 2 waited \d+ s for the others at 'the start' of 'train' "
        r"\(--distributed\.timeout 1\); .+\n",
        done.stderr,
    )
    assert found, done.stderr


PLACES = {"first_return": 2, "update": 2, "a save": 2, "an evaluation": 3}


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("delay", [0, 0.05])
@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_loses_another_says_where(tmp_path, place, delay, dies):
    directory = tmp_path / "run"
    options = [*OFTEN, "--run_dir", directory, "--distributed.timeout", TIMEOUT]
    killed, other = ends_of(start_killed(dies, place, PLACES[place], delay, *options))
    print(killed, other[2])
    assert killed[0] == -signal.SIGKILL
    assert_says_where(other, 1 - dies, "")
