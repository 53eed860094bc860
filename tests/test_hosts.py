"""Two real processes of four devices each run one program: training, and what each of them reads."""

import json
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import SMALL, call, ends_of, mesh_of, metrics, run, start_pair, two_processes

from fr3e_jax.config import Config, ConfigError
from fr3e_jax.parallel import hosts
from fr3e_jax.run.reporter import read_metrics
from fr3e_jax.run.rollout_files import read_rollouts
from fr3e_jax.run.run_dir import refuse_other_settings

# Of a mesh, so equal on equal ones: rows are padded, and trees cut into pieces with trunks of their own.
LAYOUT_OF_UPDATES = {"tokens/trained", "flops/update", "update/padding"}
LAYOUT = {"rows/decoded", "rows/occupancy", *LAYOUT_OF_UPDATES}
# What a library of collectives prints at a process's start; its threads mix the pieces of their lines.
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
)
# What has not ended goes on in the next step, so that it is in the checkpoints too.
RARELY = [*SMALL, "--checkpoint.every=4", "--rollout.wait_for=0.8"]
# Of rollouts what does not depend on the order of sums.
EXACT = "step round query question kind trajectory state position token text reason extracted reward".split()


def assert_close(ours, theirs, but=()):
    """Counts are equal, and what is summed in another order nearly so."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - set(but):
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)


def wait_for(there, processes):
    """Until `there()`, which comes while all processes run."""
    deadline = time.monotonic() + 300
    while not there():
        running = all(process.poll() is None for process in processes)
        assert running and time.monotonic() < deadline, ends_of(processes, 5)
        time.sleep(0.02)


# Processes that train compile and wait for one another: minutes on two cores.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run in one process of eight devices."""
    directory = tmp_path_factory.mktemp("one") / "run"
    done = run("train", *RARELY, "--run_dir", directory, devices=8)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run in two processes, of which the second is asked to stop after a step, and started again.

    Then with another layout of updates: over fsdp 4 x tensor 2, where sampling stays on fsdp 8.
    """
    directory = tmp_path_factory.mktemp("two") / "run"
    processes = start_pair("train", *RARELY, "--run_dir", directory)
    wait_for(lambda: any(line["step"] == 1 for line in read_metrics(directory)), processes)
    processes[1].send_signal(signal.SIGTERM)
    stopped = ends_of(processes)
    saved = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    again = ends_of(start_pair("train", *RARELY, "--mesh.update_tensor=2", "--run_dir", directory))
    return directory, stopped, saved, again


@slow
def test_sigterm_on_one_host_saves_one_step_on_all_and_exits_0(two):
    _, stopped, saved, _ = two
    assert [code for code, _, _ in stopped] == [0, 0], stopped
    assert len(saved) == 1 and 1 <= saved[0] < 4
    assert f"step {saved[0]} is saved" in stopped[0][1]


@slow
def test_two_processes_learn_what_one_does(two, one_process):
    directory, _, saved, again = two
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"resumed from the checkpoint of step {saved[0]}" in again[0][1]
    assert "'fsdp': 8, 'tensor': 1}, in updates {'data': 1, 'fsdp': 4, 'tensor': 2}" in again[0][1]
    changed = (
        "mesh.update_tensor: null -> 2, mesh: {data: 1, fsdp: 8, tensor: 1} -> {data: 1, fsdp: 4, tensor: 2}"
    )
    assert f"settings changed since the checkpoint: {changed}" in again[0][1]
    assert_close(metrics(directory), metrics(one_process), LAYOUT_OF_UPDATES)


@slow
def test_logs_metrics_and_export_are_written_once(two, one_process):
    directory, _, _, again = two
    assert "held-out accuracy" in again[0][1]
    assert not GLOO.sub("", again[1][1]).strip(), again[1][1]  # the second process says nothing of its own
    assert [line["step"] for line in read_metrics(directory)] == [0, 1, 2, 3, 4]
    sampled = [line["step"] for line in read_metrics(one_process, "samples.jsonl")]
    assert sampled[0] == 1 and len(sampled) > 1  # not all: a step that carried states fill samples nothing
    assert [line["step"] for line in read_metrics(directory, "samples.jsonl")] == sampled
    kept, alone = (read_rollouts(run).select(EXACT) for run in (directory, one_process))
    assert kept.equals(alone)  # with the verdicts of both processes
    assert (directory / "log.txt").read_text().count("steps: 4 in") == 1
    assert (directory / "model" / "model.safetensors").is_file()


@slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_on_another_mesh(two, one_process, tmp_path):
    directory, _, _, _ = two
    more = [*RARELY, "--steps=5", "--run_dir"]
    for source, mesh, devices in ((directory, ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"], 8),
                                  (one_process, [], 1)):  # fmt: skip
        done = run("train", *more, source, *mesh, devices=devices)
        assert done.returncode == 0, done.stderr
    assert_close(metrics(directory), metrics(one_process), LAYOUT)


# One of two processes, the arguments of which are a port to meet at and its number.
JOINED = """
import os, sys, time
port, number = sys.argv[1:]
os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
               "JAX_PROCESS_ID": number, "FR3E_DISTRIBUTED": "1"}
