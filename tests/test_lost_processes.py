"""One of two real processes never comes, or is killed: the other ends with a line that says where it was."""

import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from support import SMALL, command, ends_of, free_port, start_pair

from fr3e_jax.parallel import waiting
from fr3e_jax.run.reporter import read_metrics
from fr3e_jax.run.storage import StorageError, writing

TIMEOUT = 15
OFTEN = [*SMALL, "--checkpoint.every=1", "--evaluate.every=1"]
LINE = re.compile(
    r"fr3e_jax\.train: error: process (?P<number>\d) of 2 waited (?P<seconds>\d+) s for the others at "
    r"(?P<place>.+) \(--distributed\.timeout (?P<timeout>\d+)\); one of them is gone or late: .+"
)

# A run whose process `number` gets a signal 0.05 s after it has come to a place, in its third step or later:
# the checkpoint of its first step is whole then, since a save waits for the one before.
STRUCK = """
import os, sys, threading, time
from pathlib import Path
from fr3e_jax.parallel import waiting
number, place, signal, when, *sys.argv[1:] = sys.argv[1:]
def strike():
    Path(when).write_text(str(time.time()))
    os.kill(os.getpid(), int(signal))
class Trap(list):
    steps, striking = 0, False
    def append(self, entry):
        super().append(entry)
        self.steps += entry[0].startswith("step ")
        if self.steps >= 3 and entry[0] == place and not self.striking:
            self.striking = True
            threading.Timer(0.05, strike).start()
if os.environ["JAX_PROCESS_ID"] == number:
    waiting.HERE.places = Trap()
from fr3e_jax.train import main
main()
"""
# (where, which process, whether it dies or stands still). The first is lost in the midst of sampling below.
LOSSES = [
    ("update", 1, signal.SIGKILL),
    ("a save", 0, signal.SIGKILL),
    ("an evaluation", 1, signal.SIGSTOP),
]


def start(number, port, *program):
    """One of two processes that train."""
    place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    told = command("train", devices=4, JAX_PROCESS_ID=str(number), FR3E_DISTRIBUTED="1", **place)
    return subprocess.Popen(**told | {"args": [sys.executable, *map(str, program)]})


def assert_says_where(ended, number, places, timeout):
    """Exit code 1 and, last on stderr, the line; neither a traceback nor a stack of C++."""
    code, _, said = ended
    assert code == 1, said
    assert "Traceback" not in said and "stack trace" not in said and "terminate" not in said, said
    lines = said.splitlines()
    assert [line for line in lines if "fr3e_jax.train: error:" in line] == lines[-1:], said
    found = LINE.fullmatch(lines[-1])
    assert found is not None, said
    assert (int(found["number"]), int(found["timeout"])) == (number, timeout), said
    assert int(found["seconds"]) <= timeout + 10, said
    assert all(place in found["place"] for place in places), said


def lose(directory, place, number, how):
    """Train in two processes, of which one dies or stands still; the other says where it was, in time."""
    options = [*OFTEN, "--steps=400", "--run_dir", directory, "--distributed.timeout", TIMEOUT]
    port, when = free_port(), directory.parent / "when.txt"
    program = ["-c", STRUCK, number, place, int(how), when, *options]
    struck, other = (start(each, port, *program) for each in (number, 1 - number))
    try:
        (ended,) = ends_of([other])
        after = time.time() - float(when.read_text())
    finally:
        struck.kill()
        struck.communicate()
    assert after < 3 * TIMEOUT, ended
    # The other may be a little behind or, as saves go on behind the next step, ahead.
    places = [place] if how == signal.SIGKILL and place != "a save" else []
    assert_says_where(ended, 1 - number, places, TIMEOUT)


