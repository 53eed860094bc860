"""The whole program, as a user runs it: in its own process, on few steps of the quickstart."""

import dataclasses
import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import yaml
from etils import epath
from support import SMALL, call, command, metrics, placement, read, run

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig, resolve
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.models.hf import read_config
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.additions import make_addition
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.rewards.rules import scorer_of
from fr3e_jax.run.lock_file import LOCK_FILE
from fr3e_jax.run.rollout_files import read_rollouts
from fr3e_jax.run.run_dir import (
    begun_anew,
    completed,
    open_run_dir,
    refuse_other_settings,
    what_may_change,
)


def test_a_run_tells_what_it_did(whole_run):
    directory, told = whole_run
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(5))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 2, 4]
    sampled = [line for line in lines if line.get("rounds")]
    for line in sampled:
        assert 0 < line["reward/root_mean"] < 1
        assert 0 < line["entropy/mean"] < line["entropy/positions"]
        assert line["states/accepted"] > 0
        assert line["tokens/generated"] > 0
        assert np.isfinite(line["update/loss"])
        assert line["update/skipped"] == 0
        assert not any("utilisation" in name for name in line)  # of a CPU's peak, which nobody states
    # Clipping acts in the second minibatch of a batch.
    assert max(line["update/clip_low"] + line["update/clip_high"] for line in lines[1:]) > 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["accuracy_before"] == (accuracy := lines[0]["eval/accuracy"])
    assert (lines[0]["eval/problems"], lines[0]["eval/samples"]) == (32, 1)
    assert lines[0]["eval/accuracy_se"] == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 31))
    assert summary["accuracy_after"] == lines[-1]["eval/accuracy"]
    assert summary["tokens_generated"] == lines[-1]["tokens/total"]
    assert {"seconds", "seed", "steps"} <= summary.keys()
    assert yaml.safe_load((directory / "config.yaml").read_text())["explore"]["rollouts"] == 4
    assert "held-out accuracy after" in told
    assert f"{summary['accuracy_after']:.1%}" in told


