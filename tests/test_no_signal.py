"""What keeps a run from learning is told by its cause: at the start if it is known, else as it was seen."""

import json
import shutil

import numpy as np
import pytest
from environment import REPOSITORY
from safetensors.numpy import load_file, save_file
from support import SMALL, call

from fr3e_jax.config import QUICKSTART_MODEL, Config
from fr3e_jax.engine.finite import NotFiniteError, require_finite
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.step.diagnosis import no_signal
from fr3e_jax.step.metrics import Measured, measure, summarize_step
from fr3e_jax.types import Rollouts, States

QWEN = REPOSITORY / "tests" / "qwen2.5_tokenizer_cut"


# --- causes that are seen


def a_round(**other):
    """Metrics of a round of 40 states, in which nothing stands out."""
    usual = {"states/accepted": 0, "states/rejected": 40, "states/all_wrong": 20, "states/all_right": 20}
    return (
        usual
        | {"states/identical": 0, "response/cut": 0.1}
        | {k.replace("__", "/"): v for k, v in other.items()}
    )


CAUSES = {
    "rollout.max_response": ({"response__cut": 1.0, "states__all_wrong": 40, "states__all_right": 0}, 0),
    "rollout.temperature": ({"states__identical": 40}, 0),
    "scoring.time_limit": ({"states__all_wrong": 40, "states__all_right": 0}, 300),
    "an easier task": ({"states__all_wrong": 40, "states__all_right": 0}, 0),
    "a harder task": ({"states__all_wrong": 0, "states__all_right": 40}, 0),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_told_with_what_helps_and_no_other_is(cause):
    seen, timed_out = CAUSES[cause]
    told = no_signal(Config(), [a_round(**seen), a_round(**seen)], timed_out)
    assert [other for other in CAUSES if other in told] == [cause]
    assert "Of 80 states" in told and "credit.max_rounds" in told


def test_metrics_are_of_all_states_or_of_those_that_are_trained_on():
    """Three states of two rollouts: mixed, right, wrong and the same twice; and one that is none."""
    reward = np.array([[[1, 0], [1, 1], [0, 0], [0, 0]]], np.float32)
    valid = np.array([[True, True, True, False]])
    states = States(
        *np.zeros((2, 1), np.int32), np.zeros((1, 3), np.int32), np.zeros((1, 4), np.int32), valid
    )
    token = np.array([[[1, 2], [1, 3], [4, 0], [4, 5], [6, 7], [6, 7], [0, 0], [0, 0]]], np.int32)
    zeros = np.zeros(token.shape, np.float32)
    rollouts = Rollouts(token, zeros, zeros, zeros, np.full((1, 8), 2, np.int32), np.ones((1, 8), bool))
    value, advantage = reward.mean(axis=2), 3.0 * (reward - reward.mean(axis=2, keepdims=True))
    accepted = np.array([[True, False, False, False]])
    of_states = (reward, value, np.ones_like(value), advantage, accepted)
    told = measure(Measured(rollouts, reward[0], states, rollouts, *of_states, restarts=False))
    assert told["reward/root_mean"] == 0.5 and told["value/mean"] == 0.5
    assert told["value/accepted_mean"] == 0.5
    assert told["advantage/accepted_mean"] == 0.0 and told["advantage/accepted_std"] == 1.5
    counts = {name: told[f"states/{name}"] for name in ("accepted", "rejected", "all_right", "all_wrong")}
    assert counts == {"accepted": 1, "rejected": 2, "all_right": 1, "all_wrong": 1}
    assert told["states/identical"] == 1


def test_a_round_without_accepted_states_is_left_out_of_their_means():
    some = {"value/accepted_mean": 0.5, "states/accepted": 2}
    none = {"states/accepted": 0}
    told = summarize_step([none, some], [])
    assert told["value/accepted_mean"] == 0.5 and told["states/accepted"] == 2


def test_only_drawn_tokens_must_be_finite():
    length, shape = np.array([[2, 1]], np.int32), (1, 2, 3)
    logprob = np.full(shape, -1.0, np.float32)
    logprob[0, 0, 2] = logprob[0, 1, 1] = np.nan  # behind the ends
    zeros = np.zeros(shape, np.float32)
    rollouts = Rollouts(np.zeros(shape, np.int32), logprob, zeros, zeros, length, np.ones((1, 2), bool))
    require_finite(rollouts, "here")
    logprob[0, 1, 0] = np.nan
    with pytest.raises(NotFiniteError, match=r"step 7: 33\.3% of 3 tokens"):
        require_finite(rollouts, "step 7")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A copy of the quickstart model whose weights are finite and whose logits are not."""
    directory = tmp_path_factory.mktemp("models") / "overflowing"
    shutil.copytree(QUICKSTART_MODEL, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_logits_that_are_not_finite_end_every_command(overflowing, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"{i}+1=", "answer": f"{i + 1}"}) + "\n" for i in (1, 2))
    )
    flags = {
        "generate": [f"--model={overflowing}", "--raw", "--prompt=1+1="],
        "evaluate": [f"--model={overflowing}", f"--suite={problems}", "--template=plain", "--rows=8"],
        "train": [*SMALL, f"--model.path={overflowing}", f"--run_dir={tmp_path / 'run'}"],
    }
    flags["evaluate"] += ["--max_response=8", f"--out={tmp_path / 'out'}"]
    places = {"generate": "after 1 tokens", "evaluate": "problems", "train": "evaluation after step 0"}
    for command, asked in flags.items():
        done = call(command, *asked)
        assert done.returncode == 1, (command, done.stderr)
        last = done.stderr.splitlines()[-1]
        assert f"error: {places[command]}: 100.0% of" in last and "not finite" in last


@pytest.mark.slow
def test_a_warm_up_that_diverges_ends(tmp_path):
    done = call(
        "sft",
        "--steps=60",
        "--batch=8",
        "--learning_rate=1e30",
        "--max_grad_norm=1e30",
        f"--out={tmp_path / 'out'}",
    )
    assert done.returncode == 1 and "the loss is nan" in done.stderr


# --- causes that are known at the start


def base_model(directory):
    """Qwen2.5's tokenizer as base models have it: turns end with <|im_end|>, answers with <|endoftext|>."""
    shutil.copytree(QWEN, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 151643}))
    return directory


def test_a_chat_template_whose_turns_the_model_does_not_end_is_told(tmp_path):
    base = base_model(tmp_path / "base")
    for template in ("chat", "boxed_chat"):
        endless = load_text(base, template).endless()
        assert "<|im_end|>" in endless and "<|endoftext|>" in endless
    assert load_text(base, "boxed").endless() is None
    assert load_text(base, "chat", ["<|im_end|>"]).endless() is None
    assert load_text(QWEN, "chat").endless() is None


def test_a_run_with_such_a_template_is_refused_and_an_answer_warned_of(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART_MODEL, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    refused = call(
        "train", *SMALL, f"--model.path={model}", "--data.template=chat", f"--run_dir={tmp_path / 'run'}"
    )
    assert refused.returncode == 2
    assert "data.template chat: the chat template writes ';" in refused.stderr
    assert "rollout.stop" in refused.stderr and len(refused.stderr.splitlines()) == 1
    warned = call("generate", f"--model={model}", "--prompt=1+1=", "--max_new_tokens=2")
    assert warned.returncode == 0 and "without an end token" in warned.stderr