from fr3e_jax.config import DistributedConfig
from fr3e_jax.parallel import hosts, waiting
from fr3e_jax.parallel.mesh import make_mesh
hosts.initialize(DistributedConfig(timeout=60))
"""
LATE = """
here = hosts.Hosts(make_mesh(1, -1, 1), 1)
here.meet("both are there")
if number == "1":  # not the first, with whom the others would end
    try:
        here.meet("rewards")
    except waiting.HostError as error:
        assert "rewards" in str(error) and "--distributed.timeout 1" in str(error), error
    else:
        raise AssertionError("it did not wait")
    hosts.leave(0)
time.sleep(2)
hosts.leave(0)
"""


ALONE = """
here = hosts.Hosts(make_mesh(1, -1, 1), 60)
def work(failing):
    if number == failing:
        raise KeyError(failing * 500)
    return number
for failing in "01":
    try:
        here.all_or_none(lambda: work(failing), KeyError, "work")
    except KeyError as error:
        whole = failing * 500
        assert error.args[0] == whole if number == failing else error.args[0] == repr(whole)[:400], error
    else:
        raise AssertionError("it went on")
assert here.all_or_none(lambda: work("none"), KeyError, "work") == number
begun, told, impatient = time.monotonic(), [], hosts.Hosts(here.mesh, 5)
impatient.first_alone(lambda: told.append(time.sleep(8)), "long work")  # longer than its time-out
assert time.monotonic() - begun > 7.9 and len(told) == (number == "0")
try:
    impatient.first_alone(lambda: work("0"), "work that fails")
except KeyError:
    assert number == "0"
else:
    assert number == "1"
