"""Problems from files and from the hub: what is read, and what every malformed file is told."""

import collections
import csv
import json
import random
import re

import grain
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import SECOND, answers_of, serving
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.overlap import normalised
from fr3e_jax.problems.sources import FileTask, file_task, of_split, stream
from fr3e_jax.problems.sources import read as read_source
from fr3e_jax.types import Problem


def jsonl(folder, *rows, name="a.jsonl"):
    """A file with a JSON object, or the text that is given, on each line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def read(name, **settings):
    return [(p.question, p.answer) for p in read_source(SourceConfig(name, **settings))[0]]


def refusal(name, **settings):
    with pytest.raises(ConfigError) as refused:
        read(name, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- formats

TWENTY = [
    {"question": f'What, "then",\nis {i} + é?\u2028', "answer": f"{i}", "level": f"{i % 3}"}
    for i in range(20)
]


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(rows, path):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(rows, path, separator=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def write_tsv(rows, path):
    write_csv(rows, path, "\t")


WRITERS = {
    **{".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".tsv": write_tsv},
    ".parquet": write_parquet,
}


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


# --- malformed files

MALFORMED = {
    "bad JSON": (".jsonl", b'{"question": "q", "answer": 1}\n\n{"question": \n', ", line 3: is not JSON ("),
    "no object": (".jsonl", b'{"question": "q", "answer": 1}\n[1]\n', ", line 2: is not an object"),
    "too deep": (".jsonl", b"[" * 100_000 + b"\n", ", line 1: is not JSON ("),
    "too long a number": (".jsonl", b'{"answer": ' + b"1" * 5000 + b"}\n", ", line 1: is not JSON ("),
    "half a character": (
        ".jsonl",
        b'{"question": "q\\ud800", "answer": 1}\n',
        ", line 1: the question has half a surrogate pair",
    ),
    "no question": (
        ".jsonl",
        b'{"question": " ", "answer": 1}\n',
        ", line 1: the question (column 'question') is empty",
    ),
    "no column": (
        ".jsonl",
        b'{"q": "q", "a": 1}\n',
        ", line 1: there is no column 'question'; the columns are q, a",
    ),
    "not UTF-8": (".jsonl", b'{"question": "q", "answer": 1}\n{"\xff": 1}\n', ", line 2: is not UTF-8"),
    "no rows": (".jsonl", b"\n", ": there are no rows"),
    "bad list": (".json", b'[{"question": "q"},\n oops]', ": is not JSON (Expecting value: line 2 column 2"),
    "no objects": (".json", b'[{"question": "q", "answer": 1}, 2]', ", row 2: is not an object"),
    "empty list": (".json", b"[]", ": there are no rows"),
    "too few": (
        ".csv",
        b'question,answer\n"a\nb",1\nc\n',
        ", line 4: has 1 columns, but the first line names 2",
    ),
    "too many": (
        ".csv",
        b"question,answer\na,1\n\nb,2,3\n",
        ", line 4: has 3 columns, but the first line names 2",
    ),
    "open quote": (".csv", b'question,answer\na,1\n"b,2\nc,3\n', ", line 3: is not CSV ("),
    "text behind a quote": (".csv", b'question,answer\n"a"b,1\n', ", line 2: is not CSV ("),
    "one name twice": (".csv", b"question,answer,answer\na,1,2\n", ", line 1: two columns have one name"),
    "CSV not UTF-8": (".csv", b"question,answer\na,1\n\xe9,2\n", ", line 3: is not UTF-8"),
    "CSV of nothing": (".csv", b"", ": there are no rows"),
    "CSV without rows": (".csv", b"question,answer\n", ": there are no rows"),
    "CSV without an answer": (
        ".csv",
        b"question,answer\na,1\nb, \n",
        ", line 3: the answer (column 'answer') is empty",
    ),
    "no parquet": (".parquet", b"PAR1 is not all it takes PAR1", ", after row 0: is damaged ("),
    "parquet of nothing": (".parquet", b"", ", after row 0: is damaged ("),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_told_where_and_what(tmp_path, kind):
    suffix, content, told = MALFORMED[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert refusal(str(path)).startswith(f"{path}{told}")


def parquet(tmp_path, rows):
    write_parquet(rows, tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_a_parquet_row_is_told_by_its_number(tmp_path):
    rows = [{"question": "q", "answer": "1"}] * 1500 + [{"question": "q", "answer": None}]
    name = parquet(tmp_path, rows)
    assert refusal(name).startswith(f"{name}, row 1501: the answer (column 'answer') is empty")
    assert "row 1: there is no column 'problem'; the columns are question, answer" in refusal(
        name, prompt="problem"
    )


def test_a_parquet_file_that_is_damaged_in_the_middle_is_refused(tmp_path):
    name = parquet(tmp_path, [{"question": f"q{random.random()}", "answer": "1"} for _ in range(5000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000:3000] = bytes(2000)
    (tmp_path / "a.parquet").write_bytes(content)
    assert re.match(rf"{re.escape(name)}, after row \d+: is damaged \(", refusal(name))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    table = pyarrow.table({"question": pyarrow.array([b"q", b"\xff"]), "answer": pyarrow.array([b"1", b"2"])})
    as_text = pyarrow.schema([("question", pyarrow.string()), ("answer", pyarrow.string())])
    arrays = [
        pyarrow.Array.from_buffers(pyarrow.string(), 2, column.chunk(0).buffers()) for column in table.columns
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=as_text), path)
    assert refusal(str(path)).startswith(f"{path}, after row 0: is damaged (")


def test_what_is_no_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("x")
    assert refusal("none.jsonl") == "source 'none.jsonl': there is no file 'none.jsonl'"
    assert "there is no file 'copy.csv'" in refusal("math", file="copy.csv")
    assert "data/a.txt is none of *.parquet, *.jsonl" in refusal("math", file="data/a.txt")
    for name in ("maths", "data/a.txt", "a/b/c", "a/b@", ""):
        told = refusal(name)
        assert told.startswith(f"source {name!r} is none; give carry_addition, word_addition, gym:NAME, ")
        assert "(fr3e_paper)" in told and "(deepscaler, " in told
        assert "Org/Name@REVISION" in told


# --- held-out problems


def labelled(*questions):
    return [{"question": q, "answer": i} for i, q in enumerate(questions)]


questions = st.lists(st.text(alphabet="abAB .", min_size=1).filter(str.strip), min_size=1, max_size=30)


@given(questions, st.integers(1, 8), st.randoms(use_true_random=False))
def test_held_out_questions_are_in_no_training_problem_whatever_the_order(
    tmp_path_factory, texts, count, draw
):
    folder = tmp_path_factory.mktemp("split")
    rows = labelled(*texts)
    name = jsonl(folder, *rows)
    different = {normalised(q.strip()) for q in texts}
    if count >= len(different):
        with pytest.raises(
            ConfigError, match=rf"has {len(different)} different questions, too few to hold {count}"
        ):
            file_task(SourceConfig(name), count)
        return
    task = file_task(SourceConfig(name), count)
    kept, trained = [[normalised(p.question) for p in side] for side in (task.kept, task.problems)]
    assert len(set(kept)) == len(kept) == count
    assert not set(kept) & set(trained)
    assert set(kept) | set(trained) == different
    draw.shuffle(rows)
    again = file_task(SourceConfig(jsonl(folder, *rows, name="a.jsonl")), count)
    assert again.kept == task.kept
    assert sorted(again.problems, key=repr) == sorted(task.problems, key=repr)


def test_training_keeps_the_order_of_the_file_and_more_held_out_contain_fewer(tmp_path):
    name = jsonl(tmp_path, *labelled(*(f"question {i}" for i in range(500))))
    whole, fewer, more = (file_task(SourceConfig(name), count) for count in (0, 20, 50))
    assert len(whole) == 500 and not whole.kept
    assert [p for p in whole.problems if p not in fewer.kept] == fewer.problems
    assert more.kept[:20] == fewer.kept == fewer.held_out(100)
    assert fewer.held_out(3) == fewer.kept[:3]
    assert fewer[479] == fewer.problems[479]
    with pytest.raises(IndexError):
        fewer[480]
    with pytest.raises(ConfigError, match="no problems are held out"):
        whole.held_out(1)


# --- the stream


def task(label, count):
    return FileTask([Problem(f"{label}{i}", "1", "math") for i in range(count)], [])


def taken(problems, start, count):
    part = problems[start : start + count]
    assert len(part) == count
    return [part[i].question for i in range(count)]


def test_one_task_is_drawn_in_the_order_that_earlier_runs_had():
    """As shuffle().repeat() of grain gives it, whatever the weight."""
    alone = task("a", 7)
    expected = grain.MapDataset.source(alone).seed(3).shuffle().repeat()
    assert taken(stream([alone], [5.0], 3), 0, 40) == [expected[i].question for i in range(40)]


@pytest.mark.parametrize("tasks", [[task("a", 90)], [task("a", 90), task("b", 350), task("c", 60)]])
def test_a_stream_goes_on_from_any_position_and_another_seed_gives_another(tasks):
    weights = [2.0, 7.0, 1.0][: len(tasks)]
    through = taken(stream(tasks, weights, 5), 0, 300)
    resumed = stream(tasks, weights, 5)
    assert taken(resumed, 137, 100) == through[137:237]
    assert resumed[42].question == through[42]
    assert taken(resumed, 0, 9) == through[:9]
    assert taken(stream(tasks, weights, 6), 0, 300) != through


def test_every_epoch_of_a_task_has_each_problem_once_in_a_new_order():
    tasks = [task("a", 11), task("b", 50)]
    mixed = taken(stream(tasks, [1.0, 1.0], 0), 0, 220)
    for label, size in (("a", 11), ("b", 50)):
        drawn = [q for q in mixed if q[0] == label]
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)


@pytest.mark.parametrize("weights", [[40_315, 8_523], [0.1, 0.9], [3, 3], [1e-3, 2e-3]])
def test_tasks_have_their_shares_everywhere_in_the_stream(weights):
    mixed = stream([task("a", 3000), task("b", 1700)], weights, 0)
    for start in (0, 10_007, 10**9):
        counts = collections.Counter(question[0] for question in taken(mixed, start, 1000))
        share = weights[0] / sum(weights)
        assert counts["a"] == pytest.approx(1000 * share, abs=1 + 10 * share)


def test_two_tasks_of_one_length_are_not_shuffled_alike():
    mixed = taken(stream([task("a", 40), task("b", 40)], [1, 1], 0), 0, 80)
    orders = [[int(q[1:]) for q in mixed if q[0] == label] for label in "ab"]
    assert orders[0] != orders[1]


# --- the hub


def lines(split, commit, count=2):
    rows = [{"question": f"{split} {i} of {commit[0]}", "answer": i} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(split, commit):
    rows = [{"question": f"{split} {i} of {commit[0]}", "answer": str(i)} for i in range(2)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def gsm8k(commit):
    sink = pyarrow.BufferOutputStream()
    rows = [{"question": f"q of {commit[0]}", "answer": "so\n#### 5"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


HUB = {
    "tiny/sharded": lambda commit: {
        "README.md": b"---",
        "loader.py": b"raise SystemExit",
        "data/train-00000-of-00002.parquet": table("first", commit),
        "data/train-00001-of-00002.parquet": table("second", commit),
        "data/test-00000-of-00001.parquet": table("test", commit),
        "dataset_infos.json": b"{}",
        "weights.bin": b"x",
    },
    "tiny/subsets": lambda commit: {
        f"{subset}/{split}.jsonl": lines(f"{subset} {split}", commit)
        for subset in ("easy", "hard")
        for split in ("train", "test")
    },
    "tiny/single": lambda commit: {"latest-problems.jsonl": lines("single", commit)},
    "tiny/nothing": lambda commit: {"README.md": b"---"},
    "tiny/gated": lambda commit: {"train.jsonl": lines("train", commit)},
    "tiny/expired": lambda commit: {"train.jsonl": lines("train", commit)},
    "openai/gsm8k": lambda commit: {
        "main/train-00000-of-00001.parquet": gsm8k(commit),
        "main/test-00000-of-00001.parquet": gsm8k(commit),
        "socratic/train-00000-of-00001.parquet": gsm8k(commit),
    },
    "HuggingFaceH4/MATH-500": lambda commit: {"elsewhere.jsonl": b""},
}
FETCHED = set()

ASK = """
import json, sys
from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.sources import read
answers = []
for settings in json.loads(sys.argv[1]):
    try:
        answers.append([[p.question, p.answer] for p in read(SourceConfig(**settings))[0]])
    except ConfigError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def endpoint():
    with serving({f"datasets/{name}": files for name, files in HUB.items()}, FETCHED) as address:
        yield address


