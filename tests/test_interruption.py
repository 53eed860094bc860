"""A run that is asked to stop, at whatever point, saves and goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import SMALL, command, mesh_of, metrics

from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.interruption import Interrupted, Interruption, exiting_at_sigterm
from fr3e_jax.run.lock_file import LOCK_FILE

# Training that is asked to stop at one call of a function: before it, or in the midst of a rollout.
STOPPING = """
import itertools, os, signal, sys
import fr3e_jax.train as program
from fr3e_jax.run.interruption import Interruption
where, number = sys.argv.pop(1), int(sys.argv.pop(1))
calls = itertools.count(1)
owner = {"check": Interruption}.get(where, program)
inner = getattr(owner, where)
def counted(*arguments):
    if next(calls) == number:
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(*arguments)
setattr(owner, where, counted)
program.main()
"""


def train(directory, where="check", number=0):
    """Run the program; number: of the call of `where` at which it gets SIGTERM."""
    told = command("train", *SMALL, "--run_dir", directory)
    told["args"] = [sys.executable, "-c", STOPPING, where, str(number), *told["args"][3:]]
    return subprocess.run(**told, timeout=600)


slow = pytest.mark.slow  # whole runs


# (Of which function, at which call in a process, which step may be saved then.)
STOPS = [
    ("evaluate_held_out", 1, ()),  # before the first step there is nothing to save
    ("evaluate_held_out", 2, (2,)),  # the step is done, and not told yet
    ("check", 9, (2, 3)),  # in the midst of rollouts, after the evaluation of step 2 again
    ("evaluate_held_out", 1, (4,)),  # the last step is done, and not told yet
]


@slow
def test_a_run_that_is_stopped_again_and_again_goes_on_as_if_nothing_had_happened(tmp_path, whole_run):
    directory = tmp_path / "run"
    for where, number, saved in STOPS:
        stopped = train(directory, where, number)
        assert stopped.returncode == 0, stopped.stderr
        assert "stopped as asked" in stopped.stdout, (where, number)
        assert not (directory / "summary.json").exists()  # the mark of a run that is complete
        assert not (directory / LOCK_FILE).exists()
        steps = sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
        assert steps[-1] in saved if saved else not steps, (where, number)
    again = train(directory)
    assert again.returncode == 0, again.stderr
    assert "resumed from the checkpoint of step 4" in again.stdout
    assert metrics(directory) == metrics(whole_run[0])
    models = [(d / "model" / "model.safetensors").read_bytes() for d in (directory, whole_run[0])]
    assert models[0] == models[1]
    assert json.loads((directory / "summary.json").read_text())["steps"] == 4


@slow
def test_a_run_that_is_complete_and_gets_more_steps_loses_its_mark_until_they_are_done(tmp_path, whole_run):
    directory = tmp_path / "run"
    shutil.copytree(whole_run[0], directory)
    process = subprocess.Popen(**command("train", *SMALL, "--steps=400", "--run_dir", directory))
    deadline = time.monotonic() + 300
    while len(metrics(directory)) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped as asked" in said
    assert not (directory / "summary.json").exists()


def test_sigterm_is_seen_at_the_next_look_and_not_before():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(Hosts(mesh_of(), 1)) as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interruption.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_of_before_is_back_after_an_error_and_none_is_set_by_a_look():
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption(Hosts(mesh_of(), 1))
    interruption.check()
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ZeroDivisionError), interruption:
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_thread_of_a_notebook_no_handler_is_set_and_the_run_goes_on():
    ended = []

    def use():
        with Interruption(Hosts(mesh_of(), 1)) as interruption:
            interruption.check()
            ended.append(True)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_command_that_ends_at_sigterm_cleans_up_first():
    cleaned = []
    with pytest.raises(SystemExit) as ended, exiting_at_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)
    assert ended.value.code == 143 and cleaned == [True]


COUNTING = """
import sys, jax
counts = {}
jax.monitoring.register_event_listener(lambda event, **_: counts.__setitem__(event, counts.get(event, 0) + 1))
import fr3e_jax.train as program
program.main()
at = "/jax/compilation_cache/cache_"
print("COUNTS", counts.get(at + "misses", 0), counts.get(at + "hits", 0))
"""


def compiled(tmp_path, name):
    """(Programs that a run compiled, programs that it found) with a new run directory."""
    told = command("train", *SMALL, "--steps=1", "--run_dir", tmp_path / name, HOME=str(tmp_path))
    for variable in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        told["env"].pop(variable, None)
    told["args"] = [sys.executable, "-c", COUNTING, *told["args"][3:]]
    done = subprocess.run(**told, timeout=600)
    assert done.returncode == 0, done.stderr
    return tuple(int(count) for count in done.stdout.split("COUNTS")[1].split())


@slow
def test_the_second_start_of_a_run_compiles_nothing(tmp_path):
    first, second = compiled(tmp_path, "first"), compiled(tmp_path, "second")
    assert first[0] > 20
    assert second[0] == 0 and second[1] >= first[0]
    assert list((tmp_path / ".cache" / "fr3e_jax" / "compiled").iterdir())
    np.testing.assert_equal(metrics(tmp_path / "second"), metrics(tmp_path / "first"))
