"""Questions, answers and templates that the model's tokenizer cannot say are refused before anything runs."""

import json

import pytest
from environment import REPOSITORY
from support import call
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError, DataConfig, SourceConfig
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.problems.corpus import make_corpus
from fr3e_jax.rewards.own import import_task

TASK = """
def problems(split):
    first = 0 if split == "train" else 50
    return [{"question": f"{n}+1=", "answer": ANSWER} for n in range(first, first + 50)]

def score(response, answer): return True
"""


@pytest.fixture(scope="module")
def text():
    """One token for each character of additions, and none for others."""
    return load_text(find_model("quickstart"), "plain")


@pytest.fixture(scope="module")
def qwen():
    return load_text(REPOSITORY / "tests" / "qwen2.5_tokenizer_cut", "chat")


def words():
    """A tokenizer of words, which drops the spaces between them and has `<unk>` for other words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    return Text(fast, (1,), "plain")


def write(folder, *rows):
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(dict(zip("qa", row, strict=True))) + "\n" for row in rows)
    )
    return str(folder / "a.jsonl")


def corpus(text, name, scorer=None, **data):
    source = [SourceConfig(name, prompt="q", answer="a", scorer=scorer)]
    return make_corpus(DataConfig(source, **{"held_out": 1} | data), 0, text, 200)


GOOD = [(f"{n}+{n}=", str(2 * n)) for n in range(9)]


def test_the_lost_characters_are_those_that_are_not_there_again(text, qwen):
    assert text.lost(["1+2=", "was 1+2?", "", "é é"]) == {1: "was ?", 3: "é "}
    everything = ["é \U0001f600 \n\t\ufeff \u0000 中", "<|im_end|>", "  "]
    assert qwen.lost(everything) == {}
    # Whole words are said though their letters are not; spaces between words are no loss.
    assert words().lost(["one two", "one three"]) == {1: "thr"}  # "e" and " " are in what is said


def test_a_question_is_refused_with_its_characters_and_its_row(text, tmp_path):
    name = write(tmp_path, *GOOD, ("is 1+1=2?", "2"), ("1-1=", "0"))
    with pytest.raises(ConfigError) as refused:
        corpus(text, name)
    message = str(refused.value)
    assert "cannot say ' -?is', which 2 of" in message
    assert f"{name}, line 10: 'is ?' in 'is 1+1=2?', {name}, line 11: '-' in '1-1='" in message
    assert "use a model whose tokenizer can, or use --data.bad_rows drop, or make a small one" in message
    kept = corpus(text, name, bad_rows="drop")
    assert len(kept.tasks[0]) == 8 and any("they are left out" in line for line in kept.messages)


def test_problems_that_none_of_can_be_said_are_refused_even_where_bad_rows_are_dropped(text, tmp_path):
    name = write(tmp_path, ("a", "1"), ("b", "2"))
    with pytest.raises(ConfigError, match="whose tokenizer can, or make a small one"):
        corpus(text, name, bad_rows="drop")


@pytest.mark.parametrize(
    ("answer", "scorer", "refused"),
    [
        ("red", "exact", "'red' in"),
        ("-1", "exact", "'-' in"),
        ("x", "math", "'x' in"),
        # Another way of writing may be sayable.
        ("-1", "numeric", None),
        (r"\frac{1}{2}", "math", "'frac' in"),
    ],
)
def test_an_answer_that_cannot_be_written_is_refused(text, tmp_path, answer, scorer, refused):
    name = write(tmp_path, *GOOD, ("9+9=", answer))
    if refused is None:
        assert corpus(text, name, scorer)
        return
    with pytest.raises(ConfigError, match=refused):
        corpus(text, name, scorer)


def test_a_benchmark_stays_whole(text, tmp_path):
    """Another number of problems would be another benchmark."""
    name = write(tmp_path, *GOOD)
    source = str(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text(
        '{"question": "who", "answer": "2"}\n{"question": "1+1=", "answer": "2"}\n'
    )
    found = corpus(text, name, bad_rows="drop", held_out_source=source, held_out=2)
    assert len(found.held_out) == 2 and any(
        "cannot say 'how', which 1 of 2" in told for told in found.messages
    )
    with pytest.raises(
        ConfigError, match="held-out problems: the model's tokenizer cannot say 'how', which 1 of 1"
    ):
        corpus(text, name, held_out_source=source, held_out=1)


def test_turns_before_the_question_count_and_control_tokens_do_not(text, qwen, tmp_path):
    chats = [[{"role": "user", "content": f"{n}+1="}] for n in range(9)]
    chats[3].insert(0, {"role": "system", "content": "Hi"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"q": c, "a": "1"}) + "\n" for c in chats))
    with pytest.raises(ConfigError, match="cannot say 'Hi'"):
        corpus(text, str(tmp_path / "a.jsonl"))
    assert corpus(qwen, write(tmp_path, *GOOD, ("1+1=<|im_end|>", "2"))).tasks


def test_a_template_that_cannot_be_said_is_refused(text, qwen):
    data = DataConfig("carry_addition")
    with pytest.raises(
        ConfigError, match=r"data.template 'So \{question\}': the model's tokenizer cannot say 'So '"
    ):
        make_corpus(data, 0, Text(text.tokenizer, text.end_tokens, "So {question}"), 20)
    assert make_corpus(data, 0, qwen, 100).held_out


@pytest.mark.parametrize(("answer", "told"), [("'1'", False), ("'one'", True)])
def test_answers_of_an_own_task_are_told_and_its_questions_refused(text, tmp_path, answer, told):
    import_task.cache_clear()
    (tmp_path / "task.py").write_text(TASK.replace("ANSWER", answer))
    lines = make_corpus(DataConfig(str(tmp_path / "task.py")), 0, text, 20).messages
    assert any("50 of 50 answers have characters that" in line and "'one'" in line for line in lines) == told


def test_the_run_is_refused_before_it_writes_anything(tmp_path):
    """It once trained 16 rounds on padding, and asked for an easier task."""
    flags = ["--data.source", REPOSITORY / "tests" / "own_task_example.py", "--run_dir", tmp_path / "run"]
    refused = call("train", *flags, "--rollout.max_prompt=100", "--rollout.max_response=100")
    message = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2
    assert "problem 0 of" in message and "the model's tokenizer cannot say ' .E" in message
    assert not (tmp_path / "run").exists()