def steps_saved(directory):
    """Steps of the checkpoints that are whole."""
    return [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_never_comes_says_so(tmp_path):
    program = ["-m", "fr3e_jax.train", *OFTEN, "--run_dir", tmp_path, "--distributed.timeout", 1]
    alone = [start(number, free_port(), *program) for number in (0, 1)]  # at two ports: they do not meet
    for number, ended in enumerate(ends_of(alone, 100)):
        assert_says_where(ended, number, ["'the start' of 'train'"], 1)
        assert ended[2].count("\n") == 1


@pytest.mark.slow
def test_a_process_that_loses_another_says_where_and_the_run_goes_on(tmp_path):
    """A run that loses a process again and again."""
    directory, reached = tmp_path / "run", 0
    for loss in LOSSES:
        lose(directory, *loss)
        assert max(steps_saved(directory)) > reached, loss
        reached = max(steps_saved(directory))
    again = ends_of(start_pair("train", *OFTEN, f"--steps={reached + 1}", "--run_dir", directory))
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"resumed from the checkpoint of step {reached}" in again[0][1]
    assert [line["step"] for line in read_metrics(directory)] == list(range(reached + 2))


# A run whose process `number` alone runs out of memory, as XLA says it, in its third exploration.
SHORT = """
import os, sys
number, *sys.argv[1:] = sys.argv[1:]
import jax
from fr3e_jax.engine.rollout import Engine
whole, calls = Engine.explore, []
def short(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 3 and os.environ["JAX_PROCESS_ID"] == number:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    return whole(self, *arguments, **options)
Engine.explore = short
from fr3e_jax.train import main
main()
"""


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_says_so_and_the_run_goes_on_with_less(tmp_path):
    """The other says that it waited: neither is left in what only both can do, such as a save."""
    directory = tmp_path / "run"
    options = [*SMALL, "--checkpoint.every=1", "--run_dir", directory, "--distributed.timeout", TIMEOUT]
    port, program = free_port(), ["-c", SHORT, 0, *options, "--steps=400"]
    (code, _, said), other = ends_of([start(number, port, *program) for number in (0, 1)])
    last = said.splitlines()[-1]
    assert code == 1 and "Traceback" not in said, said
    assert last.startswith("fr3e_jax.train: error: the memory does not suffice (Out of memory"), said
    assert " for exploration of step " in last and "lower rollout.cache_gb (auto), " in last, said
    assert_says_where(other, 1, [], TIMEOUT)
    saved = max(steps_saved(directory))
    assert f"the checkpoint of step {saved} stands, and --run_dir {directory} goes on from it" in last
    less = ["--optimizer.micro_tokens=256", "--rollout.cache_gb=0.01", "--rollout.queries=16"]
    again = ends_of(start_pair("train", *options, *less, f"--steps={saved + 1}"))
    assert [code for code, _, _ in again] == [0, 0], again
    changed = "optimizer.micro_tokens: 512 -> 256, rollout.cache_gb: auto -> 0.01, rollout.queries: 8 -> 16"
    assert changed in (directory / "log.txt").read_text()
    assert [line["step"] for line in read_metrics(directory)] == list(range(saved + 2))


# An own task whose scorer fails in an evaluation of the first process, when a file is there.
FAILING = """
import os
from pathlib import Path

def problems(split):
    first = 10 if split == "train" else 60
    return [{{"question": f"{{n}}+{{n}}=", "answer": str(2 * n)}} for n in range(first, first + 32)]

def score(response, answer):
    held_out = int(answer) >= 120
    if held_out and os.environ["JAX_PROCESS_ID"] == "0" and Path("{there}").exists():
        raise ValueError("a parser of mine")
    return answer in response
"""


@pytest.mark.slow
def test_where_a_scorer_fails_in_one_process_all_say_so_and_save(tmp_path):
    """In the first, which alone judges the answers of an evaluation."""
    directory, task = tmp_path / "run", tmp_path / "task.py"
    task.write_text(FAILING.format(there=directory / "checkpoints" / "2"))
    options = [*SMALL, "--steps=400", "--credit.short_batch=use", "--checkpoint.every=1"]
    options += ["--evaluate.every=1", "--distributed.timeout=300"]
    options += ["--data.source", task, "--run_dir", directory]
    begun = time.monotonic()
    for code, _, said in ends_of(start_pair("train", *options)):
        assert code == 1 and "Traceback" not in said, said
        last = said.splitlines()[-1]
        assert "fr3e_jax.train: error: " in last and "ValueError: a parser of mine" in last, said
    assert time.monotonic() - begun < 200  # nobody waited until the time-out
    told = [line["step"] for line in read_metrics(directory)]
    assert max(steps_saved(directory)) == told[-1] + 1 > 2  # told when the run goes on, with its evaluation


GLOO = "UNKNOWN: Gloo all-gather failed: Connection closed by peer [127.0.0.1]:41217"


@pytest.fixture
def two(monkeypatch):
    """This process takes itself for the second of two."""
    monkeypatch.setattr(waiting, "rank", lambda: (1, 2))
    monkeypatch.setattr(waiting, "HERE", waiting.Whereabouts())
    waiting.HERE.timeout = 7


def test_places_are_told_from_the_innermost_and_left_again(two):
    with pytest.raises(waiting.HostError) as lost, waiting.waiting("b"):
        with waiting.waiting("before"):
            pass
        with waiting.waiting("a"):
            raise jax.errors.JaxRuntimeError(GLOO)
    assert str(lost.value) == (
        "process 1 of 2 waited 0 s for the others at 'a' of 'b' (--distributed.timeout 7); one of them is "
        f"gone or late: {GLOO}"
    )
    assert waiting.HERE.places == []


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
        ValueError("UNAVAILABLE: tensorstore could not reach the bucket"),
        BrokenPipeError("the reader of stdout had enough"),
    ],
)
def test_faults_of_a_process_itself_stay_what_they_are(two, error):
    with pytest.raises(type(error)) as raised, waiting.waiting("a"):
        raise error
    assert raised.value is error


def test_an_error_of_the_transport_is_one_of_its_own_where_there_is_one_process():
    with pytest.raises(jax.errors.JaxRuntimeError), waiting.waiting("a"):
        raise jax.errors.JaxRuntimeError(GLOO)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (jax.errors.JaxRuntimeError(GLOO), waiting.HostError),
        (ValueError("UNAVAILABLE: no bucket"), StorageError),
    ],
)
def test_a_save_into_a_bucket_tells_a_lost_process_from_a_lost_bucket(two, error, becomes):
    with pytest.raises(becomes), writing("gs://bucket/run"), waiting.waiting("a save"):
        raise error


ENDED = """
import sys, threading, time
from fr3e_jax.parallel import waiting
waiting.rank = lambda: (1, 2)
waiting.HERE.timeout, waiting.GRACE = 7, 0.2
waiting.HERE.{set}
with waiting.waiting("update"):
    threading.Thread(target=waiting.HERE.last_words, args=("a status",)).start()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("set", "code", "line"),
    [("ending = False", 1, True), ("ending = True", 1, True), ("code = 2", 2, False)],
    ids=["unaware", "stuck", "has said why"],
)
def test_the_line_is_said_once_whichever_thread_has_the_news(set, code, line):
    done = subprocess.run(
        [sys.executable, "-c", ENDED.format(set=set)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr.count("\n") == line and ("process 1 of 2 waited" in done.stderr) == line


def test_jax_has_what_ends_processes_with_the_line():
    from jaxlib import _jax

    make = _jax.get_distributed_runtime_client
    with waiting.reporting_losses():
        assert _jax.get_distributed_runtime_client.keywords == {
            "missed_heartbeat_callback": waiting.HERE.last_words
        }
    assert _jax.get_distributed_runtime_client is make
