"""A whole training step, rounds and update, in process on eight devices."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from support import SMALL, changed

from fr3e_jax.algorithm.keep import KEEP_RULES
from fr3e_jax.algorithm.positions import POSITION_RULES
from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ExploreConfig, resolve, rows_of_state, with_functions
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.run.build import build, mesh_of
from fr3e_jax.run.reporter import Stopwatch, step_line
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.rounds import close_round, open_round
from fr3e_jax.step.stages import compiled_states, draws_of
from fr3e_jax.step.update import train_step
from fr3e_jax.types import Rollouts


def small_parts(*options):
    """The configuration and the parts of a small run on eight devices."""
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [*SMALL, *options])
    config = resolve(config)
    return config, build(config, Hosts(mesh_of(config.mesh), timeout=60))


@pytest.mark.parametrize(
    "algorithm", ["fr3e", *(pytest.param(other, marks=pytest.mark.slow) for other in ("grpo++", "grpo"))]
)
def test_a_step_moves_nothing_between_host_and_devices_but_what_it_says(algorithm):
    """On eight devices: an array that lies elsewhere than a program wants it would be moved at every call."""
    config, parts = small_parts(f"--algorithm={algorithm}")
    state = parts.policy.fresh_state(parts.learner)
    before = jax.device_get(state.params)
    sizes = rows_of_state(config), config.rollout.max_prompt, config.rollout.max_response
    with jax.transfer_guard("disallow"):
        carried, shown = groups.empty_groups(*sizes), StepProgress(print)
        state, _, progress, metrics, _ = train_step(config, parts, None, state, carried, Progress(), shown)
    parts.verifier.pool.close()
    assert progress.step == 1 and np.isfinite(metrics["update/loss"])
    changed = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), state.params, before)
    assert all(jax.tree.leaves(changed))
    # The baselines are settings: no positions, and GRPO rejects nothing.
    assert ("entropy/positions" in metrics) == (config.explore.positions > 0) == (algorithm == "fr3e")
    assert (metrics["states/rejected"] > 0) == (algorithm != "grpo")


@pytest.fixture(scope="module")
def small_run():
    """The configuration, the parts and the trained parameters of a small run, which rounds are sampled of."""
    config, parts = small_parts()
    yield config, parts, parts.policy.sampling_params(parts.policy.fresh_state(parts.learner).params)
    parts.verifier.pool.close()


def own_rule(base):
    """Late tokens with a large gradient, of which a run is told by its place, `test_step:own_rule`."""
    return (
        base.measured("gradient") * (base.measured("attention") >= 0) * np.arange(base.entropy.shape[1])[None]
    )


own_rule.needs = ("gradient", "attention")  # type: ignore[attr-defined]


def round_by(small_run, **explore):
    """(Accepted states, metrics, stages that took time) of a round whose exploration is set so."""
    config, parts, params = small_run
    config = changed(config, **{f"explore__{name}": value for name, value in explore.items()})
    watch = Stopwatch()
    with jax.transfer_guard("disallow"):
        opened = open_round(config, parts, params, 1, 0, watch, recorded=True)
        accepted, metrics, _, _ = close_round(config, parts, opened, watch)
    return opened, accepted, metrics, watch.seconds


def slow_but(*names, of):
    """Values of an option, of which those named are tested by default."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.mark.parametrize("rule", slow_but("test_step:own_rule", of=[*POSITION_RULES, "test_step:own_rule"]))
