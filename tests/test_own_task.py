"""A user's own task: the documented example runs, and mistakes in such a file are one line."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from fr3e_jax.config import ConfigError
from fr3e_jax.problems.own_task import OwnTask, is_own
from fr3e_jax.rewards.own import import_task
from fr3e_jax.rewards.pool import Asked, ScoringPool
from fr3e_jax.rewards.verdict import ScorerError

EXAMPLE = Path(__file__).parent / "own_task_example.py"
PROBLEMS = """
def problems(split, count=3):
    return [{"question": f"{split} {i}", "answer": str(i)} for i in range(count)]
"""
SCORE = """
def score(response, answer):
    return response == answer
"""


@pytest.fixture
def write(tmp_path):
    """Writes a task, and gives its path."""

    def written(text):
        import_task.cache_clear()  # a process reads a file once
        path = tmp_path / "task.py"
        path.write_text(text)
        return str(path)

    return written


def judged(task, responses):
    """Whether responses to the first training problem are right, as workers say."""
    problem = task[0]
    pool = ScoringPool([problem.scorer], workers=1, time_limit=20)
    try:
        asked = [Asked(problem.scorer, r, problem.answer, problem.facts) for r in responses]
        return pool.begin(asked).result()
    finally:
        pool.close()


def test_the_documented_example_runs():
    task = OwnTask(str(EXAMPLE), {})
    assert len(task) == 1000
    for problem in (task[0], task[999], task.held_out(1)[0]):
        number = problem.question.split()[4]
        assert problem.answer == "".join(sorted(number)) and len(number) == 6
    held = task.held_out(200)
    assert len({p.question for p in held}) == 200
    assert task.held_out(10) == held[:10]
    assert len(task.held_out(5000)) == 1000
    answer = task[0].answer
    verdicts = judged(task, [f"It is {answer}", answer[::-1], "", "none"])
    assert [v.right for v in verdicts] == [True, answer == answer[::-1], False, False]


def test_parameters_reach_the_task():
    task = OwnTask(str(EXAMPLE), {"digits": 3, "count": 50})
    assert len(task) == 50
    assert all(len(task[i].answer) == 3 for i in range(50))


def test_workers_find_the_file_from_any_directory(tmp_path, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    task = OwnTask("mine.py", {})
    monkeypatch.chdir("/")
    assert task[0].source == "mine.py"
    assert [v.right for v in judged(task, [task[0].answer, "no"])] == [True, False]


def test_the_file_is_read_once_however_many_answers_it_judges(write, tmp_path):
    note = f"with open({str(tmp_path / 'read')!r}, 'a') as file:\n    file.write('x')\n"
    task = OwnTask(write(note + PROBLEMS + SCORE), {})
    assert [v.right for v in judged(task, [str(i) for i in range(40)])] == [True] + [False] * 39
    assert (tmp_path / "read").read_text() == "xx"  # here, and in the worker


def test_a_task_can_be_an_installed_module(tmp_path, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path / "sorting_task.py")
    info = tmp_path / "sorting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sorting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fr3e_jax.tasks]\nsort_digits = sorting_task\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert is_own("sort_digits")
    task = OwnTask("sort_digits", {"digits": 4})
    assert task[0].scorer == "own:sort_digits" and len(task[0].answer) == 4
    assert [v.right for v in judged(task, [task[0].answer, "x"])] == [True, False]
    sys.modules.pop("sorting_task")


def test_only_python_files_and_entry_points_are_own_tasks():
    assert is_own("some/where.py")
    assert not any(map(is_own, ("carry_addition", "questions.jsonl", "Org/Name", "gym:chain_sum", "py")))


ROWS = "def problems(split):\n    return {}\n" + SCORE


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        (SCORE, {}, r"has no function problems\(split, \*\*parameters\)"),
        (PROBLEMS, {}, r"has no function score\(response, answer\)"),
        (PROBLEMS + SCORE, {"colour": 1}, r"problems\(split, count=3\) cannot be called .*colour"),
        (PROBLEMS + "def score(response): return True", {}, r"score\(response\) cannot be called"),
        (PROBLEMS + SCORE, {"count": "x"}, r"problems\('train'\) failed: TypeError: .* \(line 3\)$"),
        (PROBLEMS + SCORE, {"count": 0}, r"problems\('train'\) returned no problems"),
        ("import nothing_of_this_name", {}, r"cannot be loaded: ModuleNotFoundError: .* \(line 1\)$"),
        ("def problems(:", {}, r"cannot be loaded: SyntaxError: .*task.py, line 1\)$"),
        (ROWS.format("iter([1])"), {}, "returned a list_iterator; return a list"),
        (
            ROWS.format('[{"question": "q"}]'),
            {},
            "problem 0 of train needs 'answer', a str; it is {'question'",
        ),
        (ROWS.format('[{"answer": "a"}]'), {}, "problem 0 of train needs 'question'"),
        (ROWS.format('[{"question": "q", "answer": 4}]'), {}, "problem 0 of train needs 'answer'"),
        (ROWS.format('["q"]'), {}, "problem 0 of train needs 'question', a str; it is 'q'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(write, text, parameters, message):
    with pytest.raises(ConfigError, match=message) as caught:
        OwnTask(write(text), parameters)
    assert "task.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match=r"nowhere.py cannot be loaded: .*there is no file .*nowhere.py$"):
        OwnTask("nowhere.py", {})


def test_a_problem_that_is_wrong_further_on_is_named_when_it_is_read(write):
    rows = '[{"question": "q", "answer": "a"}, {"question": "r", "answer": None}]'
    task = OwnTask(write(ROWS.format(rows)), {})
    assert task[0].question == "q"
    with pytest.raises(ConfigError, match=r"task.py: problem 1 of train needs 'answer'.*None"):
        task[1]
    for index in (2, -1):
        with pytest.raises(IndexError):
            task[index]


def test_a_held_out_problem_that_is_trained_on_is_refused(write):
    text = 'def problems(split):\n    rows = [{"question": str(i), "answer": ""} for i in range(9)]\n'
    text += '    return rows if split == "train" else rows[7:]\n' + SCORE
    with pytest.raises(ConfigError, match="problem 0 of held_out is problem 7 of train too"):
        OwnTask(write(text), {}).held_out(1)


def test_held_out_problems_that_come_again_are_left_out(write):
    text = 'def problems(split):\n    return [{"question": split + q, "answer": q} for q in "abab"]\n' + SCORE
    assert [p.answer for p in OwnTask(write(text), {}).held_out(4)] == ["a", "b"]


def test_a_task_without_held_out_problems_says_so(write):
    text = 'def problems(split):\n    return [{"question": "", "answer": ""}] if split == "train" else []\n'
    with pytest.raises(ConfigError, match=r"problems\('held_out'\) returned no problems"):
        OwnTask(write(text + SCORE), {}).held_out(1)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("return 1 / 0", r"score\(\) failed over 'mine': ZeroDivisionError: division by zero \(line 4\)$"),
        ("return None", r"score\(\) returned None over 'mine'; return True, False, a number in \[0, 1\]"),
    ],
)
def test_a_scorer_that_fails_or_gives_no_score_ends_the_run(write, score, message):
    """A wrong verdict in its place would be learned from."""
    task = OwnTask(write(PROBLEMS + f"def score(response, answer): {score}"), {})
    with pytest.raises(ScorerError, match=message) as caught:
        judged(task, ["mine"])
    assert "task.py" in str(caught.value)


def test_a_file_that_is_gone_when_a_worker_reads_it_ends_the_run(write):
    path = write(PROBLEMS + SCORE)
    task = OwnTask(path, {})
    Path(path).unlink()
    with pytest.raises(ScorerError, match=r"task.py cannot be loaded: ImportError: there is no file"):
        judged(task, ["0"])


def test_one_and_zero_are_verdicts_too(write):
    task = OwnTask(write(PROBLEMS + "def score(response, answer): return int(response)"), {})
    assert [v.right for v in judged(task, ["1", "0"])] == [True, False]


def test_an_endless_scorer_is_wrong_when_its_time_is_over(write):
    task = OwnTask(write(PROBLEMS + "def score(response, answer):\n    while True: pass"), {})
    problem = task[0]
    pool = ScoringPool([problem.scorer], workers=1, time_limit=0.5)
    try:
        asked = [Asked(problem.scorer, "x", problem.answer, problem.facts)]
        assert not pool.begin(asked).result()[0].right
        assert pool.timed_out == 1
    finally:
        pool.close()
