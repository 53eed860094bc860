"""Each command as a process: what it tells of itself, and the exit code of a mistake."""

import tomllib

import jax
import pytest
from environment import REPOSITORY
from support import call, run

from fr3e_jax import __main__ as front

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