def test_every_rule_of_positions_finds_states_that_carry_a_gradient(small_run, rule):
    opened, accepted, metrics, seconds = round_by(small_run, rule=rule, min_gap=3)
    assert groups.count(accepted) > 0 and metrics["states/accepted"] > 0
    # What the rule saw is recorded of the positions, and of nothing else.
    statistic, positions = opened.for_record.statistic, opened.states.prefix_length[:, 1:]
    assert (np.isfinite(statistic) == opened.states.valid[:, 1:]).all()
    if rule in ("entropy", "surprisal"):
        seen = opened.base.entropy if rule == "entropy" else -opened.base.logprob
        seen = np.take_along_axis(seen[opened.states.query, opened.states.base], positions, axis=1)
        np.testing.assert_array_equal(statistic[opened.states.valid[:, 1:]], seen[opened.states.valid[:, 1:]])
    gaps = np.diff(opened.states.prefix_length[:, 1:], axis=1)[opened.states.valid[:, 2:]]
    assert gaps.size and gaps.min() >= 3
    asks = rule not in ("entropy", "surprisal", "random", "uniform")
    assert ("positions" in seconds) == ("flops/positions" in metrics) == asks
    if rule in ("gradient", "attention", "test_step:own_rule"):
        assert 0 < metrics["flops/positions"] < metrics["flops/first_return"]
    if rule == "sentence":
        assert metrics["flops/positions"] == 0
        # Steps of the quickstart end with a semicolon
        n, j = np.nonzero(opened.states.valid[:, 1:])
        before = opened.states.response[n, opened.states.prefix_length[n, j + 1] - 1]
        assert set(small_run[1].text.decode(before[:, None])) == {";"}


@pytest.mark.parametrize("keep", slow_but(of=KEEP_RULES))
def test_every_rule_of_trajectories_explores_those_that_it_is_named_after(small_run, keep):
    opened, _, metrics, _ = round_by(small_run, keep=keep)
    kept = opened.states.valid[:, 0]
    right = opened.base_reward[opened.states.query, opened.states.base][kept] == 1
    queries = opened.states.query[kept]
    assert metrics["states/accepted"] + metrics["states/rejected"] == opened.states.valid.sum()
    assert kept.any()
    if keep == "wrong":
        assert not right.any() and len(set(queries)) == len(queries)
    if keep == "hardest":
        mean = opened.base_reward.mean(axis=1)
        assert len(set(queries)) <= 4 and (mean[queries] > 0).all()
        left_out = np.setdiff1d(np.flatnonzero(mean > 0), queries)
        assert mean[left_out].min(initial=1) >= mean[queries].max()


def test_a_round_in_which_nothing_is_kept_has_metrics_and_no_states(small_run):
    def nothing(reward, correct, key):
        return correct & ~correct

    opened, accepted, metrics, _ = round_by(small_run, keep=nothing)
    assert groups.count(accepted) == opened.most == metrics["states/rejected"] == 0
    assert "reward/root_mean" not in metrics and np.isfinite(list(metrics.values())).all()
    assert "root reward" not in step_line({"step": 1, "rounds": 1, **metrics})
    assert "no sampling" not in step_line({"step": 1, "rounds": 1, **metrics})


def test_a_round_moves_what_has_an_entry_per_token_at_most_three_times(monkeypatch):
    """The base trajectories and the partial rollouts come to the host, and nothing of theirs goes back."""
    config, parts = small_parts()
    params = parts.policy.sampling_params(parts.policy.fresh_state(parts.learner).params)
    moved = collections.Counter()

    def counting(name, function):
        def count(tree, *rest, **options):
            leaves = [np.shape(x) for x in jax.tree.leaves(tree)]
            moved[name] += any(len(s) > 1 and s[-1] == config.rollout.max_response for s in leaves)
            return function(tree, *rest, **options)

        return count

    monkeypatch.setattr(jax, "device_get", counting("down", jax.device_get))
    monkeypatch.setattr(jax, "device_put", counting("up", jax.device_put))
    opened = open_round(config, parts, params, 1, 0, Stopwatch())
    accepted, *_ = close_round(config, parts, opened, Stopwatch())
    parts.verifier.pool.close()
    assert groups.count(accepted) > 0 and moved == {"down": 2, "up": 0}


