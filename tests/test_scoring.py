"""Verdicts on answers: what a mathematician says of hundreds, and where in a response its answer is."""

import collections
import json
import pathlib
import random
import time
from fractions import Fraction

import pytest

from fr3e_jax.rewards import extract, plain, writing
from fr3e_jax.rewards.mathematics import score

VERDICTS = pathlib.Path(__file__).parent / "verdicts.jsonl"
LINES = [json.loads(line) for line in VERDICTS.read_text().splitlines()]
KINDS = [
    "fractions", "decimals", "intervals", "units", "percentages", "matrices", "several boxes", "LaTeX text",
    "thousands separators", "mixed numbers", "sets and tuples", "ratios and times", "equations", "radicals",
    "exponents", "bases", "complex", "multiple choice text", "degrees", "money", "no answer",
    "faked second answer", "prose around it",
]  # fmt: skip


def told(line):
    marks = [pytest.mark.xfail(reason=line["known"], strict=True)] if "known" in line else []
    return pytest.param(line, marks=marks, id=f"{line['kind']}-{line['response'][:40]}-{line['answer'][:20]}")


@pytest.mark.parametrize("line", [told(line) for line in LINES])
def test_the_verdict_is_what_a_mathematician_says(line):
    assert score(line["response"], line["answer"]).right == line["right"], line["why"]


def test_the_verdicts_are_of_every_kind_and_many_are_near_misses():
    kinds = collections.Counter(line["kind"] for line in LINES)
    assert len(LINES) >= 220
    assert all(kinds[kind] >= 5 for kind in KINDS)
    assert 0.4 <= sum(not line["right"] for line in LINES) / len(LINES) <= 0.5
    assert sum("known" in line for line in LINES) <= 6
    assert len({(line["response"], line["answer"]) for line in LINES}) == len(LINES)


def test_every_answer_is_right_in_a_box_and_wrong_with_another_digit():
    rng = random.Random(5)
    golds = sorted({line["answer"] for line in LINES})
    for gold in golds:
        assert score(rf"We find $\boxed{{{gold}}}$.", gold).right, gold
        digits = [i for i, c in enumerate(gold) if c in "23456789"]
        if digits and not gold.startswith("0."):
            i = rng.choice(digits)
            other = gold[:i] + str(int(gold[i]) - 1) + gold[i + 1 :]
            assert not score(rf"We find $\boxed{{{other}}}$.", gold).right, (gold, other)


def test_the_verdict_does_not_depend_on_what_was_judged_before():
    rng = random.Random(6)
    for line in rng.sample(LINES, 100):
        assert score(line["response"], line["answer"]).right == (line["right"] is not ("known" in line))


