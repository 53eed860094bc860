"""Generated problems, their verifiers, and the worked solutions with their one bad habit."""

import math
import re
import time

import numpy as np
import pytest

from fr3e_jax.config import ConfigError, DataConfig
from fr3e_jax.problems.additions import is_held_out_pair, make_addition
from fr3e_jax.rewards.rules import scorer_of

TASKS = ["carry_addition", "word_addition"]
LINE = re.compile(r"(\d)\+(\d)\+(\d)=(\d+),(\d)")


def task_of(name="carry_addition", low=3, high=3, dropped_carry=0.0):
    return make_addition(name, DataConfig(min_digits=low, max_digits=high), dropped_carry)


def verdict(name, response, answer):
    return scorer_of(name)(response, answer, None)


def operands(problem):
    a, b = re.findall(r"\d+", problem.question)
    return int(a), int(b)


# --- problems


@pytest.mark.parametrize("digits", [(1, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("name", TASKS)
def test_training_never_draws_what_is_held_out(name, digits):
    task = task_of(name, *digits)
    # One-digit operands have about a dozen held-out problems, of a hundred.
    held_out = {p.question for p in task.held_out(8 if digits == (1, 1) else 300)}
    training = {task[i].question for i in range(4000)}
    assert len(training) > (80 if digits == (1, 1) else 2000)
    assert not held_out & training


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_the_same_at_every_call_and_differ_by_index(name):
    first, second = task_of(name), task_of(name)
    assert [first[i] for i in range(200)] == [second[i] for i in range(199, -1, -1)][::-1]
    assert len({first[i] for i in range(200)}) > 190
    assert first.held_out(50) == second.held_out(50)
    # More of them are the same ones, and others.
    assert second.held_out(80)[:50] == first.held_out(50)
    assert len(set(first.held_out(80))) == 80


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_sums_and_numbers_of_digits_are_spread_evenly(name):
    task = task_of(name, 1, 3)
    problems = [task[i] for i in range(1500)] + task.held_out(50)
    assert all(problem.answer == str(sum(operands(problem))) for problem in problems)
    count = np.bincount([len(str(n)) for problem in problems for n in operands(problem)], minlength=4)
    total = count.sum()
    assert count[0] == 0 and len(count) == 4
    np.testing.assert_allclose(count[1:], total / 3, atol=4 * math.sqrt(total * 2 / 9))


def test_there_are_as_many_training_problems_as_the_length_says():
    task = task_of()
    assert task[len(task) - 1].answer


def test_all_held_out_problems_are_given_where_there_are_fewer():
    """Of the 100 pairs of digits; the hash says which."""
    every = {f"{a}+{b}=" for a in range(10) for b in range(10) if is_held_out_pair((a, b))}
    assert {p.question for p in task_of(low=1, high=1).held_out(50)} == every


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("digits", [18, 19, 40])
def test_long_operands_work_or_are_refused_with_a_message(name, digits):
    """What the configuration lets through must not end in a traceback of numpy."""
    try:
        problem = task_of(name, digits, digits)[0]
    except ConfigError:
        return
    assert problem.answer == str(sum(operands(problem)))
    assert all(len(str(n)) == digits for n in operands(problem))


@pytest.mark.parametrize(("low", "high"), [(0, 3), (3, 2), (1, 19)])
def test_operands_that_cannot_be_are_refused(low, high):
    with pytest.raises(ConfigError, match=f"data.min_digits {low} and data.max_digits {high}"):
        task_of(low=low, high=high)


# --- verifiers


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7+5+0=12,1;4+8+1=13,1;=132", 1),
        ("7+5+0=12,0;4+8+0=12,1;=122", 0),
        ("7+5+0=12,1;4+8+1=13,1;=13", 0),
        ("7+5+0=12,1;4+8+1=13,1;=1322", 0),
        ("7+5+0=12,1;4+8+1=13,1;=0132", 0),
        ("7+5+0=12,1;4+8+1=13,1;132", 0),
        ("7+5+0=12,1;4+8+1=13,1;=132;", 0),
        ("7+5+0=12,1;4+8+1=13,1;=132=132", 0),
        ("7+5+0=12,1;4+8+1=13,1;==132", 0),
        ("7+5+0=12,1;4+8+1=13,1;=99=132", 0),
        ("=132;=131", 0),
        ("=131;=132", 1),  # what follows the last column counts
    ],
)
def test_carry_addition_is_scored_by_what_follows_the_last_column(response, right):
    assert verdict("carry_addition", response, "132").right == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("1234", 1),
        ("The answer is 1234.", 1),
        ("The answer is 1,234.", 1),
        ("1000 + 234 = 1,234", 1),
        ("**1234**!", 1),
        ("$1234$\n", 1),
        ("It is 1234, I think", 1),
        ("1234 or 1235", 0),  # the last number counts
        ("1235, no: 1234", 1),
        ("-1234", 0),
        ("1234.5", 0),
        ("1234.50", 0),
        ("12345", 0),
        ("234", 0),
        ("one thousand two hundred and thirty-four", 0),
    ],
)
def test_word_addition_is_scored_by_the_last_number(response, right):
    assert verdict("word_addition", response, "1234").right == right


