"""Trackers that are told of a run: what they are sent, and that none can end a run or hold it up."""

import json
import os
import subprocess
import sys
import time
import types

import pytest
from environment import REPOSITORY
from etils import epath
from support import changed

from fr3e_jax.config import Config, ConfigError
from fr3e_jax.run import trackers
from fr3e_jax.run.reporter import Reporter, open_reporter, read_metrics
from fr3e_jax.run.tracker_process import OPENERS, SAMPLE_COLUMNS, numbers_of, pass_to, rows_of
from fr3e_jax.run.trackers import Tracker, require_trackers, run_identity

SAMPLE = {
    "question": "2+2=",
    "answer": "4",
    "prefix": "two `and|\ntwo",
    "position": 7,
    "entropy": 1,  # a whole number, where the column holds reals
    "continuations": ["4\ud800", "<script>5</script>"],
    "rewards": [1.0, 0],
    "value": 0.5,
}
ROWS = [
    [3, "2+2=", "4", "two `and|\ntwo", 7, 1.0, "4?", 1.0, 0.5],
    [3, "2+2=", "4", "two `and|\ntwo", 7, 1.0, "<script>5</script>", 0.0, 0.5],
]
FAKE = """
import json, os, time

def write(what, *values):
    with open(os.environ["FAKE_WRITES"], "a") as file:
        file.write(json.dumps([what, *values]) + "\\n")

class Table:
    def __init__(self, columns, data):
        self.rows = data

class Run:
    def log(self, values, step):
        if os.environ["FAKE_DOES"] == "throw" and step == 2:
            raise RuntimeError("the tracker has no more room")
        if os.environ["FAKE_DOES"] == "hang":
            time.sleep(600)
        write("log", step, {name: getattr(value, "rows", value) for name, value in values.items()})

    def finish(self):
        write("finish")

def init(**settings):
    if os.environ["FAKE_DOES"] == "no network":
        raise ConnectionError("no route to host")
    write("init", settings["id"], settings["resume"], settings["config"]["seed"])
    return Run()
"""


