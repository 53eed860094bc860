"""Answers written to break a scorer, or to pass: none crashes it, none passes, few need its time limit."""

import random
import time

import pytest

from fr3e_jax.rewards.pool import Asked, ScoringPool
from fr3e_jax.rewards.rules import INLINE, scorer_of

MANY = 100_000
GOLDS = (
    "42",
    r"\frac{\sqrt{3}}{2}",
    "x^2+1",
    "(0,1]",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\text{even}",
)


def boxed(text):
    return rf"So \boxed{{{text}}}"


def towers():
    """Powers and factorials that no machine can hold."""
    for base, high in [("9", "9"), ("10", "10"), ("2", "99"), ("x", "999"), (r"\pi", "9"), ("1.5", "999")]:
        for depth in (2, 3, 5, 12, 40):
            yield base + "^{" + f"{high}^{{" * depth + high + "}" * (depth + 1)
            yield base + "^(" + f"{high}^(" * depth + high + ")" * (depth + 1)
            yield f"{base}**{high}" + f"**{high}" * depth
            yield "(" * depth + base + f"^{{{high}{high}}})" * depth
            yield rf"\left({base}^{{{high * depth}}}\right)^{{{high * depth}}}"
    for number in ("5", "99", "100000", "1000000000", "x", "(10^9)", r"\frac{99999}{2}"):
        for marks in (1, 2, 3, 9, 300):
            yield number + "!" * marks if number != "5" or marks > 1 else "5!+1"
            yield "(" * marks + number + "!)" * marks
    for text in (
        "1e9999999",
        "1E+99999999",
        "1e-99999999",
        "2^{10000000}",
        "10^{10000000}",
        "0.1^{99999999}",
    ):
        yield from (text, "-" + text, f"1/({text})", rf"\sqrt{{{text}}}", rf"\sin({text})", rf"\ln({text})")
    for text in (
        r"\binom{1000000}{500000}",
        r"\sum_{k=1}^{10^9} k",
        r"\prod_{k=1}^{99999}k",
        r"\int_0^1 x^{x^x} dx",
    ):
        yield from (text, f"{text}+1", f"({text})^{{9999}}")


def nested():
    """Deep brackets of every kind, closed and not."""
    pairs = [("(", ")"), ("{", "}"), ("[", "]"), (r"\{", r"\}"), (r"\left(", r"\right)"), ("|", "|")]
    pairs += [
        (r"\frac{1}{", "}"),
        (r"\sqrt{", "}"),
        (r"\sqrt[3]{", "}"),
        (r"\text{", "}"),
        ("e^{", "}"),
        ("-(", ")"),
    ]
    pairs += [
        (r"\sin(", ")"),
        (r"\sin ", ""),
        (r"\begin{pmatrix}", r"\end{pmatrix}"),
        (r"\boxed{", "}"),
        ("2^", ""),
    ]
    pairs += [("(1,", ")"), (r"\{1,", r"\}"), (r"\lfloor ", r"\rfloor "), (r"\overline{", "}"), ("x_{", "}")]
    for opening, closing in pairs:
        for depth in (3, 7, 30, 300, 9000):
            yield opening * depth + "7" + closing * depth
        yield opening * 200 + "7"
        yield "7" + closing * 200


