"""Training by the command with other algorithms, and with the choices of the release."""

import pytest
import yaml
from support import SMALL, metrics, run


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "grpo++"])
def test_the_baselines_run_from_the_same_code(tmp_path, algorithm):
    done = run("train", *SMALL, "--steps=2", "--algorithm", algorithm, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["explore"]["positions"] == 0
    last = metrics(tmp_path / "run")[-1]
    assert "entropy/positions" not in last
    assert (last.get("states/rejected", 0) > 0) == (algorithm == "grpo++")


@pytest.mark.slow
def test_the_released_settings_and_kl_run(tmp_path):
    options = [
        "--steps=2",
        "--explore.rule=surprisal",
        "--explore.min_gap=2",
        "--explore.keep=random_of_each",
        "--credit.first_state=released",
        "--credit.sharpen=true",
        "--credit.normalize_std=true",
        "--credit.reject=query",
        "--loss.dual_clip=10",
        "--loss.kl_coefficient=0.01",
        "--optimizer.epochs=2",
    ]
    done = run("train", *SMALL, *options, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    # The policy leaves its reference with the first update.
    assert metrics(tmp_path / "run")[-1]["update/reference_kl"] > 0