def test_samples_show_states_with_rewards_between(whole_run):
    directory, _ = whole_run
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert sample["rewards"] == [1.0, 0.0]
        right, wrong = (sample["prefix"] + c for c in sample["continuations"])
        assert right.endswith(f"={sample['answer']}")
        assert not wrong.endswith(f";={sample['answer']}")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_goes_on_as_if_nothing_had_happened(whole_run, tmp_path):
    """Before its first checkpoint, and as soon as those of steps 1 and 3 are there."""
    directory, often = tmp_path / "run", "--checkpoint.every=1"
    for reached in ("metrics.jsonl", "checkpoints/1", "checkpoints/3"):
        process = subprocess.Popen(**command("train", *SMALL, often, "--run_dir", directory))
        deadline = time.monotonic() + 300
        while not ((directory / reached).exists() and metrics(directory)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it had not come to its end
    again = run("train", *SMALL, often, "--run_dir", directory)
    assert again.returncode == 0, again.stderr
    assert "resumed from the checkpoint of step" in again.stdout
    assert f"left by train, process {process.pid} on " in again.stdout and "taken over" in again.stdout
    assert not (directory / LOCK_FILE).exists()
    assert metrics(directory) == metrics(whole_run[0])
    assert read_rollouts(directory).equals(read_rollouts(whole_run[0]))
    ours, theirs = ((d / "model" / "model.safetensors").read_bytes() for d in (directory, whole_run[0]))
    assert ours == theirs


def test_the_resumed_steps_carried_states(whole_run):
    """So that the tests of runs that go on prove that what is carried over survives."""
    carried = {line["step"]: line["states/carried"] for line in metrics(whole_run[0])[1:]}
    assert carried[1] > 0 and carried[2] > 0 and carried[3] > 0


def test_a_finished_run_is_not_run_again(whole_run, tmp_path):
    directory = shutil.copytree(whole_run[0], tmp_path / "run")
    before = (directory / "metrics.jsonl").read_bytes()  # times included
    again = call("train", *SMALL, "--run_dir", directory)
    assert again.returncode == 0, again.stderr
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert f"{directory} holds a complete run of 4 steps; nothing is left to do" in again.stdout
    summary = json.loads((directory / "summary.json").read_text())
    shown = " -> ".join(f"{summary[name]:.1%}" for name in ("accuracy_before", "accuracy_after"))
    assert f"held-out accuracy {shown}; model: {directory}/model" in again.stdout
    fewer = call("train", *SMALL, "--steps=2", "--run_dir", directory)
    assert fewer.returncode == 0 and "--steps 2 asks for fewer steps than it has" in fewer.stdout
    assert "steps: 4" in (directory / "config.yaml").read_text()


def test_a_finished_run_is_exported_again_in_another_type_or_where_its_model_is_gone(whole_run, tmp_path):
    directory = shutil.copytree(whole_run[0], tmp_path / "run")
    config = dataclasses.replace(Config(), run_dir=str(directory), steps=4)
    assert completed(config)["steps"] == 4
    for steps in (2, 3):
        assert completed(dataclasses.replace(config, steps=steps))["steps"] == 4
    assert completed(dataclasses.replace(config, steps=5)) is None
    assert completed(dataclasses.replace(config, model=ModelConfig(export_dtype="bfloat16"))) is None
    shutil.rmtree(directory / "model")
    assert completed(config) is None


def test_a_directory_without_a_saved_step_begins_with_any_settings_and_says_what_changed(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    assert begun_anew(config) == []
    open_run_dir(config, "run")
    assert begun_anew(config) == [f"{tmp_path / 'run'} has no saved step, and begins anew"]
    other = dataclasses.replace(config, seed=1, data=DataConfig(template="boxed"))
    assert refuse_other_settings(other) is None
    (line,) = begun_anew(other)
    assert line.endswith("with other settings: data.template: plain -> boxed, seed: 0 -> 1")


def test_what_an_error_advises_to_change_is_said_to_be_free_or_not(whole_run, tmp_path):
    message = "raise rollout.max_response 40, credit.max_rounds or scoring.workers"
    anywhere = what_may_change(message, epath.Path(tmp_path))
    assert "No step is saved" in anywhere and "begins it anew" in anywhere
    run = epath.Path(whole_run[0])
    there = what_may_change(message, run)
    assert "of these only credit.max_rounds, scoring.workers may change there" in there
    assert "none of these may change" in what_may_change(
        "raise rollout.temperature", epath.Path(whole_run[0])
    )


def test_a_run_is_not_resumed_with_other_settings(whole_run):
    directory, _ = whole_run
    refused = call("train", *SMALL, "--run_dir", directory, "--loss.clip_high=0.4", "--seed=1")
    assert refused.returncode == 2
    assert "other settings: loss.clip_high: 0.28 -> 0.4, seed: 0 -> 1;" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    refused = call("train", *SMALL, "--run_dir", directory, "--resume=never")
    assert refused.returncode == 2
    assert "holds a run" in refused.stderr


MORE_AND_LESS = [
    *SMALL,
    *("--steps=5", "--optimizer.micro_tokens=64", "--optimizer.remat=true", "--credit.max_rounds=20"),
]


def test_a_run_may_have_more_steps_and_less_memory_than_it_began_with(whole_run):
    config = resolve(parse(Config, "train", "configs/quickstart.yaml", MORE_AND_LESS)[0])
    assert refuse_other_settings(dataclasses.replace(config, run_dir=str(whole_run[0]))) is None


@pytest.mark.slow
def test_a_run_may_be_resumed_with_more_steps_and_less_memory(whole_run, tmp_path):
    directory = shutil.copytree(whole_run[0], tmp_path / "run")
    done = run("train", *MORE_AND_LESS, "--run_dir", directory)
    assert done.returncode == 0, done.stderr
    assert metrics(directory)[:4] == metrics(whole_run[0])[:4]
    assert metrics(directory)[-1]["step"] == 5


def test_the_exported_model_says_the_same_in_transformers(whole_run):
    """Token for token, what our engine decodes greedily from the checkpoint's parameters."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import Qwen2ForCausalLM

    directory = whole_run[0] / "model"
    config, text = read_config(directory), load_text(directory, "plain")
    problems = make_addition("carry_addition", DataConfig()).held_out(32)
    engine = Engine(graph_of(config), placement(table=SAMPLING_TABLE), 40, text.end_tokens)
    stream = QueryStream(None, text, 8, Hosts(engine.placement.mesh, 1))
    queries = engine.placement.place_rows(stream.encode(problems))
    ours, _ = engine.sample(read(directory), queries, jax.random.key(0), 0, 1, GREEDY)
    model = Qwen2ForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    right = 0
    query = torch.tensor([text.query(problem.question) for problem in problems])  # all of one length
    answers = model.generate(query, max_new_tokens=40, do_sample=False)[:, query.shape[1] :]
    for row, problem in enumerate(problems):
        length = int(ours.length[row, 0])
        theirs, padding = answers[row, :length].tolist(), answers[row, length:].tolist()
        assert np.asarray(ours.token[row, 0, :length]).tolist() == theirs
        assert set(padding) <= {model.generation_config.pad_token_id}
        right += scorer_of(problem.scorer)(text.decode([theirs])[0], problem.answer, None).right
    assert right / 32 == metrics(whole_run[0])[-1]["eval/accuracy"]


@pytest.mark.slow
def test_sampled_evaluations_measure_the_success_rate_that_first_return_does(tmp_path):
    """Before the first update both ask the same policy, of problems of one distribution."""
    flags = ["--evaluate.temperature=1", "--evaluate.samples=16"]
    done = call("train", *SMALL, *flags, "--steps=1", "--evaluate.every=0", "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    before, after = metrics(tmp_path / "run")
    answers = 32 * 16
    right = before["eval/accuracy"] * answers
    assert right == pytest.approx(round(right)) and right % 16  # answers to a problem differ
    share = after["reward/base_mean"]  # of 8 questions; what differs between questions counts
    assert abs(before["eval/accuracy"] - share) < 4 * np.sqrt(share * (1 - share) * (1 / 32 + 1 / 8))
    assert before["eval/accuracy"] != after["eval/accuracy"]


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    """Its first four steps gain the 30 points of held-out accuracy that all sixteen promise."""
    done = run("train", "--steps=4", "--evaluate.every=0", "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.2 < summary["accuracy_before"] < 0.5
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.3


@pytest.mark.slow
def test_eight_devices_train_as_one_does(whole_run, tmp_path):
    """Metrics of the first step agree to rounding; later ones drift, as any sampled run does.

    Updates are laid out over 2 x 2 x 2 devices, and sampling over 2 x 1 x 4.
    """
    # Compiled anew: of a program that was kept XLA says nothing.
    layout = ["--mesh.data=2", "--mesh.fsdp=1", "--mesh.tensor=4", "--mesh.update_tensor=2"]
    flags = [*layout, "--compilation_cache=off"]
    done = run("train", *SMALL, "--steps=1", "--run_dir", tmp_path / "run", *flags, devices=8)
    assert done.returncode == 0, done.stderr
    # XLA's word for an array that it could only move by giving it whole to every device.
    assert "Involuntary full rematerialization" not in done.stderr
    assert (
        "mesh {'data': 2, 'fsdp': 1, 'tensor': 4}, in updates {'data': 2, 'fsdp': 2, 'tensor': 2} on cpu"
        in done.stdout
    )
    ours, theirs = metrics(tmp_path / "run")[1], metrics(whole_run[0])[1]
    assert ours["tokens/generated"] == theirs["tokens/generated"]
    for name in ("update/loss", "update/grad_norm", "reward/root_mean", "entropy/mean"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--explore.positions=0"], "grpo++"),
        (["--rollout.max_response=1000"], "context of 256"),
        (["--model.path=/nowhere"], "/nowhere"),
        (["--mesh.data=3"], "does not cover"),
        (["--data.template=chat"], "no chat template"),
        (["--rollout.max_prompt=4"], "rollout.max_prompt 4"),
        (["--data.min_digits=1", "--data.max_digits=1"], "held-out problems"),
    ],
)
def test_impossible_settings_are_one_line_and_exit_code_2(tmp_path, flags, message):
    refused = call("train", *SMALL, *flags, "--run_dir", tmp_path / "run")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_run_whose_rate_decays_is_not_resumed_with_more_steps(tmp_path):
    for schedule in ("constant", "linear", "cosine"):
        settings = OptimizerConfig(schedule=schedule)
        config = Config(steps=20, run_dir=str(tmp_path / schedule), optimizer=settings)
        open_run_dir(config, "run")
        (tmp_path / schedule / "checkpoints" / "10").mkdir(parents=True)  # a step, whatever it holds
        longer = dataclasses.replace(config, steps=30)
        patient = dataclasses.replace(config, optimizer=dataclasses.replace(settings, max_skipped=9))
        refuse_other_settings(patient)
        if schedule == "constant":
            refuse_other_settings(longer)
        else:
            with pytest.raises(ConfigError, match="other settings: steps: 20 -> 30;"):
                refuse_other_settings(longer)


def sums(file, count, first):
    """Sums as a data set: their last number is judged by math-verify's rules, in worker processes."""
    problems = make_addition("carry_addition", DataConfig())
    rows = [
        {"problem": problems[i].question, "answer": problems[i].answer} for i in range(first, first + count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_a_run_on_a_file_goes_on_where_it_was_killed_and_not_with_another_file(tmp_path):
    flags = [*SMALL, "--data.source", sums(tmp_path / "sums.jsonl", 300, 0), "--scoring.workers=1"]
    whole = run("train", *flags, "--steps=2", "--run_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "268 problems, 0 duplicates" in whole.stdout
    assert metrics(tmp_path / "whole")[1]["reward/root_mean"] > 0.1
    half = run("train", *flags, "--steps=1", "--checkpoint.every=1", "--run_dir", tmp_path / "half")
    assert half.returncode == 0, half.stderr
    sums(tmp_path / "sums.jsonl", 300, 1)
    refused = call("train", *flags, "--steps=2", "--run_dir", tmp_path / "half")
    assert refused.returncode == 2 and "are not those that" in refused.stderr
    sums(tmp_path / "sums.jsonl", 300, 0)
    after = run("train", *flags, "--steps=2", "--run_dir", tmp_path / "half")
    assert after.returncode == 0, after.stderr
    assert metrics(tmp_path / "half")[-1]["tokens/total"] == metrics(tmp_path / "whole")[-1]["tokens/total"]
    assert metrics(tmp_path / "half")[-1] == metrics(tmp_path / "whole")[-1]
