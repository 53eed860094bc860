"""Files of rollouts: none is torn, forgotten, too large in all, or deleted in silence."""

import threading
from pathlib import Path

import numpy as np
import pytest
from environment import REPOSITORY
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from support import files_of_at_most, mesh_of

from fr3e_jax.config import QUICKSTART_MODEL, ConfigError, RecordConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.run.rollout_files import (
    FREED,
    ROLLOUT_COLUMNS,
    Ragged,
    RolloutFiles,
    file_of,
    read_rollouts,
    to_thin,
)
from fr3e_jax.run.storage import StorageError
from fr3e_jax.step.record import Recorder, open_recorder

HERE = Hosts(mesh_of(), 1)
TEXT = load_text(QUICKSTART_MODEL, "plain")

STEPS = st.dictionaries(st.integers(1, 400), st.integers(1, 50), min_size=1, max_size=60)


@given(STEPS, st.integers(1, 1500))
def test_thinning_keeps_the_newest_and_comes_below_the_limit(sizes, most):
    deleted = to_thin(sizes, most)
    left = {step: size for step, size in sizes.items() if step not in deleted}
    assert len(set(deleted)) == len(deleted) and max(sizes) in left
    if sum(sizes.values()) <= most:
        assert deleted == []
    else:
        assert sum(left.values()) <= FREED * most or len(left) == 1


def test_thinning_leaves_old_steps_far_apart_and_new_ones_side_by_side():
    """A run of 200 steps with room for 20 keeps its first one, and ever more of what is newer."""
    sizes = {}
    for step in range(1, 201):
        sizes[step] = 1
        for gone in to_thin(sizes, 20):
            del sizes[gone]
    gaps = np.diff(sorted(sizes))
    assert min(sizes) == 1 and max(sizes) == 200 and 15 <= len(sizes) <= 20
    assert gaps[-1] == 1 and gaps[:4].mean() > 3 * gaps[-4:].mean()
    assert to_thin({1: 1, 2: 1, 3: 1, 4: 1}, 3) == [2, 3]  # by hand: (3 - 1) / 3 < (4 - 2) / 2, then the rest


def columns(text="a", rows=2, size=4):
    """RolloutRows of some rows that say little."""
    kinds = {"string": [text] * rows, "bool": np.ones(rows, bool)}
    noise = np.random.default_rng(0).integers(0, 2**31, rows * size).astype(np.int32)
    lists = {
        "list<int32>": Ragged(noise, np.full(rows, size)),
        "list<float32>": Ragged(noise.astype(np.float32), np.full(rows, size)),
    }
    return {
        name: (kinds | lists).get(c.kind, np.zeros(rows, np.int64) if c.kind == "int64" else None)
        if c.kind in kinds or c.kind in lists or c.kind == "int64"
        else np.zeros(rows, c.kind)
        for name, c in ROLLOUT_COLUMNS.items()
    }


def written(run, steps, start=0, max_gb=1.0, **of_columns):
    files = RolloutFiles(run, start, max_gb)
    for step in steps:
        files.add(lambda: columns(**of_columns))
        files.end(step)
    files.close()
    return files


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_torn_file_is_never_read_and_a_damaged_one_is_named(tmp_path):
    written(tmp_path, [1, 12])
    folder = tmp_path / "rollouts"
    assert names_in(folder) == ["step-000001.parquet", "step-000012.parquet"]
    content = (folder / file_of(12)).read_bytes()
    (folder / (file_of(13) + ".tmp")).write_bytes(content[:100])  # as a kill leaves it
    assert read_rollouts(tmp_path).num_rows == 4 and read_rollouts(tmp_path, 12).num_rows == 2
    with pytest.raises(ConfigError, match=r"has no rollouts of step 13; it has those of steps 1, 12"):
        read_rollouts(tmp_path, 13)
    (folder / file_of(12)).write_bytes(content[:-20])
    with pytest.raises(ConfigError, match=r"step-000012\.parquet is damaged \(.*delete it"):
        read_rollouts(tmp_path)
    assert read_rollouts(tmp_path, 1, ["token", "step"]).column_names == ["token", "step"]
    with pytest.raises(ConfigError, match=r"has no rollouts; record\.every 1"):
        read_rollouts(tmp_path / "other")