def long_ones():
    """Much of one thing."""
    things = [
        "9",
        "1,",
        "42 ",
        "x",
        "-",
        "+1",
        "1+",
        "=",
        "<x",
        r"\pm",
        r"\cup(1,2)",
        "&",
        r"\\",
        "%",
        r"\%",
        "^",
        "_",
    ]
    things += [
        "'",
        "!",
        ":",
        "3:",
        " ",
        "\n",
        ".",
        "0.",
        "1/",
        r"\frac",
        r"\frac12",
        r"\text{a}",
        "$",
        "$1$",
        "or ",
    ]
    things += [
        r"\circ",
        r"^\circ",
        "answer is ",
        "Answer: 4 ",
        r"\pi",
        "e",
        "i",
        "(",
        ")",
        "}",
        r"\}",
        "cm ",
        "1e5",
    ]
    for thing in things:
        for length in (60, 900, MANY):
            yield thing * (length // len(thing))


def strange():
    """Characters that are no mathematics."""
    for code in [
        *range(32),
        127,
        0x85,
        0xA0,
        0xAD,
        0x200B,
        0x202E,
        0x2028,
        0xFEFF,
        0xFFFD,
        0x661,
        0xFF14,
        0x1D7D2,
    ]:
        yield f"4{chr(code)}3"
        yield chr(code) * 50
    yield from (
        "\u0664\u0662",
        "\uff14\uff12",
        "\U0001d7d2\U0001d7d0",
        "\u2463\u2461",
        "4\u03012",
        "\u56db\u5341\u4e8c",
    )


def code():
    """What an evaluator would run."""
    yield from (
        "__import__('os').system('touch /tmp/hostile')", "exec('1')", "eval('42')", "lambda: 42", "True",
        "False", "None",
        "print(42)", "41+True", "int('42')", "S(42)", "Symbol('x')", "oo", "zoo", "nan", "I", "E", "N", "Q",
        "S", "gold",
        "answer", "sympy.Integer(42)", "[42 for _ in range(1)][0]", "42 if True else 0", "0x2a", "0b101010",
        "4_2",
        "'42'*9", "{}", "{42: 1}", "42;43", "x.__class__", "{42}.pop()", "%s", "%d", "{0}",
        r"\input{/etc/passwd}",
        r"\def\a{42}\a", r"\newcommand{\x}{42}", r"\operatorname{eye}(99999)",
        r"\operatorname{zeros}(99999, 99999)",
        r"\mathrm{gold}", r"\ref{answer}", r"\gcd(99999^{99999}, 3)", r"\lim_{x\to0} x^{x^x}", r"\det(x)",
        "x -> 42",
    )  # fmt: skip


def fakes():
    """Many answers in one, or things that hold every answer."""
    yield from (
        ",".join(map(str, range(1, 100))), " or ".join(map(str, range(40, 50))), "[0,100]", "[42,43]",
        r"42\text{ or }43",
        "x", "x=x", "42,x", "42=43", "42=x=43", "43=42=43", r"\mathbb{R}", r"\mathbb{Z}",
        r"(-\infty,\infty)", "0<x<100",
        "x>0", r"x\ne 0", r"42\pm 1", r"\pm 42", r"\{42,43\}", "(42,43)", "42:43", r"42\cup 43", "42;43",
        "42/43", "4 2",
        r"\cosh\infty", r"-\cosh\infty", r"\cosh^2\infty", r"\ln^2\infty", r"\cosh\cosh\infty",
        r"\infty^2",
        r"[\cosh\infty,\cosh\infty]", r"\exp\infty", r"\sqrt{\infty}", r"\frac{1}{\infty}", r"\infty-\infty",
        r"\frac{\infty}{\infty}", r"0\cdot\infty", r"\tan\frac{\pi}{2}", r"\infty+42", r"\log\infty",
        r"\infty!",
        "42?", r"42\text{ or not}", r"42\approx 43", "not 42", r"\text{42 or more}", "more than 42", "42!",
        "42x", "42^2",
        "42i", r"42\infty", r"42\cdot x", "42 43", "42.43", "-42", "42e1", r"0 \cdot 42",
        "even or odd",
        r"\text{even}, \text{odd}", r"x^2+1 \text{ or } x^2", "[0,1]", "(0,1)", "[0,1)", r"(0,1]\cup(2,3)",
        "x^2+1=0",
        "x^2+x", r"\frac{\sqrt{3}}{2}, \frac{1}{2}", r"\pm\frac{\sqrt{3}}{2}", "x-x", "x/x", "0/0", "1/0",
        "0^0",
        r"\frac{0}{0}", r"\emptyset", r"\text{}", "{}", " ", r"\ ", "~", "$", "$$", ".", "-", "+",
        r"\frac{}{}", r"\sqrt{}",
    )  # fmt: skip


def nearly_constant():
    """Expressions with letters that would be slow to simplify, or are a number but for very little."""
    yield from (
        "(x+1)^{99}(y+2)^{99}", "(x+y+z+w)^{60}", r"(\sin x+\cos x)^{300}", r"\tan(x)^{300}+42",
        r"\sin(\sin(\sin(\sin(\sin(\sin x)))))", r"\frac{(x+y)^{99}-(x-y)^{99}}{(x+z)^{99}}",
        r"\sin(99999x)^{99}", r"\cos(10^{300}x)", r"42+10^{-600}x", r"42+\frac{1}{10^{600}x}",
        r"42+e^{-10^{300}x^2}", "42x^0+0y+10^{-99}z", "42+x^{600}", "42+x^{-600}", r"\sqrt{x^2}-x+42",
        r"\frac{42\sqrt{x^2}}{x}", r"42+\sin(10^{-300}x)", r"42\cos(10^{-200}x)",
        r"\sqrt{\sqrt{\sqrt{x^{99}}}}", r"\sec x\csc x\cot x\tan x", r"42\frac{|x|}{x}",
        r"42\lfloor\frac{1}{1+x^2}+1\rfloor", r"\sqrt{1764+10^{-600}x}", "x^{y^{z}}", "42^{x^0}+10^{-9}x",
    )  # fmt: skip


def whole():
    """Responses whose box is not the one they want to be judged by."""
    for gold in ("42", "even"):
        yield from (
            rf"the answer is {gold} \boxed{{6}}", rf"\boxed{{{gold}}} \boxed{{6}}",
            rf"\boxed{{6}} \boxed{{{gold}",
            rf"\boxed{{{gold}}} and \boxed{{", rf"\boxed{{{gold}", rf"\boxed{{{gold}}}" * 1500 + r"\boxed{6}",
            r"\boxed{" * 9000 + gold, rf"\fbox{{{gold}}}\boxed{{}}", rf"<answer>{gold}</answer> \boxed{{6}}",
            rf"\boxed{{6}}. Ignore all of that, the answer is {gold}.", rf"\boxed{{{gold}\}}",
            rf"$\boxed{{6}}$ ${gold}$",
        )  # fmt: skip
    yield from (
        "answer is " * 9000,
        "$" * MANY,
        "1," * (MANY // 2),
        "111," * (MANY // 4),
        r"\boxed " * 9000,
        "\x00" * MANY,
    )


def hostile():
    """All of them, each against some of the answers that it is not."""
    rng = random.Random(0)
    told = [text for made in (towers, nested, long_ones, strange, code, nearly_constant) for text in made()]
    for text in fakes():
        yield from ((boxed(text), gold) for gold in GOLDS if "".join(text.split()) != gold)
    for i, text in enumerate(told):
        for gold in {GOLDS[i % len(GOLDS)], rng.choice(GOLDS)}:
            if "".join(text.split()) != gold:
                yield boxed(text), gold
    yield from ((boxed(text), "42") for text in nearly_constant())
    for text in whole():
        yield from ((text, "42"), (text, "even"))


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_no_hostile_answer_crashes_the_scorer_or_passes_and_few_need_its_time_limit(share):
    """Each in a worker with a limit of 2 s; the pool has one, so that its time here is what it would cost."""
    told = list(hostile())[::share]
    assert len(told) > 800 / share
    pool = ScoringPool(["math"], workers=1, time_limit=2.0)
    try:
        verdicts = pool.begin([Asked("math", response, gold, None) for response, gold in told]).result()
        passed = [
            (response[:100], gold) for (response, gold), v in zip(told, verdicts, strict=True) if v.right
        ]
        assert passed == []
        assert pool.timed_out <= 3
    finally:
        pool.close()


@pytest.mark.parametrize("scorer", sorted(INLINE))
def test_no_hostile_answer_crashes_a_plain_scorer(scorer):
    """They run where they are asked, without any limit: 0.5 s is a hundred times what one may take."""
    for response, _ in hostile():
        begun = time.process_time()
        verdict = scorer_of(scorer)(response, "Z" if scorer == "choice" else "-17", None)
        assert not verdict.right
        assert time.process_time() - begun < 0.5
