"""Answers of data that no response can ever be right for: found at load, told, refused or left out."""

import json
import time

import pytest
from environment import REPOSITORY

from fr3e_jax.config import ConfigError, DataConfig, SourceConfig
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.answers import MOST_BAD, unanswerable
from fr3e_jax.problems.corpus import judging_problems, make_corpus
from fr3e_jax.problems.sources import read
from fr3e_jax.rewards.rules import scorer_of
from fr3e_jax.types import Problem

NEVER = {
    "math": {
        "['70']": "a list written as text",
        '["70", "71"]': "a list written as text",
        r"\boxed{70}": "set answer_is to last_box",
        r"So $x = \boxed{70}$.": "set answer_is to last_box",
        "The answer is 70.": "words around it",
        "Answer: 70": "words around it",
        "<answer>70</answer>": "words around it",
        "#### 70": "set answer_is to after_hashes",
        "He has 2*35.\n#### 70": "set answer_is to after_hashes",
        '"70"': "quotation marks",
        "NaN": "there is none",
        "?": "neither a number nor a word",
        r"\frac{1}{2": "not closed",
        "We add both sides and so on. " * 8: "it is a solution",
    },
    "numeric": {
        "seventy": "no number",
        "70 apples": "no number",
        "['70']": "a list",
        "Answer: 70": "words",
        "nan": "none",
    },
    "choice": {
        "Berlin": "no letter",
        "2": "no letter",
        "AB": "no letter",
        "The answer is B": "words around it",
    },
    "exact": {r"\boxed{x}": "another part", "<answer>x</answer>": "another part"},
}
SOME_TIME = {
    "math": ["70", "$70$", "[70]", "(1, 2]", r"\{\}", r"\text{even}", "x^2+1", "1,2", r"\infty", "A", "no",
             "$-1,1$", r"\frac{\{2\}}{3}", "5 \\text{ cm}", "3:4", "f'(x)", "none", "0.5\\%"],
    "numeric": ["70", "1,234.5", "$18.00", r"\frac{1}{2}", "50%", "-3", "1e3", "\u22125"],
    "choice": ["B", "(B)", "b", "B.", "c)"],
    "exact": ["red fox", "two\nlines", "['70']", "{", "seventy"],
}  # fmt: skip


@pytest.mark.parametrize("scorer", NEVER)
def test_an_answer_that_can_never_be_right_is_told_apart_with_its_reason(scorer):
    for answer, why in NEVER[scorer].items():
        assert why in (unanswerable(Problem("q", answer, scorer)) or ""), answer
    for answer in SOME_TIME[scorer]:
        assert unanswerable(Problem("q", answer, scorer)) is None, answer


@pytest.mark.parametrize("scorer", NEVER)
def test_the_reasons_hold_what_a_model_would_write_is_wrong_for_those_and_right_for_the_others(scorer):
    """By the scorer, which is not asked for math when data is read."""
    judge = scorer_of(scorer)
    said = {"math": "70", "numeric": "70", "choice": "B", "exact": "x"}[scorer]
    for answer in NEVER[scorer]:
        assert not judge(rf"\boxed{{{said}}}", answer, None).right, answer
    for answer in SOME_TIME[scorer]:
        forms = [answer, answer.strip("().").upper()] if scorer == "choice" else [answer]
        forms += [rf"\boxed{{{form}}}" for form in forms]
        assert any(judge(form, answer, None).right for form in forms), answer


@pytest.mark.parametrize("piece", ["'", '["', "[' ", "\\", "answer ", "{", "a ", "$", "\\boxed{", "####"])
def test_an_answer_is_looked_at_in_time_linear_in_it(piece):
    for scorer in NEVER:
        begun = time.process_time()
        unanswerable(Problem("q", f"['{piece * (100_000 // len(piece))}", scorer))
        assert time.process_time() - begun < 0.5


