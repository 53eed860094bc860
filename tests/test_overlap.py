"""Duplicates and overlaps, against slow versions that say what they mean."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.problems.overlap import duplicates, overlaps, report, words
from fr3e_jax.types import Problem


def problems(*questions):
    return [Problem(question, "1", "math") for question in questions]


def slowly(train, held_out, n):
    """Compare every stretch with every stretch, as text."""
    found = []
    for i, question in enumerate(held_out):
        ours = question.lower().split()
        for other in train:
            theirs = other.lower().split()
            if len(ours) < n or len(theirs) < n:
                same = ours == theirs
            else:
                text = f" {' '.join(theirs)} "
                same = any(f" {' '.join(ours[a : a + n])} " in text for a in range(len(ours) - n + 1))
            if same:
                found.append(i)
                break
    return found


texts = st.lists(st.text(alphabet="aBb ", max_size=24), max_size=6)


@given(texts, texts, st.integers(1, 5))
def test_overlaps_are_those_of_the_slow_comparison(train, held_out, n):
    assert overlaps(problems(*train), problems(*held_out), n) == slowly(train, held_out, n)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    train = problems(f"before {shared} after", "another question altogether")
    asked = [f"{shared} and then", f"so {shared.replace('thirteen', 'fourteen')}", f"Now: {shared.upper()}!"]
    assert overlaps(train, problems(*asked)) == [0, 2]


def test_a_short_question_overlaps_as_a_whole_only():
    train = problems("What is 2 + 2?", "First: what is 3 + 3, and then what is it squared?")
    assert overlaps(train, problems("what is 2+2", "What is 3 + 3?", "What is 2 + 2, please?")) == [0]


def test_case_space_and_punctuation_make_no_other_question_but_signs_do():
    same = ["Find $x$.", "find x", " FIND\n\n(x)?", "Find: x!"]
    assert duplicates(problems(*same)) == 3
    assert duplicates(problems("What is 3+4?", "What is 3-4?", "What is 3*4?", "Is 3<4?", "Is 3>4?")) == 0
    assert words("Straße 1.5 x^2") == ["strasse", "1", "5", "x", "^", "2"]


@pytest.mark.parametrize(
    ("question", "twin"),
    [
        ("What is 7 - 5?", "What is 7 \u2212 5?"),
        ("What is 7 - 5?", "What is\u00a07\u202f\u2013\u20095?"),
        ("a long-term plan", "a long\u2010term plan"),
        ("What is 7 - 5?", "What is \uff17 \ufe63 \U0001d7d3\uff1f"),
        ("What is 3 * 4 / 2?", "What is 3 \u00d7 4 \u00f7 2?"),
        ("Find x^2 + y^10.", "Find x\u00b2 + y\u00b9\u2070."),
        ("Is x <= 3?", "Is x \u2264 3?"),
        ("Add 1/2 to it", "Add \u00bd to it"),
        ("the efficient way", "the e\ufb03cient\u200b way"),
        ("Andr\u00e9's caf\u00e9", "Andre\u0301\u2019s cafe\u0301"),
        ("co\u00adoperate \ufeffnow", "cooperate now"),
    ],
)
def test_characters_that_look_alike_make_no_other_question(question, twin):
    assert words(question) == words(twin)
    assert duplicates(problems(question, twin)) == 1
    long = " and then another one of the same kind" * 3
    assert overlaps(problems(question + long), problems(f"So: {twin}{long}")) == [0]


def test_signs_that_say_other_things_make_other_questions():
    asked = [
        f"Is x {sign} 3?"
        for sign in ("\u2264", "\u2265", "\u2260", "=", "<", ">", "\u2212", "\u00d7", "\u00f7")
    ]
    assert duplicates(problems(*asked, "Is x2 3?", "Is x\u00b2 3?")) == 0


def test_the_report_says_all_numbers_in_one_line():
    long = " ".join(f"word{i}" for i in range(14))
    train = problems(*(f"question {i}" for i in range(1200)), "Question 7!", long)
    told = report(train, problems(f"{long}\nand more", "new", "question 9"))
    assert told == (
        "1,202 problems, 1 duplicates; of 3 held-out problems 2 share 13 words in a row with a training "
        "problem (e.g. 'word0 word1 word2 word3 word4 word5 word6 word7 word8 word9 ')"
    )
    assert report(train, []) == "1,202 problems, 1 duplicates"
    assert report(problems("a", "c"), problems("b", "d")) == (
        "2 problems, 0 duplicates; of 2 held-out problems none shares 13 words in a row with a training "
        "problem"
    )


def test_a_planted_overlap_is_found_among_many_questions():
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    train = [" ".join(draw.choices(vocabulary, k=60)) for _ in range(2000)]
    held_out = [" ".join(draw.choices(vocabulary, k=60)) for _ in range(300)]
    for i in (5, 77, 299):
        start = draw.randrange(40)
        piece = re.findall(r"\w+", train[i])[start : start + 13]
        held_out[i] = f"{held_out[i]} {' '.join(piece)}"
    assert overlaps(problems(*train), problems(*held_out)) == [5, 77, 299]
