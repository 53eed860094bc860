"""What a user's own scorer may return: numbers, named parts, and the scores of a whole group."""

import json
import re
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import REPOSITORY
from support import mesh_of
from test_habits import rollouts_of

from fr3e_jax.algorithm.keep import keep_trajectories
from fr3e_jax.config import ConfigError, DataConfig, RewardConfig, SourceConfig, check_options
from fr3e_jax.evaluation.answers import Ask, Respondent
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.corpus import make_corpus
from fr3e_jax.problems.own_task import OwnTask
from fr3e_jax.problems.sources import read
from fr3e_jax.rewards.own import import_task
from fr3e_jax.rewards.pool import Asked, ScoringPool, judge_piece
from fr3e_jax.rewards.verdict import ScorerError
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.step.metrics import METRICS, Measured
from fr3e_jax.types import States

PROBLEMS = """
import numpy, math

def problems(split):
    return [{"question": split, "answer": "42", "limit": 10, "tags": ["a", "b"]}]

"""
PAGES = REPOSITORY / "fr3e_jax" / "problems" / "README.md", REPOSITORY / "fr3e_jax" / "rewards" / "README.md"


@pytest.fixture(scope="module")
def text():
    return load_text(find_model("quickstart"), "plain")


@pytest.fixture
def task(tmp_path):
    """Makes a task of a `score`, or of other functions."""

    def made(functions):
        import_task.cache_clear()
        (tmp_path / "task.py").write_text(PROBLEMS + functions)
        return OwnTask(str(tmp_path / "task.py"), {})

    return made


def verdict_of(task, response):
    """The verdict on a response to the first problem, in this process."""
    problem = task[0]
    return judge_piece([Asked(problem.scorer, response, problem.answer, problem.facts)])[0]


@pytest.mark.parametrize(
    ("value", "score", "parts"),
    [
        ("True", 1.0, {}),
        ("0", 0.0, {}),
        ("0.25", 0.25, {}),
        ("numpy.float32(0.5)", 0.5, {}),
        ("numpy.bool_(True)", 1.0, {}),
        # trl's way: the reward is the sum.
        ("{'answer': 0.5, 'form': 0.25}", 0.75, {"answer": 0.5, "form": 0.25}),
        ("{'answer': 1, 'long': -0.5}", 0.5, {"answer": 1.0, "long": -0.5}),
        ("{'a': True, 'b': numpy.float64(0)}", 1.0, {"a": 1.0, "b": 0.0}),
        # verl's way: the score is named, and the rest is told.
        ("{'score': 0.5, 'words': 17}", 0.5, {"score": 0.5, "words": 17.0}),
        # Sums that rounding puts a little outside.
        ("{'a': 0.7, 'b': 0.2, 'c': 0.1 + 1e-9}", 1.0, {"a": 0.7, "b": 0.2, "c": 0.1 + 1e-9}),
        ("-1e-9", 0.0, {}),
    ],
)
def test_a_score_is_a_truth_value_a_number_or_named_parts(task, value, score, parts):
    verdict = verdict_of(task(f"def score(response, answer): return {value}"), "mine")
    assert (verdict.score, dict(verdict.parts)) == (score, parts)
    assert type(verdict.score) is float and verdict.right == (score == 1.0)


def test_a_text_under_reason_is_no_part_of_the_score(task):
    verdict = verdict_of(task("def score(response, answer): return {'a': 0.5, 'reason': 'half'}"), "mine")
    assert (verdict.score, verdict.parts, verdict.reason) == (0.5, (("a", 0.5),), "half")


@pytest.mark.parametrize(
    "value",
    [
        *("None", "math.nan", "math.inf", "1.5", "-0.5", "'0.5'", "[1]", "(1, 0)", "numpy.ones(2)", "{}"),
        *("{'a': None}", "{'a': math.nan}", "{'a': 0.8, 'b': 0.8}", "{'a': -1}", "{1: 1}", "{'a': '1'}"),
        *("{'score': 1.5}", "{'score': None, 'a': 1}", "object()", "{'reason': 'none'}"),
    ],
)
def test_anything_else_is_an_error_that_says_what_to_return(task, value):
    """It would be learned from."""
    with pytest.raises(ScorerError) as caught:
        verdict_of(task(f"def score(response, answer): return {value}"), "mine")
    message = str(caught.value)
    assert re.search(r"task\.py: score\(\) returned .* over 'mine'; return True, False, a number in", message)
    assert "\n" not in message


