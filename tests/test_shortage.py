"""A run whose memory does not suffice: one line with stage, arrays and options; the checkpoint stands."""

import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from support import SMALL, call, changed, metrics, placement

from fr3e_jax.config import Config, dump
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.update import Learner
from fr3e_jax.parallel.waiting import HostError, blocks_of, waiting
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.checksums import json_sum
from fr3e_jax.run.resume import changed_settings
from fr3e_jax.run.rollout_files import read_rollouts
from fr3e_jax.run.saved import Progress, Record, parse_record, saved_at, saved_steps
from fr3e_jax.run.storage import StorageError
from fr3e_jax.step import shortage
from fr3e_jax.step.shortage import GIBIBYTE, OutOfMemoryError, arrays_alive, raise_shortage

# As XLA says it on CPU and on TPU, and as numpy and Python do on the host.
SHORT = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Attempting to allocate 3.20G. That was not possible. There are 1.10G free.\n  at"
    ),
    MemoryError("Unable to allocate 9.31 TiB for an array with shape (99, 99)"),
    MemoryError(),
]
# Shapes that no other test has: of parameters, of what branches share, and of pages.
PARAMETERS, CACHE, PAGES = (3, 5, 8), (2, 8, 1, 7, 3), (2, 5, 8, 1, 3, 7, 3)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Raises what a run says of an error, without the numbers of this machine."""
    monkeypatch.setattr(shortage, "host_memory", lambda: 3 * GIBIBYTE // 2)

    def tell(error, config, known=None):
        mesh = placement(1, 8, 1).mesh
        raise_shortage(error, config, epath.Path(tmp_path), known or {}, mesh, lambda: None)

    return tell


def raised_in(error, *places):
    """The error, as it comes out of blocks of `waiting`."""
    with pytest.raises(type(error)), contextlib.ExitStack() as blocks:
        for place in places:
            blocks.enter_context(waiting(place))
        raise error
    return error


@pytest.mark.parametrize("error", SHORT, ids=repr)
@pytest.mark.parametrize(
    ("places", "where", "lower"),
    [
        (("train", "step 3", "first_return"), "first return of step 3", "rollout.cache_gb (auto), rollout.q"),
        (("train", "step 3", "explore"), "exploration of step 3", "rollout.cache_gb (auto), rollout.q"),
        (
            ("step 7", "update"),
            "the update of step 7",
            "optimizer.micro_tokens (8192), optimizer.l",
        ),
        (("train", "an evaluation"), "the evaluation", "evaluate.rows (256)"),
        (
            ("train", "step 3"),
            "the work between stages of step 3",
            "rollout.cache_gb (auto), rollout.queries (32), optimizer.micro",
        ),
        (("train", "a save"), "a save", "rollout.cache_gb (auto), rollout.queries (32), optimizer.micro"),
    ],
)
def test_the_message_names_the_stage_and_what_to_lower_as_it_is_set(told, error, places, where, lower):
    error = type(error)(*error.args)
    raised_in(error, *places)
    assert blocks_of(error) == list(places)
    with pytest.raises(OutOfMemoryError) as end:
        told(error, Config())
    message = str(end.value)
    assert "\n" not in message and message.startswith("the memory does not suffice (")
    assert f") for {where}; alive were, GiB of a device: " in message
    assert f"; this process holds 1.50 GiB; lower {lower}" in message
    assert "(now data 1 x fsdp 8 x tensor 1)" in message and "no step is saved in" in message


def test_a_shortage_is_told_where_the_checkpoints_cannot_be_listed(told, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(ocp.step.standard_name_format()), "find_all", refused)
    with pytest.raises(StorageError, match=r"checkpoints cannot be read now; nothing was changed"):
        saved_steps("/run")
    with pytest.raises(OutOfMemoryError, match=r"goes on from its last checkpoint, with such a change"):
        told(MemoryError(), Config())


def test_where_queries_are_auto_their_bound_is_what_to_lower(told):
    error = raised_in(MemoryError(), "step 1", "explore")
    with pytest.raises(OutOfMemoryError, match=r"\(auto\), rollout\.max_queries \(64\), or spread"):
        told(error, changed(Config(), rollout__queries="auto"))


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: something else"),
        StorageError("gs://b cannot be read now (RESOURCE_EXHAUSTED: quota)"),
        HostError("one of them is gone or late: RESOURCE_EXHAUSTED"),
        RuntimeError("no memory of that"),
    ],
)
def test_other_errors_stay_what_they_are(told, error):
    told(error, Config())


def test_arrays_are_counted_by_what_they_are_on_one_device(told):
    """By hand: shards of float32 over 8 parts; a copy in another type is one of parameters."""
    rows = placement(1, 8, 1)
    before = arrays_alive({"parameters": {}, "optimizer": {}})
    params = {"w": rows.place(np.zeros(PARAMETERS, np.float32), None, None, "embed")}
    optimizer = {"m": params["w"] + 1, "count": rows.place(np.int32(0))}
    known = {"parameters": params, "optimizer": optimizer}
    copy = jax.device_put(jnp.zeros(PARAMETERS, jnp.bfloat16), rows.sharding())
    caches = [rows.place(np.zeros(CACHE, np.float32), None, "batch") for _ in range(2)]
    caches.append(rows.place(np.zeros(PAGES, np.float32), None, None, "batch"))
    other = rows.place(np.zeros((16, 9), np.int32), "batch")
    after = arrays_alive(known)
    grown = {name: size - before.get(name, 0) for name, size in after.items() if name != "other arrays"}
    assert grown == {
        "parameters": 3 * 5 * 8 // 8 * 4,
        "optimizer": 3 * 5 * 8 // 8 * 4 + 4,
        "copies or gradients": 3 * 5 * 8 * 2,
        "KV caches": (2 * 2 * 7 * 3 + 2 * 5 * 3 * 7 * 3) * 4,
    }
    assert after["other arrays"] - before.get("other arrays", 0) == 2 * 9 * 4
    caches[0].delete()  # as exploration does
    assert after["KV caches"] - arrays_alive(known)["KV caches"] == 2 * 7 * 3 * 4
    del copy, other
    with pytest.raises(OutOfMemoryError, match=r"parameters 5.59e-08, optimizer 5.96e-08, "):
        told(MemoryError(), Config(), known)


def test_a_device_that_tells_its_limit_is_quoted(monkeypatch):
    def device(used, limit=16 * GIBIBYTE):
        return types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": used, "bytes_limit": limit})

    silent = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [silent, device(GIBIBYTE), device(15 * GIBIBYTE)])
    assert shortage.device_limit() == " (15.00 of 16.00 in use)"
    monkeypatch.setattr(jax, "local_devices", lambda: [silent])
    assert shortage.device_limit() == ""


# --- what may change then


def record_of(config, mesh=None):
    return Record(Progress(), dump(config), {}, mesh)


def test_changed_settings_are_told_in_one_line():
    old = Config()
    new = changed(old, rollout__queries=16, optimizer__micro_tokens=4096, run_dir="there", mesh__fsdp=4)
    before, now = {"data": 1, "fsdp": 8, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 2}
    assert changed_settings(record_of(old, before), new, now) == [
        "settings changed since the checkpoint: optimizer.micro_tokens: 8192 -> 4096, rollout.queries: 32 -> "
        "16, mesh: {data: 1, fsdp: 8, tensor: 1} -> {data: 1, fsdp: 4, tensor: 2}"
    ]
    auto = changed(old, rollout__queries="auto")
    (line,) = changed_settings(record_of(old, before), auto, before)
    assert line.endswith(": rollout.queries: 32 -> auto")
    assert changed_settings(record_of(old, before), dataclasses.replace(old, run_dir="x"), before) == []
    assert changed_settings(record_of(old), old, now) == []  # an earlier version saved no mesh
    assert changed_settings(Record(Progress(), None, {}), new, now) == []


def test_a_checkpoint_says_the_mesh_that_its_parameters_lie_on(tmp_path):
    writer = Checkpoints(tmp_path, keep=1, settings="text")
    state = TrainState({"w": placement(2, 2, 2).place(np.zeros(4))}, {"m": np.zeros(1)})
    writer.save(state, groups.empty_groups(1, 1, 1), Progress(step=1))
    writer.close()
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert saved_at(tmp_path, 1).record.mesh == mesh
    earlier = Record(Progress(step=1), "text", {}).as_json()
    del earlier["mesh"], earlier["sum"]
    assert parse_record(earlier | {"sum": json_sum(earlier)}, 1).mesh is None


# --- a run


def fails_once(monkeypatch, owner, name, at):
    """Let a method raise, as XLA does, at its `at`-th call, and be as it was afterwards."""
    whole, calls = getattr(owner, name), []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, short)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_ends_with_the_message(tmp_path, monkeypatch):
    """Before anything is compiled for it; the log has the message too."""
    monkeypatch.setattr("fr3e_jax.train.evaluate_held_out", lambda *_: {})
    fails_once(monkeypatch, Engine, "sample", 1)
    ended = call("train", *SMALL, "--run_dir", tmp_path / "run")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(
        "fr3e_jax.train: error: the memory does not suffice (Out of memory allocating 123 bytes) for first "
        "return of step 1; alive were, GiB of a device: parameters 0.0"
    )
    assert ", optimizer 0.0" in ended.stderr and ", copies or gradients 0.0" in ended.stderr
    assert "lower rollout.cache_gb (auto), rollout.queries (8), or" in ended.stderr
    assert f"no step is saved in {tmp_path / 'run'}, so that the same command begins it anew" in ended.stderr
    assert "for first return of step 1" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_goes_on_from_its_checkpoint_with_other_rounds_chunks_and_mesh(tmp_path, monkeypatch):
    """Its steps train nothing here; each asks the questions from where the step before ended."""
    directory, asked, failing = tmp_path / "run", [], [True]

    def step(config, parts, reference, state, carried, progress, *_):
        if progress.step == 2 and failing:
            with waiting("explore"):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        count = config.rollout.queries
        asked.append((progress.data_position, count))
        following = progress.data_position + count
        progress = dataclasses.replace(progress, step=progress.step + 1, data_position=following)
        return state, carried, progress, {"step": progress.step}, None

    monkeypatch.setattr("fr3e_jax.train.evaluate_held_out", lambda *_: {})
    monkeypatch.setattr("fr3e_jax.train.train_step", step)
    monkeypatch.setattr("fr3e_jax.run.reporter.step_line", lambda *_: "a step")
    flags = [*SMALL, "--checkpoint.every=1", "--run_dir", directory]
    ended = call("train", *flags)
    assert ended.returncode == 1 and "for exploration of step 3; " in ended.stderr, ended.stderr
    assert "alive were, GiB of a device: parameters 0.0" in ended.stderr
    assert f"the checkpoint of step 2 stands, and --run_dir {directory} goes on" in ended.stderr
    failing.clear()
    changes = ["--rollout.queries=16", "--optimizer.micro_tokens=256", "--mesh.data=2", "--mesh.fsdp=4"]
    done = call("train", *flags, *changes)
    assert done.returncode == 0, done.stderr
    assert asked == [(0, 8), (8, 8), (16, 16), (32, 16)]
    log = (directory / "log.txt").read_text()
    assert (
        "settings changed since the checkpoint: optimizer.micro_tokens: 512 -> 256, rollout.queries: 8 -> "
        "16, mesh: {data: 1, fsdp: 8, tensor: 1} -> {data: 2, fsdp: 4, tensor: 1}"
    ) in log
    assert json.loads((directory / "summary.json").read_text())["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "at", "stage"),
    [
        (Engine, "explore", 2, "exploration of step"),
        (Learner, "update", 5, "the update of step 3"),
    ],
)
def test_the_last_checkpoint_stands_and_goes_on_with_less(tmp_path, monkeypatch, owner, method, at, stage):
    """With other rounds no question is lost or asked twice; with smaller chunks all is as it was."""
    directory, once = tmp_path / "run", [*SMALL, "--checkpoint.every=1"]
    with monkeypatch.context() as patch:
        fails_once(patch, owner, method, at)
        ended = call("train", *once, "--run_dir", directory)
    assert ended.returncode == 1 and stage in ended.stderr, ended.stderr
    saved = max(saved_steps(directory))
    assert f"the checkpoint of step {saved} stands" in ended.stderr and saved >= 1
    less = [*once, "--optimizer.micro_tokens=256"]
    less += ["--rollout.queries=16"] if owner is Engine else []
    done = call("train", *less, "--run_dir", directory)
    assert done.returncode == 0, done.stderr
    assert "settings changed since the checkpoint: optimizer.micro_tokens: 512 -> 256" in done.stdout
    assert ("rollout.queries: 8 -> 16" in done.stdout) == (owner is Engine)
    rows = read_rollouts(directory).to_pylist()
    asked = sorted(query for _, query in {((row["step"], row["round"]), row["query"]) for row in rows})
    assert asked == list(range(len(asked)))
    if owner is Learner:
        whole = tmp_path / "whole"
        assert call("train", *once, "--run_dir", whole).returncode == 0
        for ours, theirs in zip(metrics(directory), metrics(whole), strict=True):
            for line in (ours, theirs):  # the first has an evaluation alone
                line.pop("update/padding", None)
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
