"""The page's examples of what can be added run as they are written; what one gets wrong is told in a line."""

import dataclasses
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from environment import REPOSITORY
from support import SMALL, call, metrics, placement

from fr3e_jax.algorithm import advantage, aggregates, keep, modulation, objectives, positions, reject
from fr3e_jax.algorithm.choose import choose_positions
from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.keep import keep_trajectories
from fr3e_jax.algorithm.positions import positions_of
from fr3e_jax.algorithm.rules import Rule, RuleError
from fr3e_jax.algorithm.trajectories import Trajectories
from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, CreditConfig, ExploreConfig, check, dump, resolve
from fr3e_jax.problems.corpus import make_task
from fr3e_jax.problems.own_task import OwnTask
from fr3e_jax.rewards import rules as scorers
from fr3e_jax.rewards.pool import Asked, ScoringPool
from fr3e_jax.step import metrics as step_metrics
from fr3e_jax.step.metrics import Measured, Metric, measure
from fr3e_jax.step.stages import assign_credit, choose_states, draws_of
from fr3e_jax.types import Rollouts

PAGE = (REPOSITORY / "fr3e_jax" / "README.md").read_text().partition("## How to extend")[2]
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.M)]
*ADDED, START, TASK = BLOCKS
TABLES = [
    *(positions.POSITION_RULES, keep.KEEP_RULES, objectives.OBJECTIVES, step_metrics.METRICS, scorers.INLINE),
    *(advantage.ADVANTAGES, modulation.MODULATIONS, reject.REJECT_RULES, aggregates.AGGREGATES),
]
KEYS = jax.random.split(jax.random.key(0), 1)
A_ROUND = object.__new__(Measured)  # of which no metric here looks at anything


@pytest.fixture(autouse=True)
def tables():
    """Put back what a test adds."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def added():
    """The names that the page's blocks define; they are in the tables."""
    names = {}
    for block in ADDED:
        exec(block, names)
    return names


def test_the_page_shows_each_in_ten_lines():
    assert len(ADDED) == 5 and "main()" in START and "def problems" in TASK
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line]) <= 10, block


def test_every_table_on_the_page_is_there_and_none_is_missing():
    named = dict(re.findall(r"^\| .* \| `(\w+)` \(`([\w/.]+)`\) \|", PAGE, re.M))
    assert len(named) == len(TABLES)
    for name, file in named.items():
        assert f"\n{name}: dict[str, " in (REPOSITORY / "fr3e_jax" / file).read_text()


@pytest.mark.slow
def test_a_run_takes_what_the_page_adds_by_its_names(added, tmp_path):
    out = tmp_path / "run"
    chosen = ["--explore.rule=late_entropy", "--credit.advantage=from_root", "--loss.objective=reinforce"]
    done = call("train", *SMALL, "--steps=1", "--evaluate.every=0", *chosen, f"--run_dir={out}")
    assert done.returncode == 0, done.stderr
    line = metrics(out)[1]
    assert 0 < line["reward/spread"] <= 0.5 and np.isfinite(line["update/loss"])
    assert "update/clip_low" not in line  # of the loss that is not taken
    held = yaml.safe_load((out / "config.yaml").read_text())
    assert held["explore"]["rule"] == "late_entropy" and held["loss"]["objective"] == "reinforce"


