"""rollout.queries `auto`: a round asks as many queries as will fill the batch, of few sizes."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, TINY, call, changed, mesh_of, metrics
from written_world import QUERIES, M, P, S, one_step, round_at, take, written_run

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, OptimizerConfig, check, dump, without_effect
from fr3e_jax.learner import groups
from fr3e_jax.planning.make import Question, setup_on
from fr3e_jax.planning.slices import find_slice
from fr3e_jax.planning.workload import Assumptions, planned_queries
from fr3e_jax.run.queries import (
    QUERY_MARGIN,
    AcceptedCount,
    accepted_before,
    assumed_states,
    queries_for,
    queries_to_begin,
    round_sizes,
)
from fr3e_jax.run.rollout_files import read_rollouts
from fr3e_jax.run.saved import Progress, Record, parse_record

AUTO = changed(Config(), rollout__queries="auto")


# --- the option


def parsed(*argv):
    return parse(Config, "train", "configs/quickstart.yaml", list(argv), lambda _: None)[0]


def test_a_number_or_auto_is_taken_from_flags_files_and_python(tmp_path):
    assert Config().rollout.queries == 32
    assert parsed("--rollout.queries=auto").rollout.queries == "auto"
    assert parsed("--rollout.queries=8").rollout.queries == 8
    file = tmp_path / "auto.yaml"
    file.write_text("rollout: {queries: auto, max_queries: 16}\n")
    config = parsed("--config", str(file))
    assert (config.rollout.queries, config.rollout.max_queries) == ("auto", 16)
    file.write_text(dump(config))
    assert parsed("--config", str(file)) == config
    check(AUTO, 8, 10**6)


@pytest.mark.parametrize("value", ["many", "1.5", "null"])
def test_another_word_is_refused_in_one_line_that_names_auto(value, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parsed(f"--rollout.queries={value}")
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "rollout.queries is " in message and "must be a whole number or auto" in message


def test_rounds_have_a_query_for_each_part_of_the_mesh():
    config = changed(AUTO, rollout__max_queries=15)
    check(config, 8, 10**6)
    with pytest.raises(ConfigError, match=r"rollout\.max_queries is 15, less than .* data x fsdp = 16"):
        check(config, 16, 10**6)


def test_the_bound_has_no_effect_beside_a_number():
    (line,) = without_effect(changed(Config(), rollout__max_queries=16))
    assert line.startswith("rollout.max_queries has no effect: rollout.queries is a number")
    assert without_effect(changed(AUTO, rollout__max_queries=16)) == []


# --- the number of a round


@given(st.integers(1, 2**16), st.integers(1, 64))
def test_sizes_are_few_divide_by_the_parts_and_stay_below_the_bound(most, parts):
    sizes = round_sizes(changed(AUTO, rollout__max_queries=most).rollout, parts)
    assert 1 <= len(sizes) <= 7 and list(sizes) == sorted(set(sizes))
    assert all(size % parts == 0 and size > 0 for size in sizes)
    if most >= parts:
        assert most - parts < sizes[-1] <= most
        assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))


def test_sizes_by_hand():
    assert round_sizes(AUTO.rollout, 1) == (8, 12, 16, 24, 32, 48, 64)
    assert round_sizes(AUTO.rollout, 16) == (16, 32, 48, 64)
    assert round_sizes(changed(AUTO, rollout__max_queries=60).rollout, 8) == (8, 16, 24, 32, 48, 56)
    assert round_sizes(Config().rollout, 8) == (32,)


@given(
    st.floats(0.1, 1e4),
    st.floats(0, 50),
    st.sampled_from([round_sizes(AUTO.rollout, parts) for parts in (1, 4, 16)]),
    st.one_of(st.none(), st.integers(0, 100)),
)
def test_a_round_is_the_smallest_that_fills_the_batch(states, per_query, sizes, left):
    queries = queries_for(states, per_query, sizes, left)
    possible = [size for size in sizes if left is None or size <= left] or [sizes[0]]
    assert queries in possible
    assert queries == possible[-1] or queries * per_query >= QUERY_MARGIN * states
    assert all(size * per_query < QUERY_MARGIN * states for size in possible if size < queries)


def test_older_steps_count_less():
    """By hand: (10 + 0.8 (4 + 0.8 * 8)) / (20 + 0.8 (10 + 0.8 * 16)) after rounds of 16, 10 and 20."""
    count = AcceptedCount(16, 8)
    count = count.fade().add_round(10, 4)
    count = count.fade().add_round(20, 10)
    assert count.per_query == pytest.approx((10 + 0.8 * 10.4) / (20 + 0.8 * 22.8))


def test_before_the_first_round_half_of_the_states_of_two_trajectories_are_assumed():
    assert assumed_states(Config()) == 2 * 5 * 0.5
    assert assumed_states(changed(Config(), explore__positions=0)) == 0.5
    assert assumed_states(changed(Config(), explore__keep="all", rollout__base_trajectories=1)) == 2.5
    assert accepted_before(Config(), Progress()).per_query == 5
    known = Progress(recent_queries=10.0, recent_states=3.0)
    assert accepted_before(Config(), known) == AcceptedCount(10.0, 3.0)


# --- a step


def accepted_of(queries):
    """Accepted states of queries of the written world, from rounds that were made without `auto`."""
    found = [source[0] for position in range(0, QUERIES, 3) for source in round_at(position).source.tolist()]
    return sum(found.count(query) for query in queries)


def auto_run(batch, most=9):
    """A run on three parts, whose rounds have 3, 6 or 9 queries, and a list of what it asks."""
    config, parts = written_run(optimizer=OptimizerConfig(batch_states=batch, minibatches=1, micro_tokens=64))
    config, asked = changed(config, rollout__queries="auto", rollout__max_queries=most), []

    def noted(position, count, rates=None):
        asked.append((position, count))
        return take(position, count, rates)

    stream = type(parts.stream)(take=noted, difficulty=None)
    return config, dataclasses.replace(parts, stream=stream), asked


def test_a_step_asks_what_fills_its_batch_and_then_only_what_is_missing():
    """Assumed are 3 states of a query; the written world accepts more or fewer."""
    there = accepted_of(range(6))
    config, parts, asked = auto_run(batch=there + 1, most=6)
    assert math.ceil(QUERY_MARGIN * (there + 1) / 3) > 3  # by the assumption a round of 3 would not do
    _, carried, progress, told, _ = one_step(config, parts, [], groups.empty_groups(M, P, S), Progress())
    assert asked == [(0, 6), (6, 3)]  # one state is missing, for which the smallest round does
    assert progress.data_position == 9
    assert groups.count(carried) == accepted_of(range(9)) - (there + 1)
    assert told["rounds"] == 2 and told["queries/asked"] == 9 and told["queries/first_round"] == 6
    # 8 queries with 3 states each were assumed, and have faded.
    assert progress.recent_queries == pytest.approx(0.8 * 8 + 9)
    assert progress.recent_states == pytest.approx(0.8 * 24 + accepted_of(range(9)))
    assert told["queries/states_per_query"] == progress.recent_states / progress.recent_queries


def test_states_that_are_carried_need_no_queries():
    config, parts, asked = auto_run(batch=4)
    state = [], groups.empty_groups(M, P, S), Progress()
    _, carried, progress, told, _ = one_step(config, parts, *state)
    assert asked == [(0, 3)] and groups.count(carried) == accepted_of(range(3)) - 4 >= 4
    _, _, after, told, _ = one_step(config, parts, [], carried, progress)
    assert asked == [(0, 3)] and told["queries/asked"] == 0 and "queries/first_round" not in told
    assert (after.recent_queries, after.recent_states) == (progress.recent_queries, progress.recent_states)


def test_a_number_asks_as_ever_and_tells_no_other_metrics():
    config, parts = written_run()
    *_, told, _ = one_step(config, parts, [], groups.empty_groups(M, P, S), Progress())
    assert not [name for name in told if name.startswith("queries/")]


def test_a_step_after_a_kill_asks_what_it_would_have_asked():
    """From the record of a checkpoint, of which every number is read back to the last bit."""
    config, parts, asked = auto_run(batch=18, most=6)
    _, carried, progress, *_ = one_step(config, parts, [], groups.empty_groups(M, P, S), Progress())
    written = json.loads(json.dumps(Record(progress, "text", {}).as_json()))
    read = parse_record(written, 1).progress
    assert read == progress and read.recent_states > 0
    ends = []
    for begun in (progress, read):
        del asked[:]
        _, left, after, told, _ = one_step(config, parts, [], carried, begun)
        kept = {name: x for name, x in told.items() if not name.startswith(("time/", "memory/"))}
        ends.append((list(asked), groups.count(left), after, kept))
    assert ends[0] == ends[1] and ends[0][0] == [(6, 3)]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """With rounds of 8 to 32 queries; over all steps each question of the stream is asked once."""
    auto = [*SMALL, "--rollout.queries=auto", "--rollout.max_queries=32", "--optimizer.batch_states=40"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for directory, steps in ((whole, 4), (halves, 2), (halves, 4)):
        done = call("train", *auto, f"--steps={steps}", "--run_dir", directory)
        assert done.returncode == 0, done.stderr
    assert "settings changed since the checkpoint: steps: 2 -> 4" in done.stdout
    told = metrics(whole)
    assert told == metrics(halves)
    rows = read_rollouts(whole).to_pylist()
    rounds = {(row["step"], row["round"], row["query"]) for row in rows}
    queries = sorted(query for *_, query in rounds)
    assert queries == list(range(len(queries)))
    assert len(queries) == sum(line["queries/asked"] for line in told[1:])
    sizes = {key: sum((step, n) == key for step, n, _ in rounds) for key in {r[:2] for r in rounds}}
    assert set(sizes.values()) <= {8, 16, 24, 32} and len(set(sizes.values())) > 1


# --- the plan


def test_a_plan_has_the_rounds_that_a_run_would_ask():
    """16 queries give 64 states if half of those of two trajectories are accepted."""
    config = changed(AUTO, optimizer__batch_states=64)
    assert planned_queries(config, 4, Assumptions()) == 16  # 1.2 x 64 / 5, rounded up
    assert planned_queries(config, 4, Assumptions(accepted=0.1)) == 64
    assert planned_queries(Config(), 4, Assumptions()) == 32
    short = changed(config, rollout__max_prompt=8, rollout__max_response=16, mesh__update_tensor=1)
    question = Question("x", short, TINY, "v5e-4", Assumptions())
    setup = setup_on(question, mesh_of(1, 4, 1), find_slice(question.topology))
    assert setup.queries == setup.config.rollout.queries == 16


@pytest.mark.parametrize(("per_query", "delays"), [(5.0, (0.0, 0.3, 0.4, 0.3)), (1.3, (0.5, 0.5))])
def test_rounds_that_do_not_wait_begin_what_steps_use(per_query, delays):
    """However many rounds a query takes: a decoding a step, and queries that do not pile up."""
    config = changed(Config(), rollout__queries="auto", rollout__wait_for=0.9)
    batch, sizes = config.optimizer.batch_states, round_sizes(config.rollout, 4)
    under_way, waiting, decodings, most = [], 0.0, [], 0.0
    for _ in range(60):
        decodings.append(0)
        while waiting < batch:
            unfinished = sum(n * sum(delays[age:]) for n, age in under_way)
            begun = queries_to_begin(config, batch - waiting, round(unfinished), per_query, sizes)
            under_way = [(n, age) for n, age in [*under_way, (begun, 0)] if age < len(delays)]
            waiting += per_query * sum(n * delays[age] for n, age in under_way)
            under_way = [(n, age + 1) for n, age in under_way]
            decodings[-1], most = decodings[-1] + 1, max(most, unfinished)
        waiting -= batch
    assert 0.85 < np.mean(decodings[5:]) < 1.1 and max(decodings[5:]) <= 2
    assert most < 5 * batch / per_query


def test_no_query_is_begun_while_many_are_unfinished_or_all_are_to_be_completed():
    config = changed(Config(), rollout__queries="auto", rollout__wait_for=0.9)
    sizes = (8, 16)
    assert queries_to_begin(config, 64, 0, 0.0, sizes) == 16  # none was accepted yet
    assert queries_to_begin(config, 64, 0, 0.0, sizes, left=15) == 8  # no question is asked twice at a time
    assert queries_to_begin(config, 64, 0, 4.0, sizes, left=7) == 8
    assert queries_to_begin(config, 64, 8 * 16 + 1, 0.0, sizes) == 0
    assert queries_to_begin(changed(config, rollout__wait_for=1.0), 64, 5, 1.0, sizes) == 0
    assert queries_to_begin(changed(config, rollout__queries=8), 64, 5, 1.0, (8,)) == 8