def test_text_that_is_no_unicode_is_written_as_an_escape(tmp_path):
    written(tmp_path, [1], text="half \ud800 of a pair")
    assert read_rollouts(tmp_path)["question"].to_pylist() == ["half \\ud800 of a pair"] * 2


def test_files_of_steps_behind_the_checkpoint_are_set_aside_and_counted(tmp_path):
    written(tmp_path, [1, 2, 3, 4])
    lines = []
    with open_recorder(RecordConfig(), tmp_path, 2, HERE, TEXT, lines.append) as found:
        found.check()
    folder = tmp_path / "rollouts"
    assert names_in(folder) == ["aside", "step-000001.parquet", "step-000002.parquet"]
    assert names_in(folder / "aside") == ["step-000003.parquet", "step-000004.parquet"]
    (line,) = lines
    assert "behind step 2 are repeated: 2 files are set aside" in line
    written(tmp_path, [3], start=2, text="another")
    again = written(tmp_path, [], start=2)  # the step was repeated, and is repeated once more
    assert len(again.take_messages()) == 1 and len(names_in(folder / "aside")) == 2
    # What is repeated to the byte, as on CPU, is not kept twice.
    written(tmp_path, [4], start=2)
    assert names_in(folder / "aside") == ["step-000003.parquet"]
    (folder / file_of(4)).unlink()
    # What lies aside goes first where there is no more room.
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    full = written(tmp_path, [3], start=2, max_gb=1.9 * size / 2**30)
    assert "set aside are deleted" in full.take_messages()[0] and len(names_in(folder)) == 3


def test_what_is_deleted_for_room_is_said(tmp_path):
    size = (Path(written(tmp_path / "one", [1]).folder) / file_of(1)).stat().st_size
    files = written(tmp_path / "run", range(1, 6), max_gb=4.5 * size / 2**30)
    assert names_in(tmp_path / "run" / "rollouts") == [file_of(step) for step in (1, 3, 4, 5)]
    (line,) = files.take_messages()
    assert "rollouts of 1 steps are deleted (2), as record.max_gb" in line
    assert files.take_messages() == []


def test_a_full_disk_is_an_error_of_storage_before_the_next_step_and_at_the_end(tmp_path):
    files = RolloutFiles(epath.Path(tmp_path), 0, 1.0)
    recorder = Recorder(files, 1, HERE)
    with files_of_at_most(200):
        files.add(lambda: columns(rows=50))
        files.end(1)
        with pytest.raises(StorageError, match=r"rollouts could not be written.*File too large"):
            recorder.settle()
        files.add(lambda: columns(rows=50))
        files.end(2)
        with pytest.raises(StorageError, match=r"could not be written"):
            files.close()
    assert not list((tmp_path / "rollouts").glob("*.parquet"))


def test_the_error_that_ended_a_run_is_not_hidden_by_one_of_its_rollouts(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        files_of_at_most(200),
        open_recorder(RecordConfig(), tmp_path, 0, HERE, TEXT, print) as recorder,
    ):
        recorder.files.add(lambda: columns(rows=50))
        recorder.files.end(1)
        raise ZeroDivisionError


def test_writing_goes_on_beside_the_step_one_step_at_a_time(tmp_path):
    files, gate = RolloutFiles(tmp_path, 0, 1.0), threading.Event()

    def slow():
        gate.wait(30)
        return columns()

    files.add(slow)
    files.end(1)  # returns though the rows are not made
    files.check()
    assert not (tmp_path / "rollouts").exists()
    gate.set()
    files.add(columns)
    files.end(2)  # waits for the step before
    assert file_of(1) in names_in(tmp_path / "rollouts")
    files.close()
    assert read_rollouts(tmp_path).num_rows == 4


def test_no_process_but_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("fr3e_jax.step.record.is_first", lambda: False)
    with open_recorder(RecordConfig(), tmp_path, 0, HERE, TEXT, print) as recorder:
        assert recorder.files is None and recorder.begin(1) is recorder
        recorder.end()
        recorder.settle()
    assert not any(tmp_path.iterdir())


def test_the_table_of_the_page_names_every_column_as_it_is():
    text = (REPOSITORY / "fr3e_jax" / "run" / "README.md").read_text()
    rows = [f"| `{name}` | {column.kind} | {column.help} |" for name, column in ROLLOUT_COLUMNS.items()]
    assert "\n".join(rows) in text
