"""Worked solutions of any source, the small model that is made for them, and the shipped example."""

import json
from collections import Counter

import numpy as np
import pytest
from support import call, metrics

from fr3e_jax.config import ConfigError, DataConfig, SFTConfig, SourceConfig
from fr3e_jax.examples import roman
from fr3e_jax.pretrained.stops import token_bytes
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.pretrained.tokenizer import MOST_CHARACTERS, new_tokenizer
from fr3e_jax.problems.corpus import make_corpus
from fr3e_jax.problems.own_task import OwnTask
from fr3e_jax.problems.worked import worked_problems
from fr3e_jax.rewards.own import import_task
from fr3e_jax.sft import make_batch

EXAMPLE = "examples/roman.py"


def rows(folder, count=50, **more):
    lines = [
        {"question": f"{i}+1", "answer": str(i + 1), "solution": f"so {i + 1}"} | more for i in range(count)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "a.jsonl")


def draw(problems, count=400, seed=0):
    return problems.draw(np.random.default_rng(seed), count)


def new_text(problems, template="plain"):
    return Text(new_tokenizer(problems.alphabet(template)), (1,), template)


# --- where solutions come from


def test_the_solutions_of_a_file_are_taught_and_its_held_out_questions_are_not(tmp_path):
    """With the same settings `train` is judged by the questions that `sft` has left out."""
    name = rows(tmp_path)
    drawn = draw(worked_problems(DataConfig(name), 0, 0.5))
    taught = {problem.question for problem, _ in drawn}
    assert all(solution == f"so {problem.answer}" for problem, solution in drawn)
    text = new_text(worked_problems(DataConfig(name), 0, 0.5))
    corpus = make_corpus(DataConfig(name), 0, text, 20)
    held_out = {problem.question for problem in corpus.held_out}
    assert len(held_out) == 5 and len(taught) == 45 and not held_out & taught
    other = tmp_path / "held_out.jsonl"
    other.write_text((tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[7])
    left = draw(worked_problems(DataConfig(name, held_out_source=str(other)), 0, 0.5))
    assert "7+1" not in {problem.question for problem, _ in left}


def test_the_column_of_the_solution_may_have_another_name_or_be_a_chat(tmp_path):
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "It is 2."}]
    name = rows(tmp_path, worked="thus", messages=chat)
    for column, solution in (("worked", "thus"), ("messages", "It is 2.")):
        source = [SourceConfig(name, solution=column)]
        assert draw(worked_problems(DataConfig(source), 0, 0.5), 1)[0][1] == solution
    with pytest.raises(ConfigError, match=r"no column 'steps'; .*; set solution to one"):
        worked_problems(DataConfig([SourceConfig(name, solution="steps")]), 0, 0.5)
    with pytest.raises(ConfigError, match=r"line 1: the solution \(column 'solution'\) is empty"):
        worked_problems(DataConfig(rows(tmp_path, solution=" ")), 0, 0.5)


def test_sources_are_taught_by_their_weights(tmp_path):
    sources = [SourceConfig(rows(tmp_path), 3.0), SourceConfig("carry_addition", 1.0)]
    count = Counter(problem.source for problem, _ in draw(worked_problems(DataConfig(sources), 0, 0.5)))
    assert 0.18 < count["carry_addition"] / 400 < 0.32  # a quarter, within 3 standard errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"task.py has no worked solutions: write a function solution\(row\)"),
        ("def solution(row): return 1 / 0", r"the solution of problem 0 of train failed: ZeroDivisionError"),
        ("def solution(row): return None", r"the solution of problem 0 of train is None; it must be a text"),
        ("def solution(): return ''", r"solution\(\) cannot be called as solution\(row\)"),
    ],
)
def test_own_tasks_without_solutions_are_told_what_to_write(tmp_path, text, message):
    import_task.cache_clear()
    own = "def problems(split): return [{'question': split, 'answer': '1'}]\ndef score(r, a): return 1\n"
    (tmp_path / "task.py").write_text(own + text)
    with pytest.raises(ConfigError, match=message):
        worked_problems(DataConfig(str(tmp_path / "task.py")), 0, 0.5)


@pytest.mark.parametrize("source", ["word_addition", "gym:gcd"])
def test_other_sources_have_no_worked_solutions(source):
    if source.startswith("gym:"):
        pytest.importorskip("reasoning_gym")
    with pytest.raises(
        ConfigError, match=f"{source} has no worked solutions; use carry_addition, a file with"
    ):
        worked_problems(DataConfig(source), 0, 0.5)


# --- the tokenizer that is made


