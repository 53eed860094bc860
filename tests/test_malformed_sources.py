"""What every malformed file of problems is told."""

import random
import re

import pyarrow
import pyarrow.parquet
import pytest
from problem_files import refusal, write_parquet

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
