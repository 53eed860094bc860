"""Problems of reasoning-gym: the same at every call, none both trained on and held out, and judged safely."""

import itertools
import os
import pickle
import subprocess
import sys

import pytest
from gym_problems import ROUNDED, near, problems_of, right

from fr3e_jax.config import ConfigError

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym; pip install 'fr3e_jax[gym]'")

from reasoning_gym.factory import DATASETS, create_dataset

from fr3e_jax.problems.gym import LENGTH, GymTask, is_held_out
from fr3e_jax.rewards.gym import score
from fr3e_jax.rewards.gym_facts import REFUSED, RUNS_TEXT, GymFacts

ACCEPTED = sorted(DATASETS.keys() - REFUSED.keys())
NESTED = "[" * 20000
SAMPLE = ACCEPTED[::7]  # the others are tried where the slow tests run
FAMILIES = [pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow) for n in ACCEPTED]
GARBAGE = ("", "garbage", "9**9**9**9", NESTED, "None", "nan", "{}", "[]", "\N{INFINITY}")


def test_every_data_set_is_accepted_or_refused_with_a_reason():
    assert REFUSED.keys() <= DATASETS.keys()
    assert all(REFUSED.values())
    assert len(ACCEPTED) + len(REFUSED) == len(DATASETS)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_of_a_problem_is_right_and_garbage_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for problem in problems_of(name, 3):
        entry = problem.facts.entry
        assert problem.question == entry["question"] and problem.source == f"gym:{name}"
        assert pickle.loads(pickle.dumps(problem)) == problem
        if entry["answer"] is not None:
            assert right(problem, f"I think so.\n<answer>{entry['answer']}</answer>")
        for text in (*GARBAGE, "__import__('os').system('touch made')", "open('made', 'w')"):
            assert not right(problem, f"<answer>{text}</answer>"), text
        for text in near(entry["answer"]) if name not in ROUNDED else ():
            assert not right(problem, f"<answer>{text}</answer>"), (entry["answer"], text)
        answered = f"<answer>{entry['answer']}</answer>"
        assert not right(problem, f"{answered} or rather <answer>")
        assert not right(problem, f"{answered[8:-9]} or rather \\boxed{{")
    assert not list(tmp_path.iterdir())


def solved(board):
    """Keys and values of a coloring, by trying all of them."""
    vertices, edges = board["vertices"], board["edges"]
    for colors in itertools.product(board["color_options"], repeat=len(vertices)):
        chosen = dict(zip(vertices, colors, strict=True))
        if all(chosen[a] != chosen[b] for a, b in edges):
            return chosen
    return None


def test_a_problem_that_has_no_answer_of_its_own_is_judged_by_what_it_asks():
    task = GymTask("graph_color", {"min_num_vertices": 5, "max_num_vertices": 5, "num_colors": 3}, 0)
    problem = next(
        p for p in map(task.__getitem__, range(50)) if p.facts.entry["metadata"]["puzzle"]["edges"]
    )
    puzzle = problem.facts.entry["metadata"]["puzzle"]
    coloring = solved(puzzle)
    assert problem.answer == ""
    text = str({str(v): c for v, c in coloring.items()}).replace("'", '"')
    assert right(problem, text)
    a, b = puzzle["edges"][0]
    wrong = {str(v): c for v, c in (coloring | {a: coloring[b]}).items()}
    assert not right(problem, str(wrong).replace("'", '"'))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("complex_arithmetic", lambda entry: "nan"),
        ("coin_flip", lambda entry: "0"),
        ("game_of_life_halting", lambda entry: "False" if entry["answer"] else None),
        (
            "number_sorting",
            lambda entry: str([float("nan")] * len(entry["answer"].split(","))).replace("n", "N"),
        ),
        ("propositional_logic", lambda entry: entry["metadata"]["premises"][0]),
    ],
)
def test_what_is_refused_for_wrong_verdicts_gives_them(name, wrong):
    """A release without the fault fails here, and the data set can be used."""
    data = create_dataset(name, size=20, seed=1)
    texts = [(wrong(entry), entry) for entry in data]
    assert any(text and data.score_answer(answer=text, entry=entry) == 1.0 for text, entry in texts)


@pytest.mark.parametrize("name", [n for n, why in REFUSED.items() if why == RUNS_TEXT])
def test_what_is_refused_for_running_text_runs_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = create_dataset(name, size=1, seed=1)
    data.score_answer(answer="__import__('pathlib').Path('made').touch()", entry=data[0])
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_data_set_is_neither_trained_on_nor_judged(name):
    with pytest.raises(ConfigError, match=f"gym:{name} is not used: "):
        GymTask(name, {}, 0)
    with pytest.raises(ValueError, match="cannot be judged"):
        score("<answer>1</answer>", "1", GymFacts(name, "{}", {"answer": "1"}))


