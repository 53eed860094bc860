"""Imports go one way, from the commands down to types: no circle, and no import that is not drawn here."""

import ast
import collections
import graphlib
import subprocess
import sys

import pytest
from environment import REPOSITORY

PACKAGE = REPOSITORY / "fr3e_jax"
# Folder or file of the package -> those that it may import (itself always): what it does import, and no more.
# A folder stands above what it imports, and there is no circle.
ALLOWED = {
    "types": set(),
    "examples": set(),
    "progress": set(),
    "models": set(),
    "algorithm": set("types".split()),
    "config": set("algorithm".split()),
    "parallel": set("config".split()),
    "cli": set("config parallel".split()),
    "cost": set("models types".split()),
    "rewards": set("config parallel pretrained types".split()),
    "pretrained": set("config models parallel progress types".split()),
    "problems": set("config parallel pretrained rewards types".split()),
    "engine": set("algorithm models parallel types".split()),
    "learner": set("algorithm config models parallel types".split()),
    "run": set(
        "algorithm config engine learner models parallel pretrained problems progress rewards types".split()
    ),
    "step": set(
        "algorithm config cost engine learner models parallel pretrained problems rewards run types".split()
    ),
    "evaluation": set(
        "algorithm config engine models parallel pretrained problems progress rewards run types".split()
    ),
    "library": set(
        "algorithm config engine learner models parallel pretrained problems rewards run step types".split()
    ),
    "planning": set("config cost engine learner models parallel run types".split()),
    "export": set("cli config models parallel pretrained run".split()),
    "generate": set("cli config engine models parallel pretrained problems run types".split()),
    "sft": set("algorithm cli config engine learner models parallel pretrained problems run types".split()),
    "plan": set("cli config models parallel planning pretrained".split()),
    "evaluate": set("cli config engine evaluation models parallel problems rewards run".split()),
    "train": set(
        "algorithm cli config cost engine evaluation learner "
        "models parallel planning pretrained problems rewards run step".split()
    ),
    "study": set("cli config cost evaluation models parallel plan planning progress run step".split()),
    "view": set("cli config progress run step".split()),
    "__main__": set("parallel".split()),
    "bench": set(
        "cli config engine learner models parallel planning pretrained rewards run step types".split()
    ),
}
PURE = {"collections", "dataclasses", "fr3e_jax", "jax", "jaxtyping", "numpy", "typing"}
MODELS_THIRD_PARTY = {"jax", "flax", "jaxtyping", "numpy"}


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


def parts_imported(file):
    """The parts of the package that a file imports, with the names."""
    for name in imported(file):
        root, _, rest = name.partition(".")
        assert root != "models", "the installed name is fr3e_jax.models"
        if root == "fr3e_jax" and rest:
            yield rest.partition(".")[0], name


@pytest.mark.parametrize("file", list(files()), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_imports_go_one_way(file):
    part = part_of(file)
    if part == "__init__":
        return
    for target, name in parts_imported(file):
        assert target == part or target in ALLOWED[part], f"{part} imports {name}"


def test_the_drawing_shows_no_import_that_is_not_there():
    drawn = {part: set() for part in ALLOWED}
    for file in files():
        if part_of(file) != "__init__":
            drawn[part_of(file)] |= {target for target, _ in parts_imported(file)} - {part_of(file)}
    assert drawn == ALLOWED


def test_there_is_no_circle():
    graphlib.TopologicalSorter(ALLOWED).prepare()


def test_models_import_little_beyond_jax_and_flax():
    standard = set("abc collections dataclasses functools json math pathlib typing".split())
    for file in (REPOSITORY / "models").glob("*.py"):
        roots = {name.partition(".")[0] for name in imported(file)}
        assert roots <= MODELS_THIRD_PARTY | standard | {"fr3e_jax"}, file


def test_only_what_reads_and_writes_checkpoints_knows_the_decoder_by_name():
    """All others know it by its protocol, models/decoder.py."""
    knowing = {part_of(file) for file in files() if "fr3e_jax.models.qwen2" in imported(file)}
    assert knowing == {"models", "pretrained"}


def test_algorithm_is_pure():
    """No model, no I/O, no clock, no numpy randomness in algorithm/."""
    for file in (PACKAGE / "algorithm").glob("*.py"):
        assert {name.partition(".")[0] for name in imported(file)} <= PURE, file
        assert "np.random" not in file.read_text(), file


def test_a_run_that_needs_no_scorer_of_others_imports_none():
    """They take seconds, and matplotlib, which reasoning-gym brings, writes into the user's home."""
    heavy = {"reasoning_gym", "matplotlib", "sympy", "math_verify", "pyarrow", "scipy.stats"}
    program = f"import sys, fr3e_jax.train; print(*({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_transformers_gives_no_advice_to_install_torch():
    watch = "import os, sys\nclass Finder:\n    def find_spec(self, name, *_):\n"
    watch += "        if name == 'transformers': print(os.environ.get('TRANSFORMERS_NO_ADVISORY_WARNINGS'))\n"
    program = watch + "sys.meta_path.insert(0, Finder())\nimport fr3e_jax.pretrained.stops"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["1"]


def test_the_package_imports_nothing_until_it_is_asked():
    """Neither `import fr3e_jax` nor the list of the commands takes the seconds that jax does."""
    program = """
import contextlib, io, runpy, sys
sys.argv = ["fr3e"]
with contextlib.redirect_stdout(io.StringIO()):
    import fr3e_jax
    runpy.run_module("fr3e_jax", run_name="__main__")
print(*{name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
"""
    before = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    started = {name.partition(".")[0] for name in before.stdout.split()}
    assert set(found.stdout.split()) - started == {"fr3e_jax"}


def test_no_name_of_a_file_is_that_of_another():
    """A name at the top of a file says one thing; every command has a `main`, every scorer a `score`."""
    places = collections.defaultdict(set)
    own_tasks = PACKAGE / "examples"  # each is read alone, and all tasks have functions of the same names
    shared = [file for file in files() if own_tasks not in file.parents]
    for file in [*shared, *(REPOSITORY / "models").glob("*.py")]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].add(str(file))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
                for name in names:
                    places[name].add(str(file))
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1}
    assert set(twice) <= {"main", "score", "__all__", "__getattr__"}, twice