def ask(home, endpoint, *sources, **settings):
    """What `read` gives for each source in a process of its own."""
    return answers_of(ASK, sources, home, endpoint, JAX_PLATFORMS="cpu", **settings)


READ = [
    {"name": "tiny/sharded"},
    {"name": f"tiny/sharded@{SECOND}", "split": "test"},
    {"name": "tiny/subsets", "subset": "hard"},
    {"name": "tiny/subsets@v2", "subset": "easy", "split": "test"},
    {"name": "tiny/single"},
    {"name": "gsm8k"},
]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, endpoint):
    """A cache that holds what READ names, what was read, and the files that were fetched for it."""
    home = tmp_path_factory.mktemp("hub")
    FETCHED.clear()
    answers = ask(home, endpoint, *READ)
    return home, answers, set(FETCHED)


def test_the_files_of_a_split_are_read_in_order(cached):
    _, answers, _ = cached
    assert answers == [
        [["first 0 of a", "0"], ["first 1 of a", "1"], ["second 0 of a", "0"], ["second 1 of a", "1"]],
        [["test 0 of b", "0"], ["test 1 of b", "1"]],
        [["hard train 0 of a", "0"], ["hard train 1 of a", "1"]],
        [["easy test 0 of b", "0"], ["easy test 1 of b", "1"]],
        [["single 0 of a", "0"], ["single 1 of a", "1"]],
        [["q of a", "5"]],
    ]


