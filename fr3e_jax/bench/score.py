"""Scoring mathematical answers: this project's scorer, against math-verify alone."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from math_verify import parse, verify
from rich.console import Console
from rich.table import Table

from fr3e_jax.config.values import Count
from fr3e_jax.rewards import mathematics

PROSE = "Let us go step by step. First we write $f(x) = x^2 - 3x + 1$ and note that $f(2) = -1$. "


def measure_scoring(answers: Count = 2000, repeats: Count = 3, json: bool = False) -> list[dict[str, Any]]:
    """Measure verdicts a second on one core: the scorer `math`, against math-verify on whole responses.

    Args:
      answers: of the kinds that MATH has, half of them right, all different.
      repeats: measurements of each side, in turns; medians are shown.
      json: print an object a line instead of a table.

    Returns:
      What is printed, an object a line.
    """
    sides: dict[str, Callable[[str, str], bool]] = {
        "math": lambda response, gold: mathematics.score(response, gold).right,
        "math-verify": lambda response, gold: verify(
            parse(f"${gold}$", parsing_timeout=None),
            parse(response, parsing_timeout=None),
            timeout_seconds=None,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    right: dict[str, int] = {}
    for repeat in range(repeats):
        # Answers of its own for each turn: the scorer remembers what it has read.
        pairs = [make_answer(random.Random(f"{repeat} {i}"), i % 2 == 0) for i in range(answers)]
        for name, judge in sides.items():
            started = time.perf_counter()
            right[name] = sum(judge(*pair) for pair in pairs)
            seconds[name].append(time.perf_counter() - started)
    rates = {name: answers / statistics.median(times) for name, times in seconds.items()}
    table = Table(title=f"{answers} answers, half of them right, on one core")
    for column in ("side", "answers / s", "right"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{right[name] / answers:.1%}")
    if not json:
        Console().print(table)
        return []
    ratio = rates["math"] / rates["math-verify"]
    return [
        {"answers": answers, "per_second": rates, "right": right, "ratios": {"score_vs_math_verify": ratio}}
    ]


def make_answer(rng: random.Random, right: bool) -> tuple[str, str]:
    """Make a response and the right answer, which it writes in another way or misses by 1: (both)."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 99), rng.randint(2, 30)
    off = 0 if right else 1
    gold, said = rng.choice(
        [
            (f"{a}", f"{a + off}"),
            (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a + off}}}{{{b}}}"),
            (rf"{c}\sqrt{{{b}}}", rf"\sqrt{{{c * c * b + off}}}"),
            (f"{a * 1000}", f"{a},{off:03}"),
            (f"({a},{b})", rf"\left({a}, {b + off}\right)"),
            (f"x^2+{a}x+{b}", f"{b + off}+{a}x+x^2"),
            (rf"[{a},\infty)", rf"\left[{a + off},\infty\right)"),
            (rf"{c}\pi", rf"\pi\cdot {c + off}"),
            (rf"{b}\text{{ cm}}", f"{b + off}"),
            (f"{c}^{{{b}}}", f"{c + off}^{{{b}}}"),
        ]
    )
    return PROSE * rng.randint(2, 12) + rf"So the answer is $\boxed{{{said}}}$.", gold
