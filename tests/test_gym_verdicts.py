"""How answers to problems of reasoning-gym are judged."""

import pickle

import pytest
from gym_problems import problems_of, right

from fr3e_jax.rewards.countdown import makes
from fr3e_jax.rewards.pool import Asked, ScoringPool

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym; pip install 'fr3e_jax[gym]'")

from reasoning_gym.factory import create_dataset

from fr3e_jax.problems.gym import GymTask
from fr3e_jax.rewards.gym import score


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>1</answer> or <answer>2</answer>", "2"),
        ("\\boxed{3} then <answer>2</answer> then \\boxed{4}", "2"),
        ("It is \\boxed{3}.\nDone.", "3"),
        ("First 5\n 6 \n\n", "6"),
    ],
)
def test_the_tag_is_judged_before_the_box_and_the_box_before_the_last_line(response, expected):
    facts = GymTask("chain_sum", {}, 0)[0].facts
    entry = facts.entry | {"answer": expected}
    verdict = score(response, expected, facts._replace(entry=entry))
    assert (verdict.score, verdict.extracted) == (1.0, expected)


def test_only_full_marks_are_a_success():
    """Half a solution, or a right answer in a long text, earns a part elsewhere."""
    problem = GymTask("chain_sum", {}, 0)[0]
    entry = problem.facts.entry
    partly = create_dataset("chain_sum", size=1).score_answer(answer=f"about {entry['answer']}", entry=entry)
    assert 0 < partly < 1
    assert not right(problem, f"<answer>about {entry['answer']}</answer>")


def test_a_verifier_changes_nothing_for_the_answers_that_follow():
    problem = GymTask("rush_hour", {}, 0)[0]
    before = pickle.dumps(problem.facts.entry)
    right(problem, "<answer>A+1 B-1</answer>")
    assert pickle.dumps(problem.facts.entry) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(8 - 4) * (7 - 1)", True),
        ("-(4 - 8) * (7 - 1)", True),
        ("8*(4-1)*7/7", False),  # a seven that is not there
        ("8*4-7-1", True),
        ("8*4-7", False),  # one is left
        ("24", False),
        ("(8-4)*(7-1)*1", False),
        ("8*4-7-1 == 24", False),
        ("8*4-7-1.0", False),
        ("8*4-7-True", False),
        ("(8*4-7-1, 0)[0]", False),
        ("8*4-7-int('1')", False),
        ("8**1*4-7-1", False),
        ("8//1*4-7-1", False),
        ("8*4-7-1j", False),
        ("8/(4-7-1+4)", False),
        ("(lambda: 24)()", False),
        ("", False),
        ("8*4-7-1\n", True),
        ("8\n*4-7-1", False),
        ("9**9**9**9", False),
        ("(" * 150 + "8*4-7-1" + ")" * 150, True),
        ("(" * 199 + "8*4-7-1" + ")" * 199, False),  # too long
        ("-" * 30 + "(8*4-7-1)", True),
        ("-" * 100 + "(8*4-7-1)", False),  # too deep
        ("-" * 100000 + "8", False),
        ("(" * 100000, False),
        ("8*4-7-1\0", False),
    ],
)
def test_an_expression_counts_where_it_uses_each_number_once_and_makes_the_target(text, expected):
    """Of 1, 4, 7 and 8, by hand: 8 * 4 - 7 - 1 = 24, and (8 - 4) * (7 - 1) = 24."""
    assert makes(text, [4, 7, 8, 1], 24) == expected


def test_fractions_between_are_exact():
    assert makes("8 / (3 - 8/3)", [3, 3, 8, 8], 24)
    assert not makes("1/3 + 1/3 + 1/3", [1, 1, 1, 3, 3, 4], 1)
    assert makes("49 * (1/49)", [1, 49, 49], 1)
    # Which its own verifier would round down.
    assert not makes("(10 * 10 - 1) / 4", [10, 10, 1, 4], 24)


def test_an_operation_that_the_puzzle_does_not_have_is_wrong():
    problem = next(
        p
        for p in map(GymTask("puzzle24", {"operators": ["+", "*"]}, 0).__getitem__, range(50))
        if 1 in p.facts.entry["metadata"]["numbers"]
    )
    assert right(problem, problem.answer)
    once = f"({problem.answer}) / 1"
    numbers = [*problem.facts.entry["metadata"]["numbers"], 1]
    assert makes(once, numbers, 24)
    assert not makes(once, numbers, 24, ["+", "*"])


def test_workers_judge_a_mixture_of_data_sets():
    names = ("chain_sum", "countdown", "mini_sudoku", "prime_factorization", "boxnet")
    problems = [p for name in names for p in problems_of(name, 2)]
    pool = ScoringPool(["gym"], workers=1, time_limit=20)
    try:
        asked = [
            Asked(p.scorer, response, p.answer, p.facts)
            for p in problems
            for response in (f"<answer>{p.answer}</answer>", "<answer>9**9**9**9</answer>")
        ]
        verdicts = [v.right for v in pool.begin(asked).result()]
    finally:
        pool.close()
    assert verdicts == [right for p in problems for right in (p.answer != "", False)]
    assert pool.timed_out == 0
