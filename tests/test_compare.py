"""Comparisons of two evaluations: what is compared, what is refused, and the table."""

import pytest
from stored_answers import ASKED, answers, line, only, shown, written

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.compare import check_comparison, compare, comparison_table
from fr3e_jax.evaluation.report import table
from fr3e_jax.evaluation.scores import read_answers, scores_of, summarize

DRAWN = ASKED | {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_response": 64, "seed": 0}
DRAWN |= {"success_at": 1.0}
OTHERWISE = {
    "template": "chat",
    "stop": [],
    "compute_dtype": "bfloat16",
    "temperature": 0.0,
    "top_k": 5,
    "top_p": 0.9,
    "max_response": 32,
    "seed": 1,
    "success_at": 0.5,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_evaluations_that_were_asked_differently_are_compared_only_on_demand(tmp_path, name):
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", "1", settings=DRAWN))
    # Whose answers are compared is no difference in asking.
    other = DRAWN | {name: OTHERWISE[name], "step": 4, "model": "runs/b"}
    b = written(tmp_path / "b" / "answers.jsonl", answers("aime24", "1", settings=other))
    ours, theirs = DRAWN[name], OTHERWISE[name]
    with pytest.raises(ConfigError, match="asked differently") as refused:
        compare(a, b)
    assert f"{name} is {ours!r} here and {theirs!r} there (aime24)" in str(refused.value)
    assert "--compare_anyway" in str(refused.value)
    planned = {"aime24": only(read_answers(a)).how_asked}
    with pytest.raises(ConfigError, match="asked differently"):
        check_comparison(b.parent, planned, anyway=False)
    check_comparison(b.parent, planned, anyway=True)
    (row,) = compare(a, b, anyway=True)
    assert row["differ"] == {name: [ours, theirs]}
    text = " ".join(shown(comparison_table([row], "a", "b"), width=300).split())
    assert f"asked differently: {name} is {ours!r} for a and {theirs!r} for b" in text
    assert "asked differently" not in shown(comparison_table(compare(a, a), "a", "b"))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (["11", "00"], "samples is 1 here and 2 there"),
        (["1"], "problems is '2 (1 in common)' here and '1 (1 in common)' there"),
    ],
)
def test_other_samples_and_other_problems_are_refused(tmp_path, theirs, said):
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", "1", "0"))
    b = written(tmp_path / "b" / "answers.jsonl", answers("aime24", *theirs))
    with pytest.raises(ConfigError) as refused:
        compare(a, b)
    assert said in str(refused.value)


def test_few_problems_decide_nothing(tmp_path):
    """Of five, 2 of 32 choices are as far: p is above .05, however clear it looks."""
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", *["1"] * 5))
    b = written(tmp_path / "b" / "answers.jsonl", answers("aime24", *["0"] * 5))
    (row,) = compare(a, b)
    assert (row["difference"], row["p"], row["better"]) == (1, 2 / 32, "undecided")


def test_problems_of_all_benchmarks_together_decide_what_each_does_not(tmp_path):
    a = written(
        tmp_path / "a" / "answers.jsonl", answers("aime24", *["11"] * 4) + answers("amc23", *["1"] * 4)
    )
    b = written(
        tmp_path / "b" / "answers.jsonl", answers("aime24", *["00"] * 4) + answers("amc23", *["0"] * 4)
    )
    *each, together = compare(a, b, anyway=True)
    assert [(row["p"], row["better"]) for row in each] == [(2 / 16, "undecided")] * 2
    assert (together["benchmark"], together["problems"]) == ("all", 8)
    assert (together["p"], together["better"], together["difference"]) == (2 / 256, "a", 1)


def test_what_both_have_is_compared(tmp_path):
    """b has fewer problems, and a benchmark of its own; only problems 0 and 1 count."""
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", "1", "0", "1", "1"))
    b = written(tmp_path / "b" / "answers.jsonl", answers("amc23", "1") + answers("aime24", "0", "0"))
    (row,) = compare(a, b, anyway=True)
    assert (row["problems"], row["a"], row["b"]) == (2, 0.5, 0)


def test_problems_are_paired_by_their_numbers(tmp_path):
    """Paired by place, the third of a would meet the second of b."""
    lines = answers("aime24", "1", "0", "1")
    a = written(tmp_path / "a" / "answers.jsonl", lines)
    b = written(tmp_path / "b" / "answers.jsonl", [lines[2], lines[0]])
    (row,) = compare(a, b, anyway=True)
    assert (row["problems"], row["a"], row["b"], row["p"]) == (2, 1, 1, 1)


@pytest.mark.parametrize("other", [{"question": "another"}, {"answer": "8"}])
def test_evaluations_of_other_problems_are_not_compared(tmp_path, other):
    lines = answers("aime24", "1", "0")
    a = written(tmp_path / "a" / "answers.jsonl", lines)
    b = written(tmp_path / "b" / "answers.jsonl", [lines[0], lines[1] | other])
    with pytest.raises(ConfigError, match=r"problems is '2 \(1 in common\)' here"):
        compare(a, b)
    (row,) = compare(a, b, anyway=True)
    assert row["problems"] == 1


@pytest.mark.parametrize("there", [[], answers("amc23", "1")])
def test_evaluations_with_nothing_in_common_are_not_compared(tmp_path, there):
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", "1"))
    with pytest.raises(ConfigError, match="no benchmark in common"):
        compare(a, written(tmp_path / "b" / "answers.jsonl", there))
    with pytest.raises(ConfigError, match="no problem of aime24 in common"):
        compare(a, written(tmp_path / "b" / "answers.jsonl", [line(problem=5)]), anyway=True)


def test_the_table_of_a_comparison_has_its_numbers(tmp_path):
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", *["1"] * 6) + answers("amc23", "1"))
    b = written(tmp_path / "b" / "answers.jsonl", answers("aime24", *["0"] * 6) + answers("amc23", "0"))
    text = shown(comparison_table(compare(a, b), "runs/evaluate-1", "runs/evaluate-[2]"))
    assert "a: runs/evaluate-1" in text and "b: runs/evaluate-[2]" in text
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in text.splitlines() if row[:1] == "│"]
    assert rows == [
        ["aime24", "6", "100.0", "0.0", "+100.0 (+100.0 to +100.0)", "0.0312", "a"],
        ["amc23", "1", "100.0", "0.0", "+100.0", "1.0000", "undecided"],
        ["all", "7", "100.0", "0.0", "+100.0 (+100.0 to +100.0)", "0.0156", "a"],
    ]
    assert max(map(len, text.splitlines())) <= 100


def test_a_narrow_terminal_cuts_no_number():
    """As wide as what is not a terminal is taken to be."""
    found = [summarize(score) for score in scores_of(answers("olympiadbench", "1100", "0111")).values()]
    text = shown(table(found), width=80)
    assert "…" not in text
    for number in ("62.5", "12.5", "100.0", "olympiadbench", "(50.0"):
        assert number in text
