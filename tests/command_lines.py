"""Parsing a command line in a test."""

import pytest

from fr3e_jax.cli import parse
from fr3e_jax.config import Config

DEFAULT = "configs/quickstart.yaml"
SOURCES = "data:\n  source:\n  - name: a.jsonl\n    prompt: q\n  - name: b.jsonl\n    {}\n"


def parsed(*argv, config_class=Config):
    return parse(config_class, "train", DEFAULT, list(map(str, argv)))


def refused(capsys, *argv, config_class=Config):
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as ended:
        parsed(*argv, config_class=config_class)
    out, error = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert error.endswith("\n") and len(error.splitlines()) == 1, error
    assert error.startswith("fr3e_jax.train: error: ")
    return error.removeprefix("fr3e_jax.train: error: ").removesuffix("\n")