@pytest.mark.slow
def test_base_trajectories_are_trained_on_where_their_segments_have_credit():
    """A step with every option of credit changed; and what the others make of one round of it."""
    chosen = {"estimator": "edge", "baseline": "leave_one_out", "state_weight": "trajectory"}
    config, parts = small_parts(*(f"--credit.{name}={value}" for name, value in chosen.items()))
    state, most = parts.policy.fresh_state(parts.learner), config.rollout.max_response
    opened = open_round(config, parts, parts.policy.sampling_params(state.params), 1, 0, Stopwatch())
    found = {}
    for estimator in ("paper", "value", "edge"):
        other = dataclasses.replace(config, credit=dataclasses.replace(config.credit, estimator=estimator))
        found[estimator] = close_round(other, parts, opened, Stopwatch())[1]
    paper, value, edge = found.values()
    assert 0 < edge["segments/token_share"] < 0.5 and edge["segments/advantage"] > 0
    assert edge["states/accepted"] > value["states/accepted"] == paper["states/accepted"]
    assert edge["modulation/mean"] == value["modulation/mean"] == 1 != paper["modulation/mean"]
    carried = groups.empty_groups(rows_of_state(config), config.rollout.max_prompt, most)
    given = config, parts, None, state, carried, Progress(), StepProgress(print)
    _, carried, _, metrics, _ = train_step(*given)
    parts.verifier.pool.close()
    assert carried.length.shape[1] == config.explore.rollouts + 1 and metrics["states/carried"] > 0
    # The log-probabilities of segments are those that the base trajectories were drawn with.
    assert np.isfinite(metrics["update/loss"]) and metrics["update/abs_log_ratio_max"] < 0.05
    assert 0 < metrics["segments/token_share"] < 0.5


def test_tokens_and_choices_are_drawn_with_keys_of_their_own():
    """Of a seed; every step has the same keys, and its number beside them."""
    first, second = (draws_of(3, step, Placement(mesh_of(Config().mesh))) for step in (1, 2))
    assert first.tokens == second.tokens and first.choices == second.choices
    assert first.tokens != first.choices and (first.step, second.step) == (1, 2)


def base_of(entropy, length):
    """Base trajectories [B, R, S] whose tokens are numbered through, of an entropy."""
    token = np.arange(entropy.size, dtype=np.int32).reshape(entropy.shape)
    nothing, stopped = np.zeros(entropy.shape, np.float32), np.ones(length.shape, bool)
    return Rollouts(token, nothing, nothing, entropy, length, stopped)


def states_by(rules, base, length, query, trajectory):
    """`compiled_states` on eight devices, each of which has B / 8 queries; on the host."""
    placement = Placement(mesh_of(Config().mesh))
    draws, place = draws_of(0, 1, placement), placement.place_rows
    where = place((100 + query, query, trajectory, np.ones(len(query), bool)))
    return jax.device_get(compiled_states(rules, placement.mesh, draws, place(base), place(length), *where))


def test_random_positions_are_drawn_for_each_trajectory_of_a_query_by_itself():
    """Of eight trajectories of each of eight queries, equal in all but their number."""
    rules = with_functions(ExploreConfig(positions=4, rule="random"))
    query, trajectory = np.repeat(np.arange(8, dtype=np.int32), 8), np.tile(np.arange(8, dtype=np.int32), 8)
    length = np.full((8, 8), 100, np.int32)
    told = (rules, base_of(np.zeros((8, 8, 100), np.float32), length), length, query, trajectory)
    states = states_by(*told)
    assert states.valid.all() and len(np.unique(states.prefix_length, axis=0)) == 64
    np.testing.assert_array_equal(states_by(*told).prefix_length, states.prefix_length)


def test_states_on_the_devices_are_of_their_own_trajectory_up_to_its_length():
    """Two queries on each device, in an order of the caller's; behind a length entropy does not count."""
    rng = np.random.default_rng(0)
    entropy = rng.random((16, 3, 40)).astype(np.float32)
    length = rng.integers(6, 30, (16, 3)).astype(np.int32)
    # Each of the eight devices has two kept trajectories of its own two queries.
    query = np.stack([2 * np.arange(8) + rng.integers(0, 2, 8) for _ in range(2)], axis=1)
    query = query.reshape(-1).astype(np.int32)
    trajectory = rng.integers(0, 3, 16).astype(np.int32)
    base = base_of(entropy, length)
    states = states_by(with_functions(ExploreConfig(positions=2)), base, length, query, trajectory)
    for n, (q, t) in enumerate(zip(query, trajectory, strict=True)):
        count = length[q, t]
        highest = 1 + np.argsort(-entropy[q, t, 1:count], kind="stable")[:2]
        assert states.prefix_length[n].tolist() == [0, *sorted(highest.tolist())]
        np.testing.assert_array_equal(states.response[n, :count], base.token[q, t, :count])
        assert (states.response[n, count:] == 0).all()
