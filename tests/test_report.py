"""Answers that were written, read again and told."""

import io
import json

import pytest
from rich.console import Console

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.compare import check_comparison, compare, comparison_table
from fr3e_jax.evaluation.report import table
from fr3e_jax.evaluation.scores import read_answers, scores_of, summarize


def line(benchmark="aime24", problem=0, sample=0, right=True, **more):
    return {
        "benchmark": benchmark,
        "problem": problem,
        "sample": sample,
        "right": right,
        "extracted": "7" if right else "8",
        "truncated": False,
        "length": 10,
        "question": f"{benchmark} {problem}?",
        "answer": "7",
        "response": "so \\boxed{7}\u2028\n",
    } | more


def answers(benchmark, *problems, **more):
    """`answers("aime24", "110", "000")`: two problems with three answers each."""
    return [
        line(benchmark, problem, sample, marks[sample] == "1", **more)
        for sample in range(len(problems[0]))
        for problem, marks in enumerate(problems)
    ]


def written(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def only(lines):
    (score,) = scores_of(lines).values()
    return score


def shown(what, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_what_was_written_is_read(tmp_path):
    lines = answers("aime24", "10", "01")
    assert read_answers(written(tmp_path / "answers.jsonl", lines)) == lines


def test_no_file_is_no_answers(tmp_path):
    assert read_answers(tmp_path / "answers.jsonl") == []


@pytest.mark.parametrize("kept", [1, 20, -2, -1])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, kept):
    """Also one that lacks its line end only: what follows would be written behind it."""
    lines = answers("aime24", "10", "01")
    path = written(tmp_path / "answers.jsonl", lines)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:kept])
    said = []
    assert read_answers(path, said.append) == lines[:-1]
    assert said == [f"warning: {path}: the last line, 4, is cut short, and is skipped"]


def test_a_last_line_that_was_cut_off_inside_a_letter_is_dropped(tmp_path):
    lines = answers("aime24", "10")
    path = written(tmp_path / "answers.jsonl", lines)
    with path.open("ab") as file:
        file.write('{"response": "é'.encode()[:-1])
    assert read_answers(path) == lines


