"""The domains with known decisions: their problems, their habits, and the places that decide a verdict."""

import functools
import inspect
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr3e_jax.config import Config, DataConfig, SFTConfig, SourceConfig
from fr3e_jax.config.files import read_files
from fr3e_jax.examples import carries, decisions, maze, program
from fr3e_jax.pretrained.text import Text
from fr3e_jax.pretrained.tokenizer import new_tokenizer
from fr3e_jax.problems.worked import worked_problems

DOMAINS = {carries: "digits", maze: "rooms", program: "lines"}
every_domain = pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.__name__.rpartition(".")[2])
every_number = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def _few_problems(monkeypatch):
    monkeypatch.setattr(decisions, "TRAINING", 300)
    monkeypatch.setattr(decisions, "HELD_OUT", 100)


def problems(domain, size, split="train", **more):
    return domain.problems(split, **{DOMAINS[domain]: size}, **more)


def verdict(domain, row, text):
    row_too = {"row": row} if "row" in inspect.signature(domain.score).parameters else {}
    return domain.score(text, row["answer"], **row_too)


# --- problems


@every_domain
@pytest.mark.parametrize("size", [1, 3, 10])
def test_splits_are_functions_of_the_seed_and_have_no_question_in_common(domain, size):
    train = problems(domain, size)
    held_out = problems(domain, size, "held_out")
    assert train == problems(domain, size) and held_out == problems(domain, size, "held_out")
    questions = [row["question"] for row in (*train, *held_out)]
    assert len(set(questions)) == len(questions) and train and held_out
    other = problems(domain, size, "held_out", seed=1)
    assert not {row["question"] for row in train} & {row["question"] for row in other}
    if size == 10:
        assert (len(train), len(held_out)) == (300, 100) and other != held_out


def test_a_domain_with_few_questions_ends_with_fewer_problems():
    """One column that carries has 45 pairs of digits."""
    rows = [*problems(carries, 1), *problems(carries, 1, "held_out")]
    assert len(rows) == 45


def test_sums_are_sums():
    """Against integers, read from the question."""
    for row in problems(carries, 6):
        asked = row["question"].rstrip(":")
        a, b = (int(asked[k::4][::-1]) for k in (0, 2))
        assert str(a + b) == row["answer"] and len(row["answer"]) == 7


def test_ways_lead_through_the_doors_that_are_open():
    first = 0
    for row in problems(maze, 6):
        rooms = row["question"].rstrip(":").split(",")
        assert len(rooms) == len(row["answer"]) == 6
        for (a, behind_a, b, behind_b), door in zip(rooms, row["answer"], strict=True):
            assert a != b and {behind_a, behind_b} == {"+", "-"}
            assert door == (a if behind_a == "+" else b)
            first += door == a
    assert 350 < first < 550  # of 1,800; a quarter is 450, with standard deviation 18


def test_last_values_are_what_python_calculates():
    for row in problems(program, 6):
        values = {}
        exec(row["question"].rstrip(":").replace(":=", "="), {}, values)
        assert str(values["x"] % 10) == row["answer"]


# --- habits


@pytest.mark.parametrize(
    ("domain", "row", "good", "bad"),
    [
        (
            carries,
            {"columns": [(7, 5), (4, 8)], "answer": "132"},
            "=12,+13,",
            "=12,=12,",
        ),
        (
            maze,
            {"answer": "ns", "first_doors": "ws"},
            "w?-n,s?+s,",
            "w!-n,s!+s,",
        ),
        (
            program,
            {"program": [":4", "-2", ":1", "+2", "-4"], "answer": "9"},
            ":4=4;-2=2;:1=1;+2=3;-4=9;",
            ":4=4;+2=6;:1=1;+2=3;+4=7;",
        ),
    ],
    ids=["carries", "maze", "program"],
)
def test_the_example_of_each_file_is_what_it_writes(domain, row, good, bad):
    assert good in inspect.getdoc(domain)
    assert domain.written(row, ()).text == good and domain.written(row, [True] * 2).text == bad
    assert verdict(domain, row, good) == 1 and verdict(domain, row, bad) == 0
    for wrong in ("", good[:-1], good + good[-1], "0" + good):
        assert verdict(domain, row, wrong) == 0


