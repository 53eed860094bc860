"""Files of JSON lines: what is written is read as it was, and what a kill cut short is told and skipped."""

import json

import pytest

from fr3e_jax.run.jsonl import LineWriter, read_lines, to_line
from fr3e_jax.run.reporter import read_metrics, reopen

TEXTS = ["naïve 7 * 8 = 56 → \\frac{1}{2}", "日本語", "\u2028a\u2029b\x85c\x1c\r\n", "half \ud83d of a pair"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_it_was_written_and_letters_are_kept(tmp_path, text):
    file = tmp_path / "a.jsonl"
    writer = LineWriter(file)
    writer.write([{"text": text}, {"text": "x"}])
    writer.close()
    assert [value["text"] for _, value in read_lines(file).objects] == [text, "x"]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2  # to any reader
    raw = file.read_text(encoding="utf-8")
    assert all(letter in raw for letter in text if letter.isalpha() and letter < "\ud800")


def test_a_line_is_what_json_has_it_to_be():
    value = {"step": 3, "x": [1.5, None, True], "nested": {"a": "b"}}
    assert to_line(value) == json.dumps(value).encode() + b"\n"


@pytest.mark.parametrize("kept", range(1, 29))
def test_a_last_line_cut_anywhere_is_told_and_skipped_and_written_over(tmp_path, kept):
    """Also inside a letter of several bytes."""
    file = tmp_path / "a.jsonl"
    whole = [to_line({"step": 0}), to_line({"step": 1, "text": "é→"})]
    assert len(whole[1]) == 29
    file.write_bytes(whole[0] + whole[1][:kept])
    lines = read_lines(file)
    assert [value for _, value in lines.objects] == [{"step": 0}]
    assert lines.cut == 2 and lines.damaged == []
    assert lines.warnings() == [f"warning: {file}: the last line, 2, is cut short, and is skipped"]
    writer = LineWriter(file)
    writer.write([{"step": 1, "text": "é→"}], sync=True)
    writer.close()
    assert file.read_bytes() == b"".join(whole)


@pytest.mark.parametrize("damage", [b"", b"[1]", b"7", b"{", b"\xff\xfe", b"\x00", b"[" * 100_000])
def test_a_damaged_line_is_named_and_skipped(tmp_path, damage):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"step": 0}\n' + damage + b'\n{"step": 2}\n')
    lines = read_lines(file)
    assert [number for number, _ in lines.objects] == [1, 3]
    assert lines.warnings() == [f"warning: {file}: line 2 is damaged, and skipped"]


def test_no_file_has_no_lines(tmp_path):
    lines = read_lines(tmp_path / "none.jsonl")
    assert (lines.objects, lines.warnings()) == ([], [])


def test_metrics_are_reopened_at_a_step_with_what_is_lost_told(tmp_path):
    """Lines of steps after it go, the last line of a step counts, and cut ones are named."""
    rows = [{"step": 0}, {"step": 2, "x": 1}, {"step": 2, "x": 2}, {"x": 3}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(to_line, rows)) + b'{"step": 4')
    file, messages = reopen(tmp_path, tmp_path, "metrics.jsonl", 2)
    file.write([{"step": 3, "text": "é"}])
    file.close()
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 2, "x": 2}, {"step": 3, "text": "é"}]
    assert [message.partition("metrics.jsonl")[2] for message in messages] == [
        ": the last line, 6, is cut short, and is skipped",
        ": line 4 is damaged, and skipped",
        " has no line of step 1",
    ]


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
