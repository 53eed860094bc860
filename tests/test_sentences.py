"""Where sentences begin in prose, mathematics and code, as tokens; and the rule that forks there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.pretrained.sentences import sentence_starts
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.run.build import open_model

EXAMPLES = {
    "prose": "|First we add. |Then we stop! |Why? |See fig. 2.",
    "numbers": "|Take 3.14 of it, e.g. half. |It is 2.",
    "steps": "|7+5+0=12,1;|4+8+1=13,1;|=632",
    "list": "|Plan:\n|1. Add 3 and 4.\n|2. Divide by 2. |Done",
    "mathematics": r"|So \(x\;=\;2\). |Thus \[x! = 2\].",
    "derivation": "|x = 1 + 2\n  |= 3\n\n|Hence 3.",
    "code": "|for i in range(3):\n    |total += i\n|return total",
    "quoted": '|He said "stop." |**Bold.** |Next',
    "wide": "|先加一。|然后停。|好",
    "nothing": "",
    "blank": " \n ",
}


def bytes_of(text):
    """One token for each byte."""
    return [bytes([byte]) for byte in range(256)], list(text.encode())


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES)
def test_sentences_begin_where_a_reader_sees_them(text):
    """`|` marks the beginnings."""
    plain = text.replace("|", "")
    found = np.flatnonzero(sentence_starts(*bytes_of(plain))).tolist()
    pieces = text.split("|")
    assert found == [len("".join(pieces[:n]).encode()) for n in range(1, len(pieces))]


@given(st.data())
def test_how_a_text_is_cut_into_tokens_changes_no_beginning(data):
    """A beginning is the token with the sentence's first character in it."""
    text = "".join(EXAMPLES.values()).replace("|", "").encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=60)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    tokens = sentence_starts([b"", *pieces], [number for n in range(len(pieces)) for number in (n + 1, 0)])
    assert not tokens[1::2].any()  # control tokens have no text
    per_byte = np.flatnonzero(sentence_starts(*bytes_of(text.decode())))
    starts = np.array([0, *cuts])
    expected = {int(np.searchsorted(starts, byte, side="right")) - 1 for byte in per_byte}
    assert set(np.flatnonzero(tokens[::2]).tolist()) == expected


def test_the_quickstarts_steps_begin_behind_semicolons_and_its_end_begins_none():
    text = load_text(open_model("quickstart").source, "plain")
    answer = "7+5+0=12,1;4+8+1=13,1;=632"
    tokens = [*text.encoded(answer), *text.end_tokens[:1], 0, 0]
    marks = text.sentence_starts(np.array([tokens, tokens]), np.array([len(tokens) - 2, 12]))
    assert [np.flatnonzero(row).tolist() for row in marks] == [[0, 11, 22], [0, 11]]