def test_a_scorer_may_see_the_other_columns_of_the_row(task):
    one = task(
        "def score(response, answer, row): return len(response) <= row['limit'] and 'b' in row['tags']"
    )
    assert one[0].facts == {"question": "train", "answer": "42", "limit": 10, "tags": ["a", "b"]}
    assert [verdict_of(one, response).right for response in ("short", "much too long")] == [True, False]
    assert task("def score(response, answer): return True")[0].facts is None


def test_a_row_that_no_worker_can_be_sent_is_refused_at_the_start(task):
    score = "def score(response, answer, row): return True\n"
    rows = "problems = lambda split: [{'question': 'q', 'answer': 'a', 'check': lambda text: True}]"
    with pytest.raises(ConfigError, match=r"problem 0 of train cannot be sent to a worker process"):
        task(score + rows)
    assert len(task("def score(response, answer): return True\n" + rows)) == 1


def test_a_data_set_may_be_judged_by_a_score_of_ones_own_that_sees_every_column(tmp_path):
    bytes_text = load_text(REPOSITORY / "tests" / "qwen2.5_tokenizer_cut", "plain")
    import_task.cache_clear()
    (tmp_path / "tolerant.py").write_text(
        "def score(response, answer, row):\n"
        "    return abs(float(response) - float(answer)) <= row['tolerance']\n"
    )
    rows = [{"question": f"{n}?", "answer": str(n), "tolerance": n / 10} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(str(tmp_path / "a.jsonl"), scorer=str(tmp_path / "tolerant.py"))
    problems, _ = read(source)
    judged = [judge_piece([Asked(p.scorer, "9.5", p.answer, p.facts)])[0].right for p in problems]
    assert [n for n, right in enumerate(judged) if right] == [9, 10]
    assert make_corpus(DataConfig([source]), 0, bytes_text, 20).scorers == [f"own:{tmp_path / 'tolerant.py'}"]
    missing = DataConfig([SourceConfig(source.name, scorer=str(tmp_path / "nowhere.py"))])
    with pytest.raises(ConfigError, match=r"nowhere\.py cannot be loaded: .*there is no file"):
        make_corpus(missing, 0, bytes_text, 20)
    (tmp_path / "empty.py").write_text("")
    empty = DataConfig([SourceConfig(source.name, scorer=str(tmp_path / "empty.py"))])
    with pytest.raises(ConfigError, match=r"empty\.py has no function score\(response, answer\); write one"):
        make_corpus(empty, 0, bytes_text, 20)


GROUP = """
def score_group(responses, answer, row):
    assert row["limit"] == 10
    return [{"shorter": sum(len(r) < len(other) for other in responses) / len(responses)} for r in responses]
"""


def test_a_group_is_the_base_answers_of_a_query_or_the_rollouts_of_a_state(task, text):
    """Answers that are cut off are wrong, and no part of their group."""
    problem = task(GROUP)[0]
    other = task(GROUP)[0]  # an equal problem is another group
    pool = ScoringPool([problem.scorer], workers=1, time_limit=20)
    verifier = Verifier(text, Hosts(mesh_of(), 1), pool)
    try:
        base = rollouts_of(text, ["1", "333", "333", "22"], [True, True, True, False])
        assert verifier.base(base, [problem])().tolist() == pytest.approx(np.array([[2 / 3, 0, 0, 0]]))
        assert verifier.parts.take() == {"reward/part/shorter": pytest.approx(2 / 9)}
        assert verifier.parts.take() == {}
        # Two states of a trajectory with two rollouts each.
        own = rollouts_of(text, ["4", "55", "6666", "7"], [True] * 4)
        zero = np.zeros(1, np.int32)
        size, valid = np.array([[0, 1]], np.int32), np.array([[True, True]])
        states = States(zero, zero, base.token[:, 0], size, valid)
        assert verifier.whole(states, own, [problem])().tolist() == [[[0.5, 0.0], [0.0, 0.5]]]
        # An evaluation's answers are each a group of its own.
        verdicts = verifier.begin(["a", "bbb"], [problem, other])()
        assert [verdict.score for verdict in verdicts] == [0.0, 0.0]
    finally:
        pool.close()


@pytest.mark.parametrize("returned", ["[1]", "1", "'ab'", "{'a': 1, 'b': 1}", "None", "[1, 2]", "[1, None]"])
def test_a_group_that_is_scored_in_part_ends_the_run(task, returned):
    one = task(f"def score_group(responses, answer): return {returned}")
    match = r"score_group\(\) returned .*; return (a list with one score for each|True, False, a number)"
    with pytest.raises(ScorerError, match=match):
        verdict_of(one, ("a", "b"))


def test_a_group_that_takes_too_long_is_wrong_and_counted(task):
    one = task("def score_group(responses, answer):\n    while responses[0] == 'x': pass\n    return [1, 1]")
    pool = ScoringPool([one[0].scorer], workers=1, time_limit=0.5)
    try:
        asked = [Asked(one[0].scorer, group, "42", None) for group in (("x", "y"), ("y", "x"))]
        late, fine = pool.begin(asked).result()
        assert ([v.score for v in late], [v.score for v in fine]) == ([0.0, 0.0], [1.0, 1.0])
        assert pool.timed_out == 2
    finally:
        pool.close()


KEYS = jax.random.split(jax.random.key(0), 3)
REWARD = np.array([[0.5, 0.8, 0.2, 1.0], [0.79, 0.0, 0.0, 0.0], [1.0, 0.9, 0.8, 0.8]], np.float32)


def test_what_counts_as_solved_is_chosen_for_keep_rules_and_metrics():
    """By hand: the first of at least 0.8, and the first below."""
    kept = keep_trajectories(jnp.asarray(REWARD), "first_of_each", KEYS, 0.8)
    assert kept.tolist() == [[True, True, False, False], [True, False, False, False], [True] + [False] * 3]
    full = keep_trajectories(jnp.asarray(REWARD), "first_of_each", KEYS)
    assert full.tolist() == [
        [True, False, False, True],
        [True, False, False, False],
        [True, True, False, False],
    ]
    measured = SimpleNamespace(reward=REWARD[None], success_at=0.8, valid=np.ones((1, 3), bool))
    measured.counts = np.ones(measured.reward.shape, bool)
    measured.right = Measured.right.fget(measured)
    assert METRICS["states/all_right"].function(measured) == 1
    assert METRICS["states/all_wrong"].function(measured) == 1


def test_a_sum_of_weights_that_rounding_keeps_below_1_is_solved():
    third = np.float32(0.1) + np.float32(0.7) + np.float32(0.2)
    assert keep_trajectories(jnp.array([[third, 0.0]], jnp.float32), "first_of_each", KEYS[:1]).all()


def test_the_accuracy_of_an_evaluation_goes_by_success_at(task, text):
    problem = task("def score(response, answer): return len(response) / 10")[0]
    pool = ScoringPool([problem.scorer], workers=1, time_limit=20)
    rows = rollouts_of(text, ["1" * 8, "1" * 7], [True, True])
    rows = type(rows)(*(np.moveaxis(getattr(rows, name), 0, 1) for name in vars(rows)))
    try:
        for success_at, right in ((0.8, [True, False]), (0.7, [True, True]), (1.0, [False, False])):
            verifier = Verifier(text, Hosts(mesh_of(), 1), pool, RewardConfig(success_at=success_at))
            stream = type("Stream", (), {"text": text})
            answers = Respondent(None, stream, verifier, 2).judge(rows, [Ask(problem, 0), Ask(problem, 1)])()
            assert [answer.right for answer in answers] == right
    finally:
        pool.close()


@pytest.mark.parametrize("success_at", [0.0, -1.0, 1.1, float("nan")])
def test_impossible_marks_are_refused(success_at):
    with pytest.raises(ConfigError, match=r"success_at is .*, must be above 0 and at most 1"):
        check_options(RewardConfig(success_at=success_at))


def test_the_examples_of_the_pages_run(tmp_path):
    """The page of problems has `score` with a row and named parts, that of rewards has `score_group`."""
    blocks = [
        textwrap.dedent(block)
        for page in PAGES
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page.read_text(), re.M)
        if "def score" in block
    ]
    assert len(blocks) == 2
    (tmp_path / "shout.py").write_text(blocks[0])
    one = OwnTask(str(tmp_path / "shout.py"), {"count": 4})
    word = one[0].facts["word"]
    assert verdict_of(one, f"{word.upper()}!").score == 1.0
    assert dict(verdict_of(one, word.upper()).parts) == {"answer": 0.8, "form": 0.0}
    assert verdict_of(one, "?").score == 0.0
    assert one.solution(0, 0) == f"{word.upper()}!"
    (tmp_path / "brief.py").write_text(blocks[0] + blocks[1])
    brief = OwnTask(str(tmp_path / "brief.py"), {"count": 4})
    verdicts = verdict_of(brief, (f"{word.upper()}!", f"well, {word.upper()}!", "?"))
    assert [verdict.score for verdict in verdicts] == [1.0, 0.5, 0.0]