def config_of(*names):
    return changed(Config(steps=8), report__to=list(names))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package `wandb` for the processes that are started: a function (what it does) -> what it was told."""
    folder, written = tmp_path / "packages", tmp_path / "written.jsonl"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
    monkeypatch.setenv("FAKE_WRITES", str(written))

    def told(does):
        monkeypatch.setenv("FAKE_DOES", does)
        return lambda: [json.loads(line) for line in written.read_text().splitlines()]

    return told


def report(directory, start, steps):
    """Report some steps: seconds that the steps took, and seconds until all is closed."""
    begun = time.monotonic()
    with open_reporter(directory, config_of("wandb"), start) as reporter:
        for step in steps:
            reporter.step({"step": step, "update/loss": step / 2, "alarms": {"cut": "text"}}, SAMPLE)
            if step == 3:
                time.sleep(0.5)  # a tracker that fails has done so by now
        taken = time.monotonic() - begun
    return taken, time.monotonic() - begun


def test_a_tracker_is_told_of_each_step_and_a_resumed_run_goes_on_under_its_id(tmp_path, fake):
    told = fake("work")
    report(tmp_path, 0, range(3))
    report(tmp_path, 2, range(3, 5))
    identity = json.loads((tmp_path / "report.json").read_text())["id"]
    begun, ended = ["init", identity, "allow", 0], ["finish"]
    lines = told()
    assert [line[:2] for line in lines] == [
        *(begun[:2], ["log", 0], ["log", 1], ["log", 2], ended),
        *(begun[:2], ["log", 3], ["log", 4], ended),
    ]
    assert lines[0] == begun and lines[6] == ["log", 3, {"update/loss": 1.5, "rollouts": ROWS}]
    assert run_identity(epath.Path(tmp_path), 0) != identity  # a run that begins anew is another one


@pytest.mark.parametrize(
    ("does", "warning"),
    [
        ("throw", "report.to wandb is given up (it ended: RuntimeError: the tracker has no more room)"),
        ("no network", "report.to wandb is given up (it ended: ConnectionError: no route to host)"),
        ("hang", "report.to wandb was not done 1 s behind the end, and is stopped"),
    ],
)
def test_a_tracker_that_fails_or_hangs_neither_ends_a_run_nor_slows_it(
    does, warning, tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 1.0)
    fake(does)
    taken, until_closed = report(tmp_path, 0, range(8))
    assert taken < 2.0 and until_closed - taken < 3.0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning") == 1 and warning in printed
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(8))


def test_a_tracker_that_is_too_far_behind_is_given_up(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(trackers, "WAITING_MESSAGES", 3)
    fake("hang")
    tracker = Tracker("wandb", json.loads(settings(tmp_path, 0)) | {"config": {"seed": 0}})
    large = {"metrics": {"step": 1}, "sample": None, "filling": "x" * 2**20}
    for _ in range(8):  # more than the pipe and the queue hold
        tracker.send(large)
        time.sleep(0.01)
    assert tracker.warnings() == [
        "warning: report.to wandb is given up (it is 3 steps behind); metrics.jsonl has all of it"
    ]
    assert tracker.process.returncode and not tracker.thread.is_alive()
    tracker.send(large)
    assert tracker.warnings() == tracker.close(time.monotonic()) == []


def test_a_full_queue_never_holds_up_a_step(tmp_path):
    """A reporter whose trackers take nothing."""

    class Deaf:
        def send(self, message):
            json.dumps(message)

        def warnings(self):
            return ["warning: it is deaf"]

        def close(self, deadline):
            return []

    with Reporter(epath.Path(tmp_path), 2, 0, trackers=[Deaf()]) as reporter:
        reporter.step({"step": 0})
    assert "it is deaf" in (tmp_path / "log.txt").read_text()


def test_columns_have_one_type_and_what_is_no_finite_number_is_no_metric():
    assert rows_of(3, SAMPLE) == ROWS and rows_of(3, None) == []
    assert all([type(x) for x in row] == list(SAMPLE_COLUMNS.values()) for row in rows_of(3, SAMPLE))
    metrics = {"step": 3, "a": 1, "b": 0.5, "alarms": {"cut": "text"}, "c": float("nan"), "d": float("inf")}
    assert numbers_of(metrics) == {"a": 1, "b": 0.5}


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(trackers.TRACKER_PACKAGES, "trackio", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'fr3e_jax\[trackio\]' brings it"):
        require_trackers(config_of("trackio").report)
    require_trackers(config_of().report)


def messages(*steps):
    sent = [{"metrics": {"step": step, "reward/base_mean": step / 4}, "sample": SAMPLE} for step in steps]
    return map(json.dumps, sent)


def settings(directory, first):
    return json.dumps(
        {"id": "0a1b", "project": "p", "name": "n", "directory": str(directory), "first_step": first}
        | {"scratch": str(directory), "config": {}}
    )


def test_trackio_is_given_the_names_and_the_id(monkeypatch):
    calls = []
    package = types.ModuleType("trackio")
    package.init = lambda **kinds: calls.append(("init", kinds["name"], kinds["resume"]))
    package.Table = lambda columns, data: (columns, data)
    package.log = lambda values, step: calls.append((step, values))
    package.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", package)
    pass_to("trackio", iter([settings("here", 3), *messages(3)]))
    values = {"reward/base_mean": 0.75, "rollouts": (list(SAMPLE_COLUMNS), ROWS)}
    assert calls == [("init", "n-0a1b", "allow"), (3, values), "finish"]
    assert OPENERS.keys() == trackers.TRACKER_PACKAGES.keys()


def test_tensorboard_has_the_numbers_and_a_text_and_drops_steps_that_are_made_again(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install 'fr3e_jax[tensorboard]'")
    pass_to("tensorboard", iter([settings(tmp_path, 0), *messages(0, 1, 2, 3)]))
    time.sleep(1.1)  # event files are named by the second
    pass_to("tensorboard", iter([settings(tmp_path, 3), *messages(3, 4)]))
    first, second = (events(file) for file in sorted((tmp_path / "tensorboard").iterdir()))
    assert [(step, tags) for step, tags, _ in first if tags][:2] == [
        (0, ["reward/base_mean"]),
        (0, ["rollouts/text_summary"]),
    ]
    assert any(started and step == 3 for step, _, started in second)  # readers drop what is older from 3 on
    assert {step for step, tags, _ in second if tags} == {3, 4}


def events(file):
    """(Step, names, whether it marks a start) of the events of a file of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    rest, found = file.read_bytes(), []
    while rest:
        size = int.from_bytes(rest[:8], "little")
        event = Event.FromString(rest[12 : 12 + size])
        found.append(
            (event.step, [value.tag for value in event.summary.value], event.session_log.status == 1)
        )
        rest = rest[16 + size :]
    return found


def test_the_process_of_a_tracker_imports_no_jax():
    """It starts in a moment, and takes no device."""
    heavy = {"jax", "numpy", "fr3e_jax.config"}
    program = f"import sys, fr3e_jax.run.tracker_process; print(*{heavy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
