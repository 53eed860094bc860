"""The wheel holds what the commands need, and works where the working directory has its own `models`."""

import os
import subprocess
import sys
import zipfile

import pytest
import yaml
from environment import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked into a directory of its own."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    # Built from a copy: a build leaves folders beside the sources.
    copy = tmp_path_factory.mktemp("copy") / "fr3e_jax"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True
    )
    if tracked.returncode:
        pytest.skip("the sources are not a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        source, to = REPOSITORY / name, copy / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(os.readlink(source)) if source.is_symlink() else to.write_bytes(source.read_bytes())
    subprocess.run([*build, "--wheel-dir", wheels, str(copy)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_elsewhere(installed, cwd, *arguments):
    """Python in a directory that shadows top-level names, with the wheel first on the path."""
    for name in ("models", "configs"):
        (cwd / name).mkdir(exist_ok=True)
        (cwd / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_brings_one_top_level_package(installed):
    tops = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"fr3e_jax"}


@pytest.mark.slow
def test_commands_find_their_config_from_any_directory(installed, tmp_path):
    shown = run_elsewhere(installed, tmp_path, "-m", "fr3e_jax.train", "--print_config")
    assert shown.returncode == 0, shown.stderr
    assert "source: carry_addition" in shown.stdout
    shown = run_elsewhere(
        installed, tmp_path, "-m", "fr3e_jax.train", "--config", "configs/smollm2_135m.yaml", "--print_config"
    )
    assert "source: word_addition" in shown.stdout, shown.stderr


def test_every_shipped_configuration_is_in_the_wheel(installed):
    """Those in a folder of configs/, which name a base beside it, too."""
    folder = REPOSITORY / "configs"
    shipped = {file.relative_to(folder) for file in folder.rglob("*.yaml")}
    assert any(file.parts[0] == "slices" for file in shipped)
    inside = installed / "fr3e_jax" / "configs"
    assert {file.relative_to(inside) for file in inside.rglob("*.yaml")} == shipped
    assert (inside / "slices" / "qwen2.5_7b_v5e16.yaml").read_text().splitlines()[
        1
    ] == "base: ../qwen2.5.yaml"


def test_the_shipped_tasks_are_in_the_wheel(installed):
    """Their configurations name them by this path, wherever they are read."""
    named = {
        source["name"]
        for file in (REPOSITORY / "configs/domains").glob("*_sft.yaml")
        for source in yaml.safe_load(file.read_text()).get("data", {}).get("source", ())
    }
    assert len(named) == 3
    for name in (*named, "examples/roman.py"):
        assert (installed / "fr3e_jax" / name).is_file()


def test_the_shipped_model_is_in_the_wheel_and_small(installed, tmp_path):
    code = (
        "from fr3e_jax.pretrained.hub import find_model; from fr3e_jax.pretrained.text import load_text;"
        "from fr3e_jax.pretrained.model import open_model; from fr3e_jax.parallel.mesh import make_mesh;"
        "import fr3e_jax; model = open_model('quickstart').place(make_mesh(1, -1, 1));"
        "model.read_params(model.training); d = find_model('quickstart'); load_text(d, 'plain');"
        "print(fr3e_jax.__file__, sum(f.stat().st_size for f in d.iterdir()))"
    )
    shown = run_elsewhere(installed, tmp_path, "-c", code)
    assert shown.returncode == 0, shown.stderr
    file, size = shown.stdout.split()
    assert file.startswith(str(installed))  # the wheel's, not the checkout's
    assert 1e6 < int(size) <= 8e6
