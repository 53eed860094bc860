"""Imports go one way: commands -> engine, learner, host -> algorithm, parallel -> types, config."""

import ast
import subprocess
import sys

import pytest
from environment import REPOSITORY

PACKAGE = REPOSITORY / "fr3e_jax"
COMMANDS = {
    "train",
    "sft",
    "generate",
    "evaluate",
    "export",
    "bench",
    "plan",
    "step",
}  # step is the part of train that is the algorithm

# Part of the package -> parts that it may import (itself always). `config` reads the names of options
# from `algorithm`; engine and learner are handed models and do not build them; host reads and writes them.
ALLOWED = {
    "models": set(),
    "types": set(),
    "algorithm": {"types"},
    "config": {"algorithm"},
    "cli": {"config", "parallel"},
    "cost": {"types", "models"},
    "hlo": set(),
    "parallel": {"types", "config"},
    "engine": {"algorithm", "parallel", "types", "config", "models"},
    "evaluation": {"config", "engine", "host", "models", "parallel", "types"},
    "learner": {"algorithm", "parallel", "types", "config", "models"},
    "planning": {"config", "cost", "engine", "hlo", "host", "learner", "models", "parallel", "types"},
    "host": {"algorithm", "parallel", "types", "config", "learner", "models"},
}
MODELS_THIRD_PARTY = {"jax", "flax", "numpy"}


def files():
    for folder in (PACKAGE, REPOSITORY / "models"):
        for file in sorted(folder.rglob("*.py")):
            if not file.is_relative_to(PACKAGE / "models"):
                yield file


def part_of(file):
    if file.is_relative_to(REPOSITORY / "models"):
        return "models"
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("file", list(files()), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_imports_go_one_way(file):
    part = part_of(file)
    if part in COMMANDS or part == "__init__":
        return
    for name in imported(file):
        root, _, rest = name.partition(".")
        if root == "fr3e_jax":
            target = rest.partition(".")[0]
            assert target == part or target in ALLOWED[part], f"{part} imports {name}"
        assert root != "models", "the installed name is fr3e_jax.models"


def test_models_import_little_beyond_jax_and_flax():
    standard = {"collections", "dataclasses", "functools", "json", "math", "pathlib", "typing", "fr3e_jax"}
    for file in (REPOSITORY / "models").glob("*.py"):
        roots = {name.partition(".")[0] for name in imported(file)}
        assert roots <= MODELS_THIRD_PARTY | standard, file


def test_algorithm_is_pure():
    """No model, no I/O, no clock, no numpy randomness in algorithm/."""
    for file in (PACKAGE / "algorithm").glob("*.py"):
        assert {name.partition(".")[0] for name in imported(file)} <= {"jax", "typing", "fr3e_jax"}, file


def test_a_run_that_needs_no_scorer_of_others_imports_none():
    """They take seconds, and matplotlib, which reasoning-gym brings, writes into the user's home."""
    heavy = {"reasoning_gym", "matplotlib", "sympy", "math_verify", "pyarrow", "scipy.stats"}
    program = f"import sys, fr3e_jax.train; print(*({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
