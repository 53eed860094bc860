"""Devices are looked for where they may be: a TPU that is not there prints nothing, and none is hidden."""

import os
import subprocess
import sys

import pytest
from environment import of_process
from support import needs_compiler

from fr3e_jax.parallel import devices

LOOK = """
import jax
from jax.extend.backend import register_backend_factory
from fr3e_jax.cli import parse
from fr3e_jax.export import ExportConfig

if {accelerator}:
    def start():
        print("another accelerator was looked for")
        raise RuntimeError("there is none")
    register_backend_factory("another", start, priority=400, fail_quietly=True)
parse(ExportConfig, "export", None, ["--run=x", "--out=y"])
print(jax.default_backend(), jax.device_count())
"""


def looked(accelerator=False, **variables):
    """What a process prints that parses a command line and then asks jax for devices."""
    return started(["-c", LOOK.format(accelerator=accelerator)], **variables)


def started(arguments, **variables):
    """A process of Python that is told nothing of platforms but what `variables` say."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment = plain | of_process(1) | variables
    if "JAX_PLATFORMS" not in variables:
        del environment["JAX_PLATFORMS"]
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


no_tpu_here = pytest.mark.skipif(bool(devices.tpu_signs()), reason="for machines without a TPU")


@needs_compiler
@no_tpu_here
def test_the_library_of_a_tpu_that_is_not_there_prints_nothing():
    """libtpu is installed where these tests compile for TPUs."""
    done = looked()
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu 1\n", "")


@needs_compiler
@no_tpu_here
def test_the_version_prints_no_trace_of_a_tpu_that_is_not_there():
    done = started(["-m", "fr3e_jax", "--version"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\ndevices: 1 x cpu\n")


@no_tpu_here
def test_other_accelerators_are_looked_for_as_ever():
    done = looked(accelerator=True)
    assert "another accelerator was looked for" in done.stdout, done.stderr


@pytest.fixture
def registered(monkeypatch):
    """Whether the TPU is left out, of a call where jax has chosen no platform and nothing says TPU."""
    calls = []
    monkeypatch.setattr(devices, "register_backend_factory", lambda name, *_, **__: calls.append(name))
    monkeypatch.setattr(devices, "TPU_FILES", ())
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)

    def call(platforms=None):
        monkeypatch.setattr(devices.jax, "config", type("config", (), {"jax_platforms": platforms}))
        devices.leave_out_absent_tpu()
        return calls

    return call


@pytest.mark.parametrize(
    ("platforms", "left_out"), [(None, ["tpu"]), ("", ["tpu"]), ("tpu,cpu", []), ("cpu", [])]
)
def test_a_choice_of_platforms_is_kept(registered, platforms, left_out):
    """jax chooses `tpu,cpu` where it sees a TPU on the PCI bus."""
    assert registered(platforms) == left_out


def test_a_tpu_that_jax_did_not_see_is_not_hidden(registered, monkeypatch, tmp_path):
    """Its device file, or what a launcher says of it, is enough; what jax and libtpu set is not."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(devices, "TPU_FILES", (str(tmp_path / "accel*"),))
    assert registered() == []
    (tmp_path / "accel0").unlink()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1")
    assert registered() == []
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    assert registered() == ["tpu"]
