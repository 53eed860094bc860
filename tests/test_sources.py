"""Problems from files: formats, columns, and answers."""

import pytest
from problem_files import WRITERS, jsonl, read, refusal, write_csv

from fr3e_jax.config import SourceConfig
from fr3e_jax.problems.sources import file_task
from fr3e_jax.problems.sources import read as read_source
from fr3e_jax.types import Problem

# --- formats

TWENTY = [
    {"question": f'What, "then",\nis {i} + é?\u2028', "answer": f"{i}", "level": f"{i % 3}"}
    for i in range(20)
]


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_rows_in_any_format_are_the_same_problems(tmp_path, suffix):
    WRITERS[suffix](TWENTY, tmp_path / f"a{suffix}")
    name = str(tmp_path / f"a{suffix}")
    expected = [Problem(row["question"].strip(), row["answer"], "math", name) for row in TWENTY]
    assert read_source(SourceConfig(name))[0] == expected
    chosen = read_source(SourceConfig(name, where={"level": [0, "2"]}, scorer="exact"))[0]
    assert [p.answer for p in chosen] == [str(i) for i in range(20) if i % 3 != 1]
    assert {p.scorer for p in chosen} == {"exact"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](TWENTY, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(str(path))) == 20


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_file_may_have_semicolons_or_tabs(tmp_path, separator):
    """As programs write them where the comma is in numbers; quoted names may hold either sign."""
    rows = [{"question": "1,5 + 1; what?", "answer": "2,5", "the, level": "1"}] * 2
    write_csv(rows, tmp_path / "a.csv", separator)
    assert read(str(tmp_path / "a.csv")) == [("1,5 + 1; what?", "2,5")] * 2


def test_a_tsv_file_with_a_short_row_names_its_line(tmp_path):
    (tmp_path / "a.tsv").write_text("question\tanswer\n1, 2 and?\t3\n4\n")
    assert refusal(str(tmp_path / "a.tsv")).endswith(
        "a.tsv, line 3: has 1 columns, but the first line names 2; correct it"
    )


def test_a_json_file_may_have_an_object_on_each_line(tmp_path):
    name = jsonl(tmp_path, {"question": "a", "answer": 1}, "", {"question": "b", "answer": 2}, name="a.json")
    assert read(name) == [("a", "1"), ("b", "2")]


def test_a_path_may_be_relative_or_of_the_home_directory(tmp_path, monkeypatch):
    jsonl(tmp_path, {"question": "a", "answer": 1})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.jsonl") == read("~/a.jsonl") == [("a", "1")]


# --- columns


def test_the_default_columns_are_taken_in_their_order(tmp_path):
    first = jsonl(tmp_path, {"prompt": "p", "problem": "q", "solution": "s", "final_answer": "f"})
    assert read(first) == [("q", "f")]
    second = jsonl(tmp_path, {"prompt": "p", "solution": "s"})
    assert read(second) == [("p", "s")]


def test_a_later_row_without_the_column_is_not_read_from_another(tmp_path):
    name = jsonl(tmp_path, {"problem": "a", "answer": 1}, {"problem": "b", "solution": "long"})
    assert refusal(name) == (
        f"{name}, line 2: there is no column 'answer'; the columns are problem, solution; set answer to one"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_go_into_objects_and_lists(tmp_path, suffix):
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "extra_info": {"answer": "4", "level": 3},
    }
    WRITERS[suffix]([row], tmp_path / f"a{suffix}")
    name = str(tmp_path / f"a{suffix}")
    columns = {"prompt": "prompt.1.content", "answer": "extra_info.answer"}
    assert read(name, **columns, where={"extra_info.level": [3]}) == [("q", "4")]
    assert "no column 'prompt.2.content'" in refusal(name, **columns | {"prompt": "prompt.2.content"})
    assert "no column 'prompt.x.content'" in refusal(name, **columns | {"prompt": "prompt.x.content"})
    assert "no column 'extra_info.answer.0.x'" in refusal(
        name, **columns | {"answer": "extra_info.answer.0.x"}
    )
    assert read(name, **columns | {"prompt": "prompt"}) == [("q", "4")]
    assert "column 'extra_info' is neither text nor a chat" in refusal(
        name, **columns | {"prompt": "extra_info"}
    )
    assert "column 'extra_info' is neither text nor" in refusal(name, **columns | {"answer": "extra_info"})


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_chat_is_read_as_its_last_question_behind_what_was_said_before(tmp_path, suffix):
    system, question, answer = (
        turn("system", "Be brief."),
        turn("user", " 1+1? "),
        turn("assistant", "It is 2"),
    )
    chats = [
        [question],
        [system, question, answer],
        [turn("system", " "), question],
        [system, question, answer, turn("user", "And 2+2?"), answer, turn("assistant", "more")],
    ]
    WRITERS[suffix]([{"messages": chat, "answer": "2"} for chat in chats], tmp_path / f"a{suffix}")
    problems = read_source(SourceConfig(str(tmp_path / f"a{suffix}"), prompt="messages"))[0]
    assert [(p.question, p.before) for p in problems] == [
        ("1+1?", ()),
        ("1+1?", (("system", "Be brief."),)),
        ("1+1?", ()),
        ("And 2+2?", (("system", "Be brief."), ("user", " 1+1? "), ("assistant", "It is 2"))),
    ]


