"""The named data sets, and reading them from files laid out as theirs."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from environment import REPOSITORY

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.datasets import DATASETS, MIXTURES, datasets_table
from fr3e_jax.problems.sources import read

# Rows as the data sets have them, cut down to what matters, and the problem that each is.
ROWS = {
    "deepscaler": ({"problem": "1+1?", "answer": "2", "solution": "Two."}, ("1+1?", "2")),
    "simplerl_level3to5": (
        {
            "input": "<|im_start|>system ...",
            "question": "Find $x$.",
            "gt_answer": "\\frac{1}{2}",
            "level": 4,
            "prompt": [{"role": "user", "content": "<|im_start|>system ..."}],
        },
        ("Find $x$.", "\\frac{1}{2}"),
    ),
    "math": (
        {
            "problem": "What is $x$?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": "First $\\boxed{1}$, no: $x = \\boxed{\\frac{3}{4}}$.",
        },
        ("What is $x$?", "\\frac{3}{4}"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "He has 2*600=<<2*600=1200>>1200.\n#### 1,200"},
        ("How many?", "1,200"),
    ),
    "dapo_math_17k": ({"prompt": "Find $m+n$.", "solution": "34"}, ("Find $m+n$.", "34")),
    "commonsense_qa": (
        {
            "question": "Where is a book?",
            "choices": {"label": ["A", "B", "C"], "text": ["sea", "library", "sky"]},
            "answerKey": "B",
        },
        ("Where is a book?\nA) sea\nB) library\nC) sky", "B"),
    ),
    "aime26": ({"problem_idx": 1, "problem": "Find m + n.", "answer": 277}, ("Find m + n.", "277")),
    "aime25": ({"problem": "Find the sum.", "answer": "70", "id": "0"}, ("Find the sum.", "70")),
    "amc23": ({"id": 0, "question": "How far?", "answer": "27.0"}, ("How far?", "27.0")),
    "olympiadbench": (
        {"question": "Find all.", "final_answer": ["$-1,1$"], "image_1": None},
        ("Find all.", "$-1,1$"),
    ),
    "gaokao2023en": ({"question": "Then $z=$?", "answer": "$1+i$"}, ("Then $z=$?", "$1+i$")),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_named_data_set_gives_its_problem(tmp_path, name):
    row, (question, answer) = ROWS[name]
    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [problem] = read(SourceConfig(name, file=str(file)))[0]
    assert (problem.question, problem.answer) == (question, answer)
    assert (problem.source, problem.scorer) == (name, DATASETS[name].scorer)


def test_a_copy_may_be_of_another_format_and_settings_of_the_source_win(tmp_path):
    file = tmp_path / "copy.parquet"
    rows = [{"problem": f"q{i}", "level": f"Level {i}", "solution": f"\\boxed{{{i}}}"} for i in (1, 2, 3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    source = SourceConfig("math", file=str(file), where={"level": ["Level 1", "Level 3"]}, scorer="exact")
    assert [(p.question, p.answer, p.scorer) for p in read(source)[0]] == [
        ("q1", "1", "exact"),
        ("q3", "3", "exact"),
    ]


def test_rows_without_an_answer_are_left_out_only_where_that_is_known(tmp_path):
    file = tmp_path / "deepscaler.json"
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""}, {"problem": "c", "answer": None}]
    file.write_text(json.dumps(rows))
    assert [p.question for p in read(SourceConfig("deepscaler", file=str(file)))[0]] == ["a"]
    with pytest.raises(ConfigError, match=r"row 2: the answer \(column 'answer'\) is empty"):
        read(SourceConfig("math500", file=str(file)))


@pytest.mark.parametrize("choices", [["sea", "sky"], {"label": ["A"], "text": []}, {"text": ["sea"]}, None])
def test_choices_of_another_form_are_refused(tmp_path, choices):
    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps({"question": "Where?", "choices": choices, "answerKey": "A"}))
    with pytest.raises(ConfigError, match=r"copy.jsonl, line 1: column 'choices' has no equally long"):
        read(SourceConfig("commonsense_qa", file=str(file)))


def test_the_papers_mixture_asks_every_problem_equally_often():
    mixture = MIXTURES["fr3e_paper"]
    assert [source.name for source in mixture] == ["deepscaler", "simplerl_level3to5"]
    assert [source.weight for source in mixture] == [40_315, 8_523]
    assert all(source.name in DATASETS for mixture in MIXTURES.values() for source in mixture)


def test_no_name_is_both_a_data_set_and_a_mixture():
    assert not DATASETS.keys() & MIXTURES.keys()


def test_benchmarks_are_of_a_test_split_or_whole_exams():
    """A slip here would evaluate on what others train on."""
    own = {n: d.split for n, d in DATASETS.items() if d.split != "train"}
    assert own.pop("commonsense_qa_test") == "validation"
    assert own == dict.fromkeys(["aime25", "amc23", "math500", "minerva", "gsm8k_test"], "test")


def test_the_table_has_a_row_for_every_data_set():
    table = datasets_table().splitlines()
    assert len(table) == 2 + len(DATASETS)
    assert (
        "| `gsm8k` | [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) | 7,473 | MIT "
        "| school problems in words, with whole numbers as answers |"
    ) in table
    assert {line.count("|") for line in table} == {6}


def test_the_page_of_problems_has_the_table_of_the_data_sets():
    assert datasets_table() in (REPOSITORY / "fr3e_jax" / "problems" / "README.md").read_text()