@pytest.mark.parametrize("response", ["The digits are 1,2", "3+9: 1,2", "12,3, so 1,2"])
def test_commas_that_do_not_separate_thousands_do_not_join_numbers(response):
    assert not verdict("word_addition", response, "12").right


HOSTILE = {
    "empty": "",
    "spaces": " \n\t ",
    "100 kB of digits": "9" * 100_000,
    "100 kB of digits and commas": "1," * 50_000,
    "100 kB of digits and points": "1." * 50_000,
    "100 kB of minus signs": "-" * 100_000,
    "100 kB of separators": ";=" * 50_000,
    "other scripts' digits": "".join(map(chr, (0x661, 0x663, 0x662))),
    "full-width digits": "".join(map(chr, (0xFF1D, 0xFF11, 0xFF13, 0xFF12))),
    "superscripts": "=" + "".join(map(chr, (0xB9, 0xB3, 0xB2))),
    "nul and lone surrogate": "\0\ud800;=\0",
    "not a number": ";=nan",
    "infinity": ";=inf",
    "exponent": ";=1.32e2",
    "brackets": "[(\\b{",
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_responses_score_nothing_quickly(name, kind):
    started = time.perf_counter()
    assert verdict(name, HOSTILE[kind], "132").right is False
    assert time.perf_counter() - started < 1.0


def test_a_right_answer_after_100_kb_of_garbage_is_found():
    garbage = "9" * 100_000
    assert verdict("word_addition", f"{garbage} so 132", "132").right
    assert verdict("carry_addition", f"{garbage};=132", "132").right


# --- worked solutions


def columns_of(solution):
    """The columns as numbers (x, y, carry in, total, carry out), and the final answer."""
    *lines, last = solution.split(";")
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found) and last.startswith("=")
    return [tuple(map(int, m.groups())) for m in found], int(last[1:])


def solutions(dropped_carry, count=1500, low=3, high=3, seed=0):
    task = task_of(low=low, high=high, dropped_carry=dropped_carry)
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield task, task[i], task.solution(task[i], rng)


def test_the_solution_of_a_known_problem():
    task = task_of()
    written = {
        (a, b): task.solution(task.problem(a, b), np.random.default_rng(0))
        for a, b in ((47, 85), (0, 0), (999, 1), (5, 123))
    }
    assert written == {
        (47, 85): "7+5+0=12,1;4+8+1=13,1;=132",
        (0, 0): "0+0+0=0,0;=0",
        (999, 1): "9+1+0=10,1;9+0+1=10,1;9+0+1=10,1;=1000",
        (5, 123): "5+3+0=8,0;0+2+0=2,0;0+1+0=1,0;=128",
    }


def test_a_forgotten_carry_is_written_and_then_followed():
    task = task_of(dropped_carry=1.0)
    written = task.solution(task.problem(47, 85), np.random.default_rng(0))
    assert written == "7+5+0=12,0;4+8+0=12,1;=122"


@pytest.mark.parametrize("digits", [(1, 1), (1, 4), (3, 3)])
def test_solutions_without_forgotten_carries_are_right(digits):
    for task, problem, solution in solutions(0.0, 400, *digits):
        assert verdict(task.name, solution, problem.answer).right
        assert columns_of(solution)[1] == sum(operands(problem))
        assert set(problem.question + solution) <= set(task.alphabet)


def test_every_column_adds_what_it_says_and_the_answer_is_what_the_columns_give():
    for _, problem, solution in solutions(0.6, 600, 1, 4):
        a, b = operands(problem)
        columns, result = columns_of(solution)
        assert len(columns) == max(len(str(a)), len(str(b)))
        carry = value = 0
        for i, (x, y, carry_in, total, carry_out) in enumerate(columns):
            assert (x, y) == (a // 10**i % 10, b // 10**i % 10)
            assert carry_in == carry and total == x + y + carry_in
            assert carry_out in (0, total // 10)
            value, carry = value + total % 10 * 10**i, carry_out
        assert result == value + carry * 10 ** len(columns)


def test_six_of_ten_carries_are_forgotten_and_never_the_last():
    chances = forgotten = 0
    for task, problem, solution in solutions(0.6):
        columns, _ = columns_of(solution)
        kept = [carry_out for *_, total, carry_out in columns[:-1] if total >= 10]
        chances += len(kept)
        forgotten += kept.count(0)
        assert columns[-1][4] == columns[-1][3] // 10
        # One forgotten carry decides the answer.
        assert verdict(task.name, solution, problem.answer).right == (0 not in kept)
    assert chances > 1000
    assert abs(forgotten / chances - 0.6) < 3 * math.sqrt(0.6 * 0.4 / chances)