def file_of(folder, answers, name="a.jsonl", **more):
    rows = [{"question": f"{i} + {i} =", "answer": answer} | more for i, answer in enumerate(answers)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_a_few_that_can_never_be_right_are_told_with_three_examples_and_stay(tmp_path):
    name = file_of(tmp_path, ["1"] * 46 + ["['70']", "Answer: 7", "#### 7", r"\boxed{7}"])
    problems, told = read(SourceConfig(name))
    assert len(problems) == 50
    (line,) = told
    assert line.startswith(
        f"{name}: 4 of 50 answers can never be right, such as \"['70']\" ({name}, line 47: "
    )
    assert "'Answer: 7' (" in line and "line 49" in line and "line 50" not in line
    assert line.endswith("they stay in") and "\n" not in line


def test_more_than_a_tenth_of_them_is_refused_and_dropping_leaves_them_out(tmp_path):
    name = file_of(tmp_path, ["1"] * 9 + ["['70']"])
    assert MOST_BAD == 0.1 and len(read(SourceConfig(name))[0]) == 10
    name = file_of(tmp_path, ["1"] * 8 + ["['70']", "['7']"])
    with pytest.raises(
        ConfigError, match=r"2 of 10 answers can never be right.*list written as text"
    ) as error:
        read(SourceConfig(name))
    assert "\n" not in str(error.value) and "drop" not in str(error.value)  # benchmarks have no such option
    problems, (line,) = read(SourceConfig(name), drop=True)
    assert [p.answer for p in problems] == ["1"] * 8 and line.endswith("they are left out")
    name = file_of(tmp_path, [r"\boxed{7}"] * 20)
    with pytest.raises(ConfigError, match=r"20 of 20 .* set answer_is to last_box.*; name another column"):
        read(SourceConfig(name), drop=True)
    assert len(read(SourceConfig(name, answer_is="last_box"))[0]) == 20


BAD = {
    "null answer": {"question": "q", "answer": None},
    "empty answer": {"question": "q", "answer": " "},
    "no answer": {"question": "q"},
    "null question": {"question": None, "answer": "1"},
    "NaN question": {"question": float("nan"), "answer": "1"},
    "NaN answer": {"question": "q", "answer": float("nan")},
    "empty question": {"question": "", "answer": "1"},
    "half a character": {"question": "q\ud800", "answer": "1"},
    "an object": {"question": "q", "answer": {"value": 1}},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_holds_no_problem_ends_the_run_or_is_left_out_and_counted(tmp_path, kind):
    rows = [{"question": "first", "answer": "1"}, BAD[kind], {"question": "last", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = str(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: .*, or use --data\.bad_rows drop$"):
        read(SourceConfig(name), remedy=", or use --data.bad_rows drop")
    problems, (line,) = read(SourceConfig(name), drop=True)
    assert [p.question for p in problems] == ["first", "last"]
    assert line.startswith(f"{name}: 1 rows hold no problem and are left out, such as {name}, line 2: ")


def test_a_column_that_the_first_row_lacks_is_a_wrong_setting_whatever_is_dropped(tmp_path):
    name = file_of(tmp_path, ["1", "2"])
    with pytest.raises(ConfigError, match="there is no column 'target'"):
        read(SourceConfig(name, answer="target"), drop=True)
    name = file_of(tmp_path, [None, ""])
    with pytest.raises(ConfigError, match=r"2 rows hold no problem.*none is left"):
        read(SourceConfig(name), drop=True)


def test_boxes_that_are_asked_for_and_missing_are_bad_rows(tmp_path):
    name = file_of(tmp_path, [r"so \boxed{1}", "so 5", r"so \boxed{2}"])
    problems, _ = read(SourceConfig(name, answer_is="last_box"), drop=True)
    assert [p.answer for p in problems] == ["1", "2"]


def test_a_run_tells_what_is_bad_and_makes_no_benchmark_smaller(tmp_path):
    text = load_text(REPOSITORY / "tests" / "qwen2.5_tokenizer_cut", "plain")
    train = file_of(tmp_path, [*["1"] * 50, None, "['70']"], name="train.jsonl")
    suite = file_of(tmp_path, [*["1"] * 19, "Answer: 7"], name="suite.jsonl", extra=1)
    data = DataConfig(train, held_out=20, held_out_source=suite, bad_rows="drop")
    corpus = make_corpus(data, 0, text, 40)
    assert len(corpus.held_out) == 20 and any(p.answer == "Answer: 7" for p in corpus.held_out)
    told = "\n".join(corpus.messages)
    assert "suite.jsonl: 1 of 20 answers can never be right" in told and "they stay in" in told
    assert "train.jsonl: 1 rows hold no problem and are left out" in told
    assert "train.jsonl: 1 of 51 answers can never be right" in told and "they are left out" in told
    with pytest.raises(ConfigError, match=r"line 51: .* is empty.*, or use --data\.bad_rows drop"):
        make_corpus(DataConfig(train, held_out=4), 0, text, 40)
    problems, (line,) = judging_problems(SourceConfig(suite), 0, 0)
    assert len(problems) == 20 and line.endswith("they stay in")