def test_a_new_tokenizer_can_say_all_that_the_problems_have(tmp_path):
    name = rows(tmp_path, answer="ö", solution="first\n\nthen\t7")
    text = new_text(worked_problems(DataConfig(name), 0, 0.5), "Q: {question}!")
    assert text.lost(["first\n\nthen\t7", "Q: 0+1!", "ö"]) == {} and text.lost(["z"]) == {0: "z"}
    ids = text.encoded("first\n\nthen")
    assert text.decode([ids]) == ["first\n\nthen"] and len(ids) == len("first\n\nthen")
    with pytest.raises(ConfigError, match=r"data\.template chat is for models with a chat template"):
        worked_problems(DataConfig(name), 0, 0.5).alphabet("chat")


def test_of_many_characters_it_has_one_token_for_each_byte():
    few, many = ("".join(map(chr, range(0x4E00, 0x4E00 + n))) for n in (MOST_CHARACTERS, MOST_CHARACTERS + 1))
    assert len(new_tokenizer(few)) == MOST_CHARACTERS + 2
    tokenizer = new_tokenizer(many)
    text = Text(tokenizer, (1,), "plain")
    assert len(tokenizer) == 258 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    said = many + " é\n\n\U0001f600 two  spaces"
    assert text.lost([said]) == {} and text.decode([text.encoded(said)]) == [said]
    assert [token_bytes(tokenizer)[i] for i in text.encoded("é")] == [b"\xc3", b"\xa9"]


def test_a_solution_that_the_model_to_begin_from_cannot_say_is_refused(tmp_path):
    problems = worked_problems(DataConfig(rows(tmp_path)), 0, 0.5)
    text = Text(new_tokenizer("0123456789+"), (1,), "plain")
    with pytest.raises(
        ConfigError, match=r"line \d+: the model's tokenizer cannot say 'so ' of the solution"
    ):
        make_batch(SFTConfig(batch=4), problems, text, 0, 64)


# --- the example


def test_numerals_are_right():
    """By hand, and by the additive value of their letters."""
    assert [roman.roman(n) for n in (4, 9, 14, 1994, 3888)] == [
        "IV",
        "IX",
        "XIV",
        "MCMXCIV",
        "MMMDCCCLXXXVIII",
    ]
    assert roman.roman(1994, (True, False, True)) == "MDCCCCXCIIII"
    value = {letter: number for number, letter in roman.NUMERALS.items()}
    for number in range(1, 4000):
        old = roman.roman(number, (True, True, True))
        assert sum(value[letter] for letter in old) == number
        letters = [value[letter] for letter in roman.roman(number)]
        signed = [-a if a < b else a for a, b in zip(letters, [*letters[1:], 0], strict=True)]
        assert sum(signed) == number


def test_the_examples_old_ways_earn_less_and_are_taught_more_often():
    task = OwnTask(EXAMPLE, {})
    row = next(row for row in task.train if row["number"] == 1994)
    assert roman.score("MCMXCIV", "MCMXCIV", row) == 1.0
    assert {roman.score(text, "MCMXCIV", row) for text in ("MDCCCCXCIV", "MDCCCCLXXXXIIII", "MCMXCIIII")} == {
        0.3
    }
    assert {roman.score(text, "MCMXCIV", row) for text in ("", "MCMXCV", "1994", "MCMXCIV ")} == {0.0}
    solutions = [task.solution(task.train.index(row), seed) for seed in range(300)]
    assert 0.5 < np.mean([solution.endswith("IIII") for solution in solutions]) < 0.7
    assert not {r["question"] for r in roman.problems("held_out")} & {r["question"] for r in task.train}


@pytest.mark.slow
def test_both_commands_of_the_example_run(tmp_path):
    """On a model as small as it can be; that it learns is a slow test."""
    small = "--steps=2 --warmup_steps=1 --batch=8 --hidden_size=32 --num_hidden_layers=2".split()
    made = call("sft", "--config=configs/roman_sft.yaml", *small, "--out", tmp_path / "model")
    assert made.returncode == 0, made.stderr
    text = load_text(tmp_path / "model", "plain")
    assert text.lost(["1994 in Roman numerals:", "MCMXCIV"]) == {}
    flags = "--steps=1 --rollout.queries=8 --explore.rollouts=4 --optimizer.batch_states=2".split()
    flags += (
        "--data.held_out=8 --evaluate.rows=8 --optimizer.micro_tokens=512 --reward.success_at=0.3".split()
    )
    flags += ["--model.path", tmp_path / "model", "--run_dir", tmp_path / "run"]
    done = call("train", "--config=configs/roman.yaml", *flags)
    # An untrained model may find no state that carries a gradient; then that is what it says.
    assert done.returncode == 0 or "states that carry a gradient" in done.stderr, done.stderr
    assert metrics(tmp_path / "run")[0]["eval/accuracy"] <= 1.0