def test_only_data_is_fetched_and_of_a_named_data_set_only_its_own(cached):
    _, _, fetched = cached
    assert not fetched & {"README.md", "loader.py", "weights.bin", "dataset_infos.json"}
    assert "main/train-00000-of-00001.parquet" in fetched
    assert not fetched & {"main/test-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"}


def test_what_was_fetched_is_read_without_a_network(cached, tmp_path, monkeypatch):
    home, answers, _ = cached
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)  # hides no named data set
    assert ask(home, "http://127.0.0.1:1", *READ, HF_HUB_OFFLINE="1") == answers
    assert ask(home, "http://127.0.0.1:1", READ[0], READ[-1]) == [answers[0], answers[-1]]


REFUSED = [
    ({"name": "tiny/absent"}, ["data set 'tiny/absent' is neither a file nor found at", "hf auth login"]),
    ({"name": "tiny/sharded@v3"}, ["has no revision 'v3'", "/datasets/tiny/sharded"]),
    ({"name": "tiny/gated"}, ["is gated; ask for access at", "/datasets/tiny/gated", "hf auth login"]),
    ({"name": "tiny/expired"}, ["was refused to the token in use"]),
    ({"name": "a b/c"}, ["data set 'a b/c' is neither a file nor a name that the hub could have"]),
    (
        {"name": "tiny/sharded", "split": "validation"},
        [
            "data set 'tiny/sharded' has no files of split 'validation'; there are "
            "data/test-00000-of-00001.parquet, data/train-00000-of-00002.parquet, "
            "data/train-00001-of-00002.parquet; change split or subset"
        ],
    ),
    (
        {"name": "tiny/single", "split": "test"},
        ["has no files of split 'test'; there are latest-problems.jsonl"],
    ),
    (
        {"name": "tiny/sharded", "subset": "hard"},
        ["has no files of split 'train', subset 'hard'; there are data/"],
    ),
    ({"name": "tiny/subsets"}, ["data set 'tiny/subsets' has subsets easy, hard; set subset to one"]),
    ({"name": "tiny/nothing"}, ["has no files of split 'train'; there are none that can be read"]),
    ({"name": "math500"}, ["data set 'HuggingFaceH4/MATH-500' has no test.jsonl"]),
    ({"name": "gsm8k", "subset": "irony"}, ["has no irony/train-*.parquet"]),
    ({"name": "deepscaler", "split": "test"}, ["deepscaler has no split 'test'; leave split out"]),
    ({"name": "math500", "subset": "easy"}, ["math500 has no subset 'easy'; leave subset out"]),
    (
        {"name": "tiny/single", "answer": "target"},
        ["tiny/single/latest-problems.jsonl, line 1: there is no column 'target'"],
    ),
]


