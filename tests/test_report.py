"""Answers that were written, read again and told."""

import json

import pytest
from stored_answers import ASKED, answers, line, only, shown, written

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.compare import compare
from fr3e_jax.evaluation.report import table
from fr3e_jax.evaluation.scores import read_answers, scores_of, summarize


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