here.meet("the end")
hosts.leave(0)
"""


def test_processes_end_alike_where_one_fails_and_wait_for_long_work_of_the_first():
    """And they still work together afterwards."""
    two_processes(JOINED + ALONE)


@pytest.mark.slow
def test_a_late_process_is_not_waited_for_longer_than_the_timeout():
    two_processes(JOINED + LATE)


SHARE = """
import json, sys
out, port, number = sys.argv[1:]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from support import mesh_of
from test_hosts import MESHES, texts_on
open(f"{out}.{number}.json", "w").write(json.dumps([texts_on(mesh_of(*sizes)) for sizes in MESHES]))
"""
MESHES = [(1, 8, 1), (2, 1, 4), (1, 1, 8), (2, 2, 2)]


def texts_on(mesh):
    """Which problems a process tokenizes and verifies of a batch, and what all of them know afterwards."""
    from fr3e_jax.config import QUICKSTART_MODEL, DataConfig
    from fr3e_jax.pretrained.text import load_text
    from fr3e_jax.problems.additions import make_addition
    from fr3e_jax.problems.sources import stream
    from fr3e_jax.problems.stream import QueryStream
    from fr3e_jax.rewards.pool import ScoringPool
    from fr3e_jax.rewards.verify import Verifier
    from fr3e_jax.step.record import Recorder
    from fr3e_jax.types import Rollouts, States

    text, pool, read, scored = load_text(QUICKSTART_MODEL, "plain"), ScoringPool(["carry_addition"]), [], []
    inner, begin = text.query, pool.begin
    object.__setattr__(text, "query", lambda *asked: read.append(asked) or inner(*asked))
    pool.begin = lambda asked: scored.extend(asked) or begin(asked)
    here = hosts.Hosts(mesh, 60)
    problems = stream([make_addition("carry_addition", DataConfig())], [1.0], 0)
    queries, problems, _ = QueryStream(problems, text, 8, here).take(40, 8)
    rng = np.random.default_rng(0)
    token = rng.integers(2, 14, (8, 6, 12)).astype(np.int32)
    floats = np.zeros((8, 6, 12), np.float32)
    base = Rollouts(token, floats, floats, floats, np.full((8, 6), 12, np.int32), np.ones((8, 6), bool))
    for i in range(0, 8, 2):  # every second answers right, the first time
        right = text.tokenizer.encode(f"={problems[i].answer}", add_special_tokens=False)
        token[i, 0, : len(right)], base.length[i, 0] = right, len(right)
    read.clear()
    scored.clear()
    verifier = Verifier(text, here, pool)
    queries = QueryStream(None, text, 8, here).encode(problems, 40)
    own = {}
    rewards = verifier.base(base, problems, own)()
    recorder = Recorder(None, 1, here)
    notes = {str(place): list(note) for place, note in sorted(recorder.gathered(own).items())}
    prefix_length = np.zeros((8, 2), np.int32)
    valid = np.array([[True, i % 3 > 0] for i in range(8)])
    states = States(np.arange(8, dtype=np.int32), np.zeros(8, np.int32), token[:, 0], prefix_length, valid)
    whole = verifier.whole(states, base, problems)()
    return {
        "read": len(read),
        "scored": len(scored),
        "queries": [np.asarray(x).tolist() for x in (queries.token, queries.length, queries.index)],
        "rewards": rewards.tolist(),
        "whole": whole.tolist(),
        "notes": notes,
        "own_notes": len(own),
    }


def test_each_process_reads_and_verifies_its_own_rows_and_knows_all(tmp_path):
    two_processes(SHARE, tmp_path / "out")
    found = [json.loads(Path(f"{tmp_path / 'out'}.{n}.json").read_text()) for n in range(2)]
    for sizes, *each in zip(MESHES, *found, strict=True):
        alone = texts_on(mesh_of(*sizes))
        assert np.sum(alone["rewards"]) >= 4
        assert alone["queries"][2] == list(range(40, 48))  # places in the stream, which randomness follows
        for name in ("queries", "rewards", "whole", "notes"):
            assert each[0][name] == each[1][name] == alone[name], sizes
        assert alone["own_notes"] == 48 and all(note[1] for note in alone["notes"].values())
        for name in ("read", "scored", "own_notes"):
            counts = [process[name] for process in each]
            assert sum(counts) == alone[name], sizes
            if sizes != (1, 1, 8):  # there every row is held by both, and one of them answers for it
                assert min(counts) > 0, sizes


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not; set all 3"),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "must be whole numbers",
        ),
    ],
)
def test_what_the_environment_says_of_other_processes_is_checked(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FR3E_DISTRIBUTED", "1")
    refused = call("train", *SMALL, "--run_dir", "/nowhere")
    assert refused.returncode == 2
    assert message in refused.stderr.splitlines()[-1] and refused.stderr.count("error:") == 1


def test_a_machine_that_does_not_say_where_the_other_processes_are_is_told_what_to_set():
    refused = run("train", *SMALL, "--run_dir", "/nowhere", FR3E_DISTRIBUTED="1")
    assert refused.returncode == 2
    assert "the other processes are not found" in refused.stderr.splitlines()[-1]
    assert refused.stderr.count("error:") == 1 and "Traceback" not in refused.stderr


def test_several_processes_need_a_run_directory_that_they_share(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="set --run_dir to a directory that all of them see"):
        refuse_other_settings(Config())


@slow
def test_each_of_several_processes_is_told_that_they_need_a_directory():
    for code, _, said in ends_of(start_pair("train", *SMALL)):
        assert code == 2 and "set --run_dir to a directory that all of them see" in said
