"""The generate command: text as it is written, the same on any mesh, and mistakes in one line."""

import re
import sys

import numpy as np
import pytest
from support import call, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.generate import LOOK_EVERY, GenerateConfig, generate, main, show_answers
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import Text
from fr3e_jax.types import Rollouts

QUICKSTART = ["--model=quickstart", "--prompt=347+285="]


def generated(*flags, start=call):
    done = start("generate", *QUICKSTART, "--raw", *flags)
    assert done.returncode == 0, done.stderr
    return done


def test_the_answer_is_what_transformers_generates():
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM

    directory = find_model("quickstart")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    query = torch.tensor([tokenizer.encode("347+285=", add_special_tokens=False)])
    model = AutoModelForCausalLM.from_pretrained(directory)
    answer = model.generate(query, max_new_tokens=64, do_sample=False)[0, query.shape[1] :]
    done = generated()
    assert done.stdout == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert "987,264 parameters" in done.stderr
    assert re.search(rf"\n{len(answer)} tokens \| first after", done.stderr)
    cut = generated("--max_new_tokens=5")
    assert cut.stdout == done.stdout[:5] + "\n"
    assert "5 tokens, 1 answer(s) cut before the end" in cut.stderr


def test_a_run_stands_for_the_model_that_it_ended_with(whole_run, tmp_path):
    """In every command that takes a model by its name."""
    directory, _ = whole_run
    assert find_model(str(directory)) == directory / "model"
    flags = ["--prompt=347+285="]
    as_asked = call("generate", "--model", directory, *flags)  # through the template of the run
    other = call("generate", "--model", directory / "model", *flags, "--template=plain")
    assert as_asked.returncode == 0 and as_asked.stdout == other.stdout
    refused = call("generate", "--model", directory / "model", *flags)
    assert refused.returncode == 2 and "choose another, such as plain" in refused.stderr
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "model").mkdir()
    for command in (["generate", "--model", tmp_path, *flags], ["train", "--model.path", tmp_path]):
        refused = call(*command)
        assert refused.returncode == 2
        assert "is a run that has not ended" in refused.stderr and "fr3e_jax.export --run" in refused.stderr


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_not_on_the_mesh():
    flags = ["--n=5", "--temperature=1.5"]
    alone = generated(*flags, start=run)  # on one device
    answers = alone.stdout.splitlines()
    assert len(answers) == 5 and len(set(answers)) > 1
    assert generated(*flags).stdout == alone.stdout  # 2 copies of 4 parts
    assert generated(*flags, "--tensor=1").stdout == alone.stdout  # 8 copies
    assert generated(*flags, "--seed=1").stdout != alone.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=quickstart"], "prompt"),
        (["--prompt=hello"], "model"),
        (["--model=/nowhere", "--prompt=1"], "/nowhere"),
        (QUICKSTART, "no chat template"),
        ([*QUICKSTART, "--raw", "--n=2"], "--temperature"),
        ([*QUICKSTART, "--raw", "--temperature=-1"], "temperature is -1"),
        ([*QUICKSTART, "--raw", "--top_k=-1"], "top_k is -1"),
        ([*QUICKSTART, "--raw", "--top_p=0"], "top_p is 0"),
        ([*QUICKSTART, "--raw", "--max_new_tokens=0"], "max_new_tokens is 0"),
        ([*QUICKSTART, "--raw", "--tensor=3"], "the largest that does is 4"),
        ([*QUICKSTART, "--raw", "--tensor=8"], "the largest that does is 4"),
        (["--model=quickstart", "--prompt=", "--raw"], "the prompt is empty"),
        (["--model=quickstart", f"--prompt={'1' * 300}", "--raw"], "300 tokens"),
        ([*QUICKSTART, "--rawr"], "rawr"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert ended.value.code == 2
    assert message in error and out == ""
    assert len(error.splitlines()) == 1


def byte_text():
    """A tokenizer with one token per byte, so that a character can be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer), (0,), "plain")


def growing(tokens, steps, check):
    """Rollouts of one branch that grows to each of `steps`; `check` looks at each of them in between."""
    for step in steps:
        token = np.zeros((1, 1, len(tokens)), np.int32)
        token[0, 0, :step] = tokens[:step]
        nothing = np.zeros(token.shape, np.float32)
        length, stopped = np.array([[step]], np.int32), np.array([[step == len(tokens)]])
        yield Rollouts(token, nothing, nothing, nothing, length, stopped)
        check(step)


@pytest.mark.parametrize("said", ["naïve 🙂 答", "plain words", " leading and  double spaces "])
def test_text_is_shown_as_it_grows_and_characters_are_shown_whole(capsys, said):
    text = byte_text()
    tokens = text.query(said)
    data = said.encode()
    assert len(tokens) == len(data)
    shown = ""

    def check(step):
        nonlocal shown
        shown += capsys.readouterr().out
        assert shown == data[:step].decode(errors="ignore")

    config = GenerateConfig(model="", prompt="")
    assert show_answers(config, text, growing(tokens, range(1, len(tokens) + 1), check)) == [said]
    assert shown + capsys.readouterr().out == said + "\n"


def test_decoding_stops_when_the_answers_that_were_asked_for_have(monkeypatch, capsys):
    """Seven of eight copies of the model sample for nobody, and go on for longer."""
    rounds, advance = [], Engine.advance
    monkeypatch.setattr(Engine, "advance", lambda *a, **k: rounds.append(1) or advance(*a, **k))
    config = GenerateConfig("quickstart", "347+285=", raw=True, tensor=1, temperature=2.0)
    generate(config)
    tokens = int(re.search(r"\n(\d+) tokens", capsys.readouterr().err).group(1))
    assert len(rounds) == 1 + -(-(tokens - 1) // LOOK_EVERY)


def test_an_answer_cut_within_a_character_is_shown_to_its_end(capsys):
    text = byte_text()
    tokens = text.query("a🙂")[:-1]
    show_answers(GenerateConfig(model="", prompt=""), text, growing(tokens, [2, 4], lambda _: None))
    assert capsys.readouterr().out == "a\ufffd\n"