@every_domain
def test_solutions_follow_the_habit_as_often_as_the_problem_says(domain):
    for habit in (0.0, 0.3, 1.0):
        followed, choices = 0, 0
        for number, row in enumerate(problems(domain, 6, habit=habit)):
            text = domain.solution(row, random.Random(number))
            k = 0
            taken: list[bool] = []
            while k < len(domain.written(row, taken).choices):
                offset = domain.written(row, taken).choices[k].offset
                taken.append(text[offset] != domain.written(row, taken).text[offset])
                k += 1
            followed, choices = followed + sum(taken), choices + k
        # Within 4 standard errors.
        assert abs(followed / choices - habit) <= 4 * (habit * (1 - habit) / choices) ** 0.5


def test_a_start_of_the_longest_sums_is_right_in_less_than_one_percent():
    """Each of nine columns carries with probability 0.9, and 45% of the carries are kept: 0.505^9 = 0.2%."""
    rows = problems(carries, 10)
    right = sum(
        verdict(carries, row, carries.solution(row, random.Random(100 * number + again)))
        for number, row in enumerate(rows)
        for again in range(10)
    )
    assert 1 <= right <= 18  # of 3,000; 6.4 expected, standard deviation 2.5


# --- decisions


@functools.cache
def problems_of_six(domain):
    """Drawn once for all examples."""
    return problems(domain, 6)


@every_domain
def test_decisions_are_where_a_single_habit_changes_the_verdict(domain):
    """Found without `choices`: by the first character in which the right and the wrong answer differ."""
    deciding, others = 0, 0
    for row in problems(domain, 6)[:100]:
        good = domain.written(row, ()).text
        assert verdict(domain, row, good) == 1
        wrong = set()
        for k in range(len(domain.written(row, ()).choices)):
            text = domain.written(row, [False] * k + [True]).text
            assert text != good
            if verdict(domain, row, text) == 0:
                wrong.add(next(i for i, (a, b) in enumerate(zip(good, text, strict=False)) if a != b))
                deciding += 1
            else:
                others += 1
        assert domain.decisions(row, good) == sorted(wrong)
    assert deciding > 200 and (others > 20 or domain is carries)


@every_domain
@given(number=every_number, picked=st.integers(0, 99), habits=st.lists(st.booleans(), max_size=6))
def test_at_a_decision_of_any_answer_the_two_ways_part(domain, number, picked, habits):
    """They agree up to there, whatever was chosen before."""
    row = problems_of_six(domain)[picked]
    worked = domain.written(row, habits)
    found = domain.decisions(row, worked.text)
    assert found == [choice.offset for choice in worked.choices if choice.decides]
    offsets = [choice.offset for choice in worked.choices]
    for offset in found:
        k = offsets.index(offset)
        taken = [*habits, *[False] * 6]
        other = domain.written(row, [*taken[:k], not taken[k], *taken[k + 1 :]]).text
        assert other[:offset] == worked.text[:offset] and other[offset] != worked.text[offset]
    # Behind a mistake that is no habit nothing is known.
    cut = number % len(worked.text)
    mistaken = f"{worked.text[:cut]}#{worked.text[cut + 1 :]}"
    assert domain.decisions(row, mistaken) == [offset for offset in found if offset <= cut]
    assert domain.decisions(row, worked.text[:cut]) == [offset for offset in found if offset < cut]


# --- configurations


@every_domain
@pytest.mark.parametrize("size", [3, 6, 10])
def test_a_start_is_taught_the_problems_of_the_run_from_it_and_all_fits(domain, size):
    name = domain.__name__.rpartition(".")[2]
    taught = read_files([f"configs/domains/{name}_{size}_sft.yaml"], SFTConfig).options
    options = read_files([f"configs/domains/{name}_{size}.yaml"], Config).options
    assert options["model"]["path"] == taught["out"] == f"runs/{name}_{size}_sft"
    assert options["data"] == taught["data"]
    (source,) = taught["data"]["source"]
    assert source["name"] == f"examples/{name}.py" and source["parameters"][DOMAINS[domain]] == size
    worked = worked_problems(DataConfig([SourceConfig(**source)]), 0, 0.5)
    text = Text(new_tokenizer(worked.alphabet("plain")), (1,), "plain")
    longest = {"question": 0, "solution": 0}
    for split in ("train", "held_out"):
        for row in domain.problems(split, **source["parameters"]):
            ways = domain.written(row, ()).text, domain.written(row, [True] * size).text
            assert text.lost([row["question"], *ways]) == {}
            assert len(text.encoded(ways[0])) == len(ways[0])
            longest["question"] = max(longest["question"], len(row["question"]))
            longest["solution"] = max(longest["solution"], *map(len, ways))
    assert longest["question"] == options["rollout"]["max_prompt"]
    assert longest["solution"] + 1 == options["rollout"]["max_response"]
    assert sum(longest.values()) < taught["max_position_embeddings"]
