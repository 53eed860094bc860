"""One process at a time writes to a run directory; a dead one does not keep it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from support import SMALL, call, ends_of, mesh_of, start_pair

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run import lock as module
from fr3e_jax.run.lock import HeldError, Lock, parse_owner, start_of, this_process
from fr3e_jax.run.lock_file import LOCK_FILE, DirectoryLockFile
from fr3e_jax.run.storage import ChangedError, StorageError

HERE = Hosts(mesh_of(), 9)

HOLDING = """
import sys
from etils import epath
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.lock import Lock
with Lock("train", Hosts(None, 9)) as lock:
    lock.take(epath.Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until it gets a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def taken(place, **others):
    """The messages of taking a lock and giving it back."""
    with Lock("train", HERE, **others) as lock:
        lock.take(epath.Path(place))
        return lock.messages


def write_owner(place, **changes):
    """A lock that another process has written."""
    owner = dataclasses.replace(this_process("train"), host="there", token="theirs", beat=1)
    owner = dataclasses.replace(owner, **changes)
    (place / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


def test_a_second_process_is_refused_in_one_line_that_names_the_first(holder, tmp_path):
    with pytest.raises(HeldError) as refused:
        taken(tmp_path)
    assert f"process {holder.pid} on {os.uname().nodename}" in str(refused.value)
    assert "\n" not in str(refused.value)
    command = call("train", "--steps=1", "--run_dir", tmp_path)
    assert command.returncode == 2
    (line,) = [line for line in command.stderr.splitlines() if "error" in line]
    assert f"{tmp_path} is in use by train, process {holder.pid}" in line
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_lock_is_given_back_at_the_end(holder, tmp_path):
    holder.communicate("\n", timeout=60)
    assert list(tmp_path.iterdir()) == []
    assert taken(tmp_path) == []


def test_a_killed_owner_is_replaced_at_once_with_a_line_that_says_so(holder, tmp_path):
    """Also before its parent has looked after it, while its number is still taken."""
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while start_of(holder.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    (message,) = taken(tmp_path)
    assert time.monotonic() - began < module.WATCH
    assert f"left by train, process {holder.pid} on " in message and "taken over" in message


def test_a_number_that_another_process_has_now_is_a_dead_owner(tmp_path):
    write_owner(tmp_path, started="1")
    assert "has ended" in taken(tmp_path)[0]


def test_this_very_process_is_refused_too(tmp_path):
    with Lock("train", HERE) as first:
        first.take(epath.Path(tmp_path))
        first.take(epath.Path(tmp_path))  # nothing happens
        with pytest.raises(HeldError):
            taken(tmp_path)


def test_a_lock_is_given_back_after_an_error_with_the_directories_that_were_made_for_it(tmp_path):
    with pytest.raises(ZeroDivisionError), Lock("train", HERE) as lock:
        lock.take(epath.Path(tmp_path / "a" / "b"))
        assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"BEAT": 0.02, "WATCH": 0.3, "LOOK": 0.02}.items():
        monkeypatch.setattr(module, name, value)


def test_a_living_owner_on_another_machine_is_refused_as_soon_as_it_writes(quick, monkeypatch, tmp_path):
    """Whatever its clock says."""
    monkeypatch.setattr(module, "WATCH", 60.0)
    write_owner(tmp_path, machine="other", time=time.time() + 9999)
    said, ended = [], threading.Event()

    def live():
        for beat in range(2, 1000):
            if ended.wait(0.1):
                return
            write_owner(tmp_path, machine="other", beat=beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(HeldError, match=r"process \d+ on there"):
            taken(tmp_path, say=said.append)
    finally:
        ended.set()
        thread.join()
    assert len(said) == 1 and "watched" in said[0]
    assert parse_owner((tmp_path / LOCK_FILE).read_bytes()).token == "theirs"


def test_an_owner_on_another_machine_that_writes_no_more_is_replaced(quick, tmp_path):
    write_owner(tmp_path, machine="other")
    began = time.monotonic()
    (message,) = taken(tmp_path, say=lambda _: None)
    assert 0.3 <= time.monotonic() - began < 60
    assert "on there, not heard of" in message


def test_an_old_lock_of_another_machine_is_replaced_at_once(tmp_path):
    write_owner(tmp_path, machine="other", time=time.time() - 3600)
    assert "not heard of for 60 minutes" in taken(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"pid": 1}'])
def test_a_damaged_lock_is_watched_and_replaced(quick, tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    assert "an unknown process" in taken(tmp_path, say=lambda _: None)[0]


def test_an_owner_goes_on_writing_and_finds_out_that_it_was_replaced(quick, tmp_path):
    with Lock("train", HERE) as lock:
        lock.take(epath.Path(tmp_path))
        deadline = time.monotonic() + 60
        while parse_owner((tmp_path / LOCK_FILE).read_bytes()).beat < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lock.check()
        write_owner(tmp_path)
        with pytest.raises(StorageError, match=r"taken over by train, process .* on there"):
            while time.monotonic() < deadline:
                lock.check()
    assert parse_owner((tmp_path / LOCK_FILE).read_bytes()).token == "theirs"  # which is not given back


class Slow(DirectoryLockFile):
    """A lock file between whose reading and writing others have time to come."""

    def _content(self):
        content = super()._content()
        time.sleep(0.02)
        return content


def test_of_many_that_try_at_once_one_succeeds(tmp_path):
    """Of those that all saw the same dead owner."""
    write_owner(tmp_path, started="1")
    files = [Slow(tmp_path) for _ in range(8)]
    for file in files:
        file.read()
    won, barrier = [], threading.Barrier(len(files))

    def write(number):
        barrier.wait()
        try:
            files[number].write(f"{number}".encode())
            won.append(number)
        except ChangedError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (tmp_path / LOCK_FILE).read_text() == f"{won[0]}"
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_directory_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run_dir .*file/run cannot be written"):
        taken(tmp_path / "file" / "run")


def test_all_processes_of_a_run_refuse_alike(monkeypatch, holder, tmp_path):
    """A process that is not the first asks nothing itself, and raises what the first one found."""
    said = []

    class Told(Hosts):
        def said(self, text, where):
            said.append(text)
            return text or said[0]

    with pytest.raises(HeldError) as first:
        Lock("train", Told(mesh_of(), 9)).take(epath.Path(tmp_path))
    monkeypatch.setattr(module, "is_first", lambda: False)
    with pytest.raises(HeldError) as second:
        Lock("train", Told(mesh_of(), 9)).take(epath.Path(tmp_path))
    assert str(second.value) == str(first.value) and said[1] == ""


@pytest.mark.slow
def test_two_hosts_of_one_run_are_both_refused_with_exit_code_2(holder, tmp_path):
    ended = ends_of(start_pair("train", *SMALL, "--run_dir", tmp_path))
    assert [code for code, _, _ in ended] == [2, 2]
    for _, _, said in ended:
        (line,) = [line for line in said.splitlines() if "error" in line]
        assert f"{tmp_path} is in use by train, process {holder.pid}" in line
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]