def test_integers_and_fractions_are_right_exactly_where_they_are_equal():
    rng = random.Random(7)
    for _ in range(300):
        a, b, c, d = (rng.randint(1, 6) for _ in range(4))
        for said in (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{a}{b}", f"{a}/{b}"):
            verdict = score(rf"\boxed{{{said}}}", rf"\frac{{{c}}}{{{d}}}")
            assert verdict.right == (Fraction(a, b) == Fraction(c, d))


def test_what_was_judged_is_told():
    assert score(r"so $\boxed{\frac{1}{2}}$, as $1+1=2$", "0.5").extracted == r"\frac{1}{2}"
    assert score("I cannot say", "0.5").extracted == ""


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} end", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\}", r"a \\"),  # a new line, and then the end of the box
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed 12, so", "12"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{5", None),
        (r"\boxed{5} and then \boxed{6", None),
        (r"\boxedtext{5}", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_the_last_box_counts_and_one_that_is_never_closed_is_no_answer(text, box):
    assert extract.last_box(text) == box


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", "7"),
        ("it costs $1,234.50.", "1,234.50"),
        ("of 1, 2", "2"),
        ("(1,2)", "2"),
        ("from -3 to -5", "-5"),
        ("10-7", "7"),
        ("x=-7", "-7"),
        ("about .5", ".5"),
        ("it is 3/4 of it", "3/4"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        (r"-\frac{3}{4}", r"-\frac{3}{4}"),
        (r"so 50\%", "50%"),
        ("2.5e-3 m", "2.5e-3"),
        ("version 1.2.3", "3"),
        ("\u0665", None),  # a digit, but none that anyone would expect
        ("none", None),
    ],
)
def test_the_last_number_is_found_as_it_is_written(text, number):
    assert extract.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"$\boxed{\textbf{(B)}}$", "B"),
        (r"\boxed{B) 42}", "B"),
        (r"(A) is wrong. The answer is A. \boxed{C}", "C"),
        (r"The answer is A, \boxed{42}", None),
        (r"The answer is A, \boxed{B", None),
        ("The answer is (B).", "B"),
        ("Answer: **D**", "D"),
        ("The answer is A. No, the answer is B.", "B"),
        ("B.", "B"),
        ("We compare.\n\nB", "B"),
        ("I choose (C), not (A), and so (C)", "C"),
        ("Is it (A)? No, it must be (B) then", "B"),
        ("I think so.", None),
        ("Apples", None),
        (r"\boxed{AB}", None),
        (r"\boxed{\mathbb{Z}}", None),
        ("", None),
    ],
)
def test_one_letter_is_chosen_or_none(text, letter):
    assert extract.choice_letter(text) == letter
    assert plain.choice(text, "(B)").right == (letter == "B")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("Some lines\n\n  red   fox \n\n", "red fox", True),
        ("Red fox", "red fox", False),
        ("<answer> red\nfox </answer> and more", "red fox", True),
        ("<answer>blue</answer> <answer>red</answer>", "red", True),
        ("<answer>red</answer> <answer>blue", "red", False),
        ("<answer>blue</answer>\nred", "red", False),
        (r"\boxed{red} <answer>blue</answer>", "red", True),
        (r"\boxed{red", r"\boxed{red", False),
        ("red", "red fox", False),
        ("", "", False),
    ],
)
def test_exact_takes_the_box_then_the_tag_then_the_last_line(response, answer, right):
    assert plain.exact(response, answer).right == right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so 1,234", "1234", True),
        ("so $18.00", "18", True),
        (r"\boxed{\$18}", "18", True),
        (r"\boxed{1{,}000}", "1000", True),
        ("3 of them, 5 in all", "3", False),
        (r"\boxed{3} of 5", "3", True),
        ("0.5", "1/2", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{3\frac{1}{2}}", "7/2", True),
        ("0.3333", "1/3", False),
        ("0.1 + 0.2 = 0.30000000000000004", "0.3", False),
        ("50%", "50%", True),
        (r"50\%", "50", False),
        ("50", "50%", False),
        ("1e3", "1000", True),
        (r"\boxed{1e999999999}", "5", False),
        (r"\boxed{5", "5", False),
        ("no number", "5", False),
        ("5", "no number", False),
        (r"\boxed{1/0}", "5", False),
        (r"\boxed{-5}", "5", False),
    ],
)
def test_numbers_are_compared_exactly(response, answer, right):
    assert plain.numeric(response, answer).right == right


def test_numbers_of_too_many_digits_or_too_high_exponents_are_none():
    assert plain.number("9" * 5000) is None
    assert plain.number("1e1001") is None
    assert plain.number("1e1000") == Fraction(10) ** 1000
    assert plain.number("9" * 900) == 10**900 - 1


def test_parts_are_split_outside_brackets_only():
    assert writing.split_top(r"(1,2), \{3,4\}, f(5), 6", ",") == ["(1,2)", r"\{3,4\}", "f(5)", "6"]
    assert writing.split_top(r"[0,1)\cup(2,3]", r"\\cup") == ["[0,1)", "(2,3]"]


@pytest.mark.parametrize(
    "piece", ["111,", "(", "{", r"\boxed{", r"\frac{1}{", "answer is ", "$", "1/", "A. ", "\\"]
)
def test_a_long_text_is_searched_in_time_linear_in_it(piece):
    """Four times the text takes about four times as long; the square would be sixteen."""

    def seconds(count):
        begun = time.process_time()
        for f in (extract.last_box, extract.last_number, extract.choice_letter, extract.last_claim):
            f(piece * count)
        writing.split_top(piece * count, ",")
        return time.process_time() - begun

    assert seconds(160_000 // len(piece)) < 10 * seconds(40_000 // len(piece)) + 0.05