DRAW = """
import sys, zlib
from fr3e_jax.problems.gym import GymTask
for name in sys.argv[1:]:
    task = GymTask(name, {}, 5)
    print(name, zlib.crc32("".join(task[i * 31].question for i in range(12)).encode()))
"""


@pytest.mark.parametrize(
    "families", [SAMPLE, pytest.param(ACCEPTED, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_problems_are_the_same_in_every_process(families):
    """Words are hashed differently in each: a generator that goes by the order of a set is found here."""
    long = {"arc_agi", "futoshiki", "puzzle24", "sokoban", "zebra_puzzles"}
    names = [n for n in families if n not in long]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRAW, *names],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate()[0].splitlines() for process in started)
    assert len(first) == len(names)
    assert first == second


@pytest.mark.parametrize("name", ["chain_sum", "acre", "gcd", "bf", "knights_knaves"])
def test_a_problem_does_not_depend_on_what_was_read_before(name):
    task = GymTask(name, {}, 7)
    forwards = [task[i].question for i in range(60)]
    again = GymTask(name, {}, 7)
    assert [again[i].question for i in reversed(range(60))] == forwards[::-1]
    assert len(set(forwards)) > 45
    assert [GymTask(name, {}, 8)[i].question for i in range(5)] != forwards[:5]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("leg_counting", {}), ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})],
)
def test_no_held_out_question_is_a_training_question(name, parameters):
    """Also where there are few: one-digit sums come again and again."""
    task = GymTask(name, parameters, 0)
    trained = {task[i].question for i in range(3000)}
    held = [p.question for p in task.held_out(200)]
    assert len(set(held)) == len(held) > 5
    assert not trained & set(held)
    # Nor with another seed.
    assert not {GymTask(name, parameters, 1)[i].question for i in range(1000)} & set(held)


def test_training_and_held_out_questions_are_told_apart_by_their_hash_alone():
    task = GymTask("letter_counting", {}, 0)
    assert not any(is_held_out(task[i].question) for i in range(300))
    assert all(is_held_out(p.question) for p in task.held_out(50))
    assert task.held_out(50)[:10] == task.held_out(10)


def test_questions_that_differ_in_a_few_digits_fall_on_both_sides():
    questions = {f"A machine has {a} parts and {b} wires." for a in range(10) for b in range(100)}
    assert 80 < sum(map(is_held_out, questions)) < 170  # an eighth of 1000, within 4 standard deviations
    assert GymTask("string_splitting", {}, 5).held_out(256)


def test_the_last_problem_is_there_and_none_behind_it():
    task = GymTask("pool_matrix", {}, 2**32 - 1)
    assert len(task) == LENGTH
    assert task[LENGTH - 1].question != task[LENGTH - 2].question
    for index in (LENGTH, -1):
        with pytest.raises(IndexError):
            task[index]


def test_a_data_set_of_one_question_is_refused():
    """Whichever side that question falls on, the other has none."""
    task = GymTask("chain_sum", {}, 0)
    kept = next(c for c in "abcdefghijklmnopqrstuvwxyz" if is_held_out(c))
    trained = next(c for c in "abcdefghijklmnopqrstuvwxyz" if not is_held_out(c))
    for question, message in ((trained, "hold some out"), (kept, "train on")):
        task.whole = [{"question": question, "answer": "1"}] * (2 * LENGTH)
        with pytest.raises(ConfigError, match=f"too few different questions to {message}"):
            task.held_out(4) if message == "hold some out" else task[0]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("chain_sums", {}, "no data set 'chain_sums'; near it: chain_sum"),
        ("chain_sum", {"terms": 3}, "has no parameter terms; it takes min_terms, max_terms"),
        ("chain_sum", {"size": 3}, "has no parameter size"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "does not work with parameters .*it takes min_terms"),
        ("chain_sum", {"min_terms": "many"}, "does not work with parameters .*it takes min_terms"),
    ],
)
def test_a_wrong_name_or_parameter_is_one_line(name, parameters, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GymTask(name, parameters, 0)
    assert "\n" not in str(caught.value)


def test_without_reasoning_gym_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"pip install 'fr3e_jax\[gym\]'"):
        GymTask("chain_sum", {}, 0)
