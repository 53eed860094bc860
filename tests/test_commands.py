"""Each command as a process: what it tells of itself, and the exit code of a mistake."""

import pytest
from support import run

COMMANDS = ("train", "sft", "evaluate", "generate", "export", "plan")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_ends_a_process_with_one_line_and_exit_code_2(command):
    refused = run(command, "--no_such_flag=1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"fr3e_jax.{command}: error: ") and "no_such_flag" in refused.stderr