def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(tmp_path, endpoint):
    answers = ask(tmp_path, endpoint, *(source for source, _ in REFUSED))
    for answer, (_, named) in zip(answers, REFUSED, strict=True):
        assert answer.startswith("refused: ") and "\n" not in answer
        for part in named:
            assert part in answer


def test_offline_and_absent_names_the_command_that_fetches(tmp_path, endpoint):
    [answer] = ask(tmp_path, endpoint, {"name": "tiny/single@v2"}, HF_HUB_OFFLINE="1")
    assert "data set 'tiny/single@v2' is neither a file nor in the cache" in answer
    assert "`hf download tiny/single --repo-type dataset --revision v2`" in answer


@pytest.mark.parametrize(
    ("files", "split", "subset", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], "train", None, ["train.jsonl"]),
        (["a/train/0.parquet", "a/val/0.parquet"], "validation", "a", ["a/val/0.parquet"]),
        (["contest.jsonl", "training_data.csv"], "test", None, []),
        (["contest.jsonl"], "train", None, ["contest.jsonl"]),
        (["data.jsonl", "dev.jsonl"], "train", None, ["data.jsonl"]),
        (["train.csv", "train.parquet"], "train", None, ["train.parquet"]),
        (["en.jsonl", "de.jsonl"], "train", "de", ["de.jsonl"]),
        (["extended-0.parquet", "default-0.parquet"], "extended", None, ["extended-0.parquet"]),
    ],
)
def test_files_are_chosen_by_the_hubs_conventions(files, split, subset, chosen):
    assert of_split(files, split, subset) == chosen