@pytest.mark.parametrize("damage", ['{"benchmark": "aime24", "prob', "", "\x00\x00"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    good = [json.dumps(one) for one in answers("aime24", "101")]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join([good[0], damage, *good[1:]]) + "\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*answers\.jsonl is damaged"):
        read_answers(path)


@pytest.mark.parametrize("other", ["[1]", "{}", '{"benchmark": "aime24"}'])
def test_a_line_that_is_no_answer_is_named(tmp_path, other):
    path = written(tmp_path / "answers.jsonl", answers("aime24", "1"))
    path.write_text(path.read_text() + other + "\n")
    with pytest.raises(ConfigError, match=r"line 2 .* is (no answer|damaged)"):
        read_answers(path)


def test_answers_find_their_problem_and_sample_in_any_order():
    lines = answers("aime24", "110", "001", "000") + answers("math500", "1", "0")
    scores = scores_of(lines[::-1])
    assert list(scores) == ["math500", "aime24"]
    score = scores["aime24"]
    assert score.problems == (0, 1, 2)
    assert score.right.tolist() == [[True, True, False], [False, False, True], [False, False, False]]
    assert score.extracted == [["7", "7", "8"], ["8", "8", "7"], ["8", "8", "8"]]
    assert score.asked[1] == ("aime24 1?", "7")
    assert scores["math500"].right.tolist() == [[True], [False]]


def test_an_evaluation_that_was_ended_is_told_over_the_samples_of_all_problems():
    """Samples 0 and 2 are of both problems, 1 of one only."""
    lines = [line(problem=p, sample=s, right=s == 2) for p, s in ((0, 0), (0, 1), (0, 2), (1, 2), (1, 0))]
    score = only(lines)
    assert score.right.tolist() == [[False, True], [False, True]]
    assert score.left_out == 1
    assert "aime24: 1 left out" in shown(table([summarize(score)]))


def test_an_answer_that_was_written_twice_counts_once():
    lines = answers("aime24", "10", "01")
    assert summarize(only(lines + lines[:1])) == summarize(only(lines))


def test_problems_with_no_sample_in_common_are_refused():
    with pytest.raises(ConfigError, match="aime24 have no sample in common"):
        scores_of([line(problem=0, sample=0), line(problem=1, sample=1)])


def test_the_numbers_are_those_of_a_hand_calculation():
    lines = answers("aime24", "1100", "0001")
    lines[0] |= {"truncated": True, "right": False, "length": 90}  # sample 0 of problem 0: now 0100
    found = summarize(only(lines))
    assert (found["benchmark"], found["problems"], found["k"], found["left_out"]) == ("aime24", 2, 4, 0)
    assert found["avg"] == 0.25 and found["se"] == 0 and (found["low"], found["high"]) == (0.25, 0.25)
    # One right answer of four: it is among k of them with chance k / 4.
    assert found["pass"] == pytest.approx({"1": 0.25, "2": 0.5, "4": 1})
    # Problem 0: 7 and 8 are tied, one of two 7 is right; problem 1: 8 wins.
    assert found["maj"] == pytest.approx((0.25 + 0) / 2)
    assert found["truncated"] == 1 / 8 and found["length"] == (7 * 10 + 90) / 8


def test_pass_is_told_for_powers_of_two_up_to_k():
    assert list(summarize(only(answers("aime24", "110010")))["pass"]) == ["1", "2", "4"]


def test_a_summary_of_one_problem_is_json_without_nan():
    found = summarize(only(answers("aime24", "10")))
    assert (found["se"], found["low"], found["high"]) == (None, None, None)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "avg@2 50.0 " in shown(table([found]))


def test_the_table_has_the_numbers_and_the_mean_of_benchmarks():
    """aime24: means 1 and 1/2, error 1/4. math500: means 1, 0, 0, 0, error 1/4."""
    several = [
        summarize(score)
        for score in scores_of(
            answers("aime24", "11", "10")
            + answers("math500", "1", "0", "0", "0", truncated=True, length=2000)
        ).values()
    ]
    text = shown(table(several))
    rows = {
        cells[1].strip(): cells for cells in (row.split("│") for row in text.splitlines()) if len(cells) > 2
    }
    told = {name: [cell.strip() for cell in cells[2:-1]] for name, cells in rows.items()}
    assert told["aime24"] == [
        "2",
        "avg@2 75.0 ± 25.0 (50.0\N{EN DASH}100.0)",
        "@2 100.0",
        "75.0",
        "0.0",
        "10",
    ]
    assert told["math500"] == ["4", "avg@1 25.0 ± 25.0 (0.0\N{EN DASH}75.0)", "", "", "100.0", "2000"]
    assert told["mean"] == ["", "50.0 ± 17.7", "", "", "", ""]  # sqrt(2) / 4 / 2
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert "mean" not in shown(table(several[:1]))


def test_a_name_in_brackets_is_shown_as_it_is():
    text = shown(table([summarize(only(answers("[red]own", "1", "0")))]))
    assert "[red]own" in text


def test_a_comparison_is_that_of_a_hand_calculation(tmp_path):
    """Six problems that only a gets right: 2 of 64 choices of signs are as far."""
    a = written(tmp_path / "a" / "answers.jsonl", answers("aime24", *["1"] * 6, "0"))
    b = written(tmp_path / "b" / "answers.jsonl", answers("aime24", *["00"] * 6, "00"))
    (row,) = compare(a, b, anyway=True)
    assert (row["benchmark"], row["problems"], row["a"], row["b"]) == ("aime24", 7, pytest.approx(6 / 7), 0)
    assert row["difference"] == pytest.approx(6 / 7) and row["p"] == 2 / 64 and row["better"] == "a"
    (back,) = compare(b, a, anyway=True)
    assert back["difference"] == -row["difference"] and back["p"] == row["p"] and back["better"] == "b"
    assert json.loads(json.dumps(row, allow_nan=False)) == row


ASKED = {
    "model": "runs/[a]",
    "step": 3,
    "source": "Org/Name@0f3",
    "template": "boxed",
    "stop": ["###"],
    "compute_dtype": "float32",
}


def test_a_table_says_who_was_asked_and_how_once():
    lines = answers("aime24", "1", settings=ASKED) + answers("amc23", "1", settings=ASKED)
    found = [summarize(score) for score in scores_of(lines).values()]
    assert [one["settings"] for one in found] == [ASKED, ASKED]
    text = " ".join(shown(table(found)).split())
    assert (
        text.count("step 3 of runs/[a], begun from Org/Name@0f3; template 'boxed', stop ['###'], float32")
        == 1
    )
    # Answers that were written before this was recorded say nothing.
    assert summarize(only(answers("aime24", "1")))["settings"] == {}


def test_answers_that_were_asked_in_two_ways_are_not_told_as_one():
    lines = answers("aime24", "10", settings=ASKED)
    lines[1] |= {"settings": ASKED | {"template": "chat", "compute_dtype": "bfloat16"}}
    with pytest.raises(
        ConfigError, match="aime24 are of two evaluations, with different compute_dtype, template"
    ):
        scores_of(lines)


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