def test_help_shows_an_added_rule_with_its_line(added, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    shown = call("train", "--help").stdout
    assert "`late_entropy`, uncertain tokens, the later the better; or a function" in shown
    assert call("train", "--explore.rule=late_entropie").stderr == (
        "fr3e_jax.train: error: explore.rule is 'late_entropie'; did you mean late_entropy? choose one of "
        f"{', '.join(positions.POSITION_RULES)}, or a function of your own, module:function\n"
    )


def test_the_added_position_rule_chooses_by_its_score(added):
    entropy = jnp.array([[9.0, 0.5, 0.4, 0.1, 0.2]])  # times the position: 0, .5, .8, .3, .8
    base = Trajectories(entropy, entropy, jnp.array([5]), KEYS, count=2, min_gap=0)
    np.testing.assert_array_equal(positions_of("late_entropy", base)[0], [[2, 4]])
    np.testing.assert_array_equal(positions_of("entropy", base)[0], [[1, 2]])


def test_the_added_advantage_is_the_reward_less_the_value_of_the_root(added):
    reward = jnp.array([[[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]])
    valid = jnp.ones((1, 2), bool)
    found = modulated_advantage(reward, valid, modulation="none", advantage="from_root")[0]
    np.testing.assert_array_equal(found, [[[0.75, -0.25, -0.25, -0.25], [0.75, 0.75, -0.25, 0.75]]])


def test_the_added_loss_has_the_gradient_of_reinforce(added):
    advantage, mask = jnp.array([2.0, -1.0, 5.0]), jnp.array([True, True, False])
    zeros = jnp.zeros(3)

    def value(logprob):
        return added["reinforce"](logprob, zeros, advantage, mask, 2.0, clip_low=0.2)[0]

    np.testing.assert_allclose(jax.grad(value)(zeros), [-1.0, 0.5, 0.0])


def source_with(folder, scorer):
    """A source of a file that names a scorer, as a run reads it."""
    file = folder / "mine.yaml"
    file.write_text(f"data:\n  source:\n    - name: {folder}/rows.jsonl\n      scorer: {scorer}\n")
    return parse(Config, "train", "configs/quickstart.yaml", ["--config", str(file)])[0].data.source[0]


def test_the_added_scorer_judges_a_source_that_names_it(added, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "blue"}\n')
    source = source_with(tmp_path, "contains")
    problem = make_task(source, Config().data, 0, 0)[0]
    pool = ScoringPool([problem.scorer], workers=1)
    asked = [Asked(problem.scorer, text, problem.answer, None) for text in ("It is blue.", "It is red.")]
    assert [verdict.right for verdict in pool.begin(asked).result()] == [True, False]
    pool.close()


def test_a_scorer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'contains'; choose one of exact, numeric, choice, math, or"):
        make_task(source_with(tmp_path, "contains"), Config().data, 0, 0)
    with pytest.raises(ConfigError, match="'gym'; choose one of"):  # it judges what is made for it alone
        make_task(source_with(tmp_path, "gym"), Config().data, 0, 0)


def test_the_task_on_the_page_makes_problems_that_its_score_judges(tmp_path):
    (tmp_path / "doubles.py").write_text(TASK)
    task = OwnTask(str(tmp_path / "doubles.py"), {"count": 20})
    assert (task[3].question, task[3].answer) == ("6+6=", "12") and len(task) == 20
    assert {p.question for p in task.held_out(20)}.isdisjoint(task[i].question for i in range(20))
    pool = ScoringPool([task[3].scorer], workers=1)
    asked = [Asked(task[3].scorer, text, "12", task[3].facts) for text in ("6+6=12 ", "6+6=13")]
    assert [verdict.right for verdict in pool.begin(asked).result()] == [True, False]
    pool.close()


# --- functions in place of names, and names that get another function


def first_positions(base):
    return -jnp.broadcast_to(jnp.arange(base.entropy.shape[1], dtype=jnp.float32), base.entropy.shape)


def last_positions(base):
    return -first_positions(base)


def prefixes(rule):
    """Tokens that the states keep of one trajectory of six tokens."""
    one, same = np.zeros(1, np.int32), np.ones((1, 1, 6), np.float32)
    length = np.full((1, 1), 6, np.int32)
    base = Rollouts(np.zeros((1, 1, 6), np.int32), same, same, same, length, length > 0)
    at, rules = placement(), ExploreConfig(positions=2, rule=rule)
    states = choose_states(rules, at, draws_of(0, 1, at), base, length, one, one, one, np.ones(1, bool))
    return states.prefix_length[0].tolist()


def test_a_function_may_stand_where_a_rule_is_named():
    assert prefixes(first_positions) == [0, 1, 2]
    assert prefixes(last_positions) == [0, 4, 5]


def test_a_name_that_gets_another_function_is_compiled_anew():
    """The settings are equal; what was compiled for the old function is not what they say now."""
    for rule, expected in ((first_positions, [0, 1, 2]), (last_positions, [0, 4, 5])):
        positions.POSITION_RULES["mine"] = Rule(rule, "mine")
        assert prefixes("mine") == expected
    reward, valid, query = np.array([[[1.0, 0.0]]]), np.ones((1, 1), bool), np.zeros(1, np.int32)
    for scale in (2.0, 3.0):
        advantage.ADVANTAGES["mine"] = Rule(lambda reward, valid, scale=scale: scale * reward, "mine")
        found = assign_credit(CreditConfig(advantage="mine"), reward.astype(np.float32), valid, query)
        np.testing.assert_array_equal(found.advantage, [[[scale, 0.0]]])


def test_the_config_of_a_run_names_its_functions():
    def with_rule(rule):
        return yaml.safe_load(dump(dataclasses.replace(Config(), explore=ExploreConfig(rule=rule))))[
            "explore"
        ]

    assert with_rule(first_positions)["rule"].endswith("test_extending.first_positions")
    assert with_rule(positions.by_surprisal)["rule"] == "surprisal"
    assert with_rule("uniform")["rule"] == "uniform"


def test_an_advantage_of_ones_own_has_its_own_baseline():
    advantage.ADVANTAGES["mine"] = Rule(lambda reward, valid: reward, "mine")
    credit = CreditConfig(advantage="mine", baseline="leave_one_out")
    with pytest.raises(ConfigError, match=r"leave_one_out is for credit\.advantage group, not mine"):
        check(dataclasses.replace(Config(), credit=credit), 1, 32_768)


def test_a_library_call_refuses_a_name_that_is_not_there():
    config = dataclasses.replace(Config(), credit=CreditConfig(reject="some"))
    with pytest.raises(ConfigError, match=r"credit\.reject is 'some'; choose one of state, query, none"):
        check(resolve(config), 1, 32_768)
    with pytest.raises(RuleError, match="there is no rule 'entropie'; choose one of entropy, surprisal"):
        prefixes("entropie")


def test_a_score_of_minus_infinity_is_never_a_position():
    score = np.array([[0.0, -np.inf, 3.0, -np.inf, 1.0]], np.float32)
    position, valid = choose_positions(score, np.array([5]), 4)
    assert position[valid].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: positions_of(
                lambda b: b.length,
                Trajectories(*np.ones((2, 1, 6), np.float32), np.array([6]), KEYS, count=2, min_gap=0),
            ),
            r"scores \[N, S\] must have shape \[1, 6\]; the rule's function gave \[1\]",
        ),
        (
            lambda: keep_trajectories(jnp.ones((1, 3)), lambda reward, correct, key: True, KEYS),
            r"kept trajectories \[B, R\] must have shape \[1, 3\]; the rule's function gave bool",
        ),
        (
            lambda: modulated_advantage(
                jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool), advantage=lambda r, v: jnp.ones((1, 2, 3, 7))
            ),
            r"one for each rollout, must have shape \[1, 2, 3\]; the rule's function gave \[1, 2, 3, 7\]",
        ),
    ],
)
def test_a_rule_that_gives_another_shape_is_told_both(call, message):
    with pytest.raises(RuleError, match=message):
        call()


@pytest.mark.parametrize("given", ["many", np.zeros(2), [1]])
def test_a_metric_that_is_no_number_is_refused_by_its_name(given):
    step_metrics.METRICS.clear()
    step_metrics.METRICS["reward/mine"] = Metric(lambda m: given, "mine")
    with pytest.raises(RuleError, match=r"the metric reward/mine gave .* must be a number, or None"):
        measure(A_ROUND)


def test_a_metric_that_a_round_has_not_is_left_out_and_counts_are_whole():
    step_metrics.METRICS.clear()
    step_metrics.METRICS["a"] = Metric(lambda m: None, "none")
    step_metrics.METRICS["b"] = Metric(lambda m: np.int64(3), "a count", counted=True)
    told = measure(A_ROUND)
    assert told == {"b": 3} and type(told["b"]) is int
    assert step_metrics.summarize_step([told, told], [])["b"] == 6