def test_a_turn_that_is_not_the_users_is_no_question(tmp_path):
    name = jsonl(tmp_path, {"messages": [turn("system", "s"), turn("user", "q")], "answer": "1"})
    assert read(name, prompt="messages.1.content") == [("q", "1")]
    assert refusal(name, prompt="messages.0.content") == (
        f"{name}, line 1: messages.0.content is a turn of the system, not the question; set prompt to "
        "messages, the whole chat"
    )
    name = jsonl(tmp_path, {"messages": [turn("system", "s"), turn("assistant", "q")], "answer": "1"})
    assert "the chat of column 'messages' has no turn of the user" in refusal(name, prompt="messages")
    name = jsonl(tmp_path, {"messages": [turn("user", [{"type": "text", "text": "q"}])], "answer": "1"})
    assert "turn 0 of the chat of column 'messages' is not text" in refusal(name, prompt="messages")


def test_chats_of_other_names_are_chats_and_their_answers_are_the_assistants(tmp_path):
    turns = [("system", "Be brief."), ("human", "1+1?"), ("gpt", "2"), ("human", "2+2?"), ("gpt", "So 4.")]
    shared = [{"from": role, "value": text} for role, text in turns]
    plain = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
    name = jsonl(tmp_path, {"conversations": shared}, {"conversations": plain})
    first, second = read_source(SourceConfig(name, answer="conversations", scorer="exact"))[0]
    assert (first.question, first.answer) == ("2+2?", "So 4.")
    assert first.before == (("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"))
    assert (second.question, second.answer, second.before) == ("3+3?", "6", ())
    unanswered = jsonl(tmp_path, {"messages": plain[:1]}, name="b.jsonl")
    assert "the answer (column 'messages') is empty" in refusal(unanswered, answer="messages")


def test_chats_that_end_alike_are_other_questions_where_they_begin_otherwise(tmp_path):
    rows = [[turn("system", s), turn("user", q), turn("assistant", "ok"), turn("user", "Go on.")]
            for s, q in (("x", "one"), ("y", "one"), ("x", "two"))]  # fmt: skip
    name = jsonl(tmp_path, *({"messages": chat, "answer": "1"} for chat in rows))
    task = file_task(SourceConfig(name, prompt="messages"), 1)
    (kept,) = task.kept
    assert len(task) == (1 if kept.before[1][1] == "one" else 2)


def test_a_column_whose_name_has_a_dot_is_that_column(tmp_path):
    name = jsonl(tmp_path, {"question": "q", "extra_info.answer": "4", "extra_info": {"answer": "5"}})
    assert read(name, answer="extra_info.answer") == [("q", "4")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (5.0, "5"),
        (-0.5, "-0.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (12345678901234567890, "12345678901234567890"),
        (" 5.0 ", "5.0"),
        (["7"], "7"),
        (["$x=1$", 2.0], "$x=1$, 2"),
        (True, "True"),
    ],
)
def test_an_answer_becomes_text(tmp_path, value, text):
    assert read(jsonl(tmp_path, {"question": "q", "answer": value})) == [("q", text)]


@pytest.mark.parametrize("value", [None, "", "  ", [], [""], float("nan")])
def test_an_answer_that_is_nothing_is_refused(tmp_path, value):
    name = jsonl(tmp_path, {"question": "q", "answer": 1}, {"question": "q", "answer": value})
    assert refusal(name) == (
        f"{name}, line 2: the answer (column 'answer') is empty; fill it in, or take the row out"
    )


def test_the_answer_is_taken_out_of_a_solution(tmp_path):
    boxed = jsonl(tmp_path, {"question": "q", "solution": "\\boxed{1} or \\boxed{\\frac{\\{2\\}}{3}}."})
    assert read(boxed, answer_is="last_box") == [("q", "\\frac{\\{2\\}}{3}")]
    hashed = jsonl(tmp_path, {"question": "q", "answer": "#### 1\nso\n#### 1,234 "})
    assert read(hashed, answer_is="after_hashes") == [("q", "1,234")]


@pytest.mark.parametrize(
    ("answer_is", "solution", "told"),
    [
        ("last_box", "so 5", "column 'solution' has no \\boxed{}"),
        ("last_box", "so \\boxed{1} and \\boxed{2", "column 'solution' has no \\boxed{}"),
        ("last_box", "so \\boxed{ }", "the answer (column 'solution') is empty"),
        ("after_hashes", "so ### 5", "column 'solution' has no ####"),
        ("after_hashes", "so 5 #### ", "the answer (column 'solution') is empty"),
    ],
)
def test_a_solution_without_its_answer_is_refused(tmp_path, answer_is, solution, told):
    name = jsonl(tmp_path, {"question": "q", "solution": solution})
    assert refusal(name, answer_is=answer_is).startswith(f"{name}, line 1: {told}")


def test_a_value_in_where_is_compared_as_text(tmp_path):
    name = jsonl(
        tmp_path, *({"question": f"{v!r}", "answer": 1, "level": v} for v in (1, "1", 1.0, 11, None))
    )
    assert [q for q, _ in read(name, where={"level": [1]})] == ["1", "'1'", "1.0"]
    assert [q for q, _ in read(name, where={"level": ["11", 2], "answer": [1]})] == ["11"]
    assert refusal(name, where={"level": [7]}) == (
        f"{name}: there are no rows in which {{'level': [7]}} holds; change where"
    )
    assert "there is no column 'lvl'; the columns are question, answer, level" in refusal(
        name, where={"lvl": [1]}
    )
