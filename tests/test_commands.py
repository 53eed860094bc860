"""Each command as a process: what it tells of itself, and the exit code of a mistake."""

import importlib
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import REPOSITORY
from support import call, run

from fr3e_jax import __main__ as front
from fr3e_jax import sft
from fr3e_jax.parallel.memory import out_of_memory

COMMANDS = ("train", "sft", "evaluate", "generate", "export", "plan")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_ends_a_process_with_one_line_and_exit_code_2(command):
    refused = run(command, "--no_such_flag=1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"fr3e_jax.{command}: error: ") and "no_such_flag" in refused.stderr


def test_without_a_command_all_are_listed_with_a_line_each():
    listed = call("__main__")
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    for name, line in front.COMMANDS.items():
        assert f"  {name:<10} {line}" in lines
    assert call("__main__", "--help").stdout == listed.stdout


def test_the_list_names_every_module_that_can_be_run():
    files = (REPOSITORY / "fr3e_jax").glob("*.py")
    modules = {file.stem for file in files if "\ndef main() -> None:" in file.read_text()}
    packages = {p.parent.name for p in (REPOSITORY / "fr3e_jax").glob("*/__main__.py")}
    assert set(front.COMMANDS) == modules - {"__main__"} | packages


@pytest.mark.parametrize("command", ["train", "bench"])
def test_a_command_is_run_with_what_follows_its_name(command):
    """With the help of the command itself, and its refusals."""
    module = front.MODULES.get(command, f"fr3e_jax.{command}").removeprefix("fr3e_jax.")
    shown = call("__main__", command, "--help")
    assert shown.returncode == 0
    assert shown.stdout == call(module, "--help").stdout != front.usage() + "\n"
    assert f"python -m fr3e_jax.{command}" in shown.stdout


def test_a_mistake_in_a_command_reads_as_without_the_front():
    refused = call("__main__", "train", "--no_such_flag=1")
    assert refused.returncode == 2
    assert refused.stderr == call("train", "--no_such_flag=1").stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tran", "there is no command 'tran'; did you mean train?"),
        ("evaluation", "there is no command 'evaluation'; did you mean evaluate?"),
        ("--verison", "there is no option '--verison'; did you mean --version?"),
        ("--steps=4", "there is no option '--steps=4'; choose one of train, "),
        ("", "there is no command ''; choose one of train, "),
    ],
)
def test_a_wrong_command_is_one_line_with_the_nearest_name(argument, message):
    refused = call("__main__", argument)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"fr3e_jax: error: {message}")


def test_the_version_names_jax_and_the_devices():
    shown = run("__main__", "--version", devices=3)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["fr3e_jax", "jax", "jaxlib", "devices:"]
    assert lines[1] == f"jax {jax.__version__}"
    assert lines[3] == "devices: 3 x cpu"


def test_the_version_says_so_where_jax_finds_no_device(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu':\n nothing there")

    monkeypatch.setattr(jax, "devices", none)
    assert front.devices() == "none (Unable to initialize backend 'tpu': nothing there)"


def test_the_installed_script_is_the_same():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fr3e": "fr3e_jax.__main__:main"}


@pytest.mark.parametrize(
    "shortage",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9.31 TiB for an array with shape (99, 99)"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\n  at 0x1"),
        jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("command", "function", "flags", "lower"),
    [
        ("train", "train", (), "rollout.queries"),
        ("sft", "run", (), "batch"),
        ("evaluate", "evaluate", ("--model=quickstart",), "rows"),
        ("generate", "generate", ("--model=quickstart", "--prompt=1"), "max_new_tokens"),
        ("export", "export", ("--run=a", "--out=b"), "max_file_gb"),
        ("bench.__main__", "run_benchmark", ("score",), "repeats"),
    ],
)
def test_a_memory_that_does_not_suffice_is_one_line_with_what_to_lower(
    monkeypatch, command, function, flags, lower, shortage
):
    def short(*_):
        raise shortage

    monkeypatch.setattr(importlib.import_module(f"fr3e_jax.{command}"), function, short)
    ended = call(command, *flags)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    name = command.partition(".")[0]
    assert ended.stderr.startswith(f"fr3e_jax.{name}: error: the memory does not suffice (")
    assert lower in ended.stderr.partition("; lower ")[2]


@pytest.mark.parametrize("allocate", [lambda: jnp.zeros(2**46, jnp.int8), lambda: np.empty(2**50, np.int8)])
def test_what_jax_and_numpy_say_of_a_memory_that_does_not_suffice_is_understood(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as shortage:
        jax.block_until_ready(allocate())
    assert "llocat" in out_of_memory(shortage.value)


def test_another_failure_of_the_devices_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(sft, "run", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        call("sft")


STRAY = "'stray' stands behind no option: options are written --key VALUE, lists --key '[A, B]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rolout"], "there is no benchmark rolout; did you mean rollout?"),
        (
            ["quick"],
            "there is no benchmark quick; choose one of adaptive, load, record, rollout, round, score, "
            "update",
        ),
        ([], "name a benchmark: adaptive, load, record, rollout, round, score, update"),
        (["rollout", "--repeat=3"], "there is no option --repeat; did you mean --repeats?"),
        (["update", "--repeats=0"], "repeats is 0, must be at least 1"),
        (["rollout", "--occupancy_limit", "-1"], "occupancy_limit is -1, must be at least 1"),
        (["load", "--file_gb=0"], "file_gb is 0.0, must be above 0"),
        (["score", "--answers=1.5"], "answers is '1.5', must be a whole number"),
        (["score", "stray"], STRAY),
    ],
)
def test_a_mistake_of_a_benchmark_is_one_line_with_the_nearest_name(arguments, message):
    refused = call("bench.__main__", *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"fr3e_jax.bench: error: {message}\n"


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        ("train", "--explore.rolouts=3", "there is no option --explore.rolouts; did you mean "
         "--explore.rollouts?"),
        ("sft", "--step=3", "there is no option --step; did you mean --steps?"),
        ("evaluate", "--suit=math", "there is no option --suit; did you mean --suite?"),
        ("generate", "--max-tokens=3", "there is no option --max-tokens; did you mean --max_new_tokens?"),
        ("export", "--run_dir=x", "there is no option --run_dir; did you mean --run?"),
        ("generate", "--system=x", "there is no option --system; --help lists those that are there"),
        ("export", "--outt=x", "there is no option --outt; did you mean --out?"),
        ("plan", "--topolgy=v5e-8", "there is no option --topolgy; did you mean --topology?"),
        ("plan", "--assume.reponse=1", "there is no option --assume.reponse; did you mean "
         "--assume.response?"),
        ("evaluate", "--temperature=-0.5", "temperature is -0.5, must be at least 0, or -1 (-1 takes each "
         "benchmark's own)"),
        ("generate", "--n=0", "n is 0, must be at least 1 and at most 4,096"),
    ],
)  # fmt: skip
def test_a_mistake_of_any_command_is_one_line_with_the_nearest_name(command, argument, message):
    needed = {"evaluate": ["--model=m"], "generate": ["--model=m", "--prompt=p"], "export": ["--run=r"]}
    refused = call(command, *needed.get(command, []), argument)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"fr3e_jax.{command}: error: {message}\n"


def test_dashes_in_the_name_of_an_option_are_as_good_as_underscores():
    assert call("generate", "--model=m", "--prompt=p", "--max-new-tokens=0").stderr.startswith(
        "fr3e_jax.generate: error: max_new_tokens is 0, must be at least 1"
    )
