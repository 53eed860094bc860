"""Steps whose rounds do not fill the batch, and a weight of the entropy that goes from step to step."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, call
from written_world import B, M, P, S, one_step, round_at, written_run

from fr3e_jax.algorithm.entropy_target import adapted_coefficient
from fr3e_jax.config import CreditConfig, LossConfig, OptimizerConfig
from fr3e_jax.learner import groups
from fr3e_jax.run.jsonl import to_line
from fr3e_jax.run.lock_file import LOCK_FILE
from fr3e_jax.run.reporter import step_line
from fr3e_jax.run.rollout_files import read_rollouts
from fr3e_jax.run.saved import DamagedError, Progress, Record, parse_progress, parse_record
from fr3e_jax.step.batch import SamplingError
from fr3e_jax.step.update import minibatches_of


def none_accepted(reward, valid, query):
    return valid & False


def few_rounds(batch, minibatches=2, max_rounds=2, **credit):
    optimizer = OptimizerConfig(
        batch_states=batch, minibatches=minibatches, micro_tokens=64, max_skipped=3, epochs=2
    )
    return written_run(credit=CreditConfig(max_rounds=max_rounds, **credit), optimizer=optimizer)


def begun():
    return groups.empty_groups(M, P, S), Progress()


def test_a_step_that_its_rounds_do_not_fill_ends_the_run_and_names_the_way_on():
    with pytest.raises(SamplingError, match=r"2 rounds gave \d+ of 40 .*credit.short_batch use"):
        one_step(*few_rounds(40), [], *begun())


def test_a_short_batch_is_used_up_in_minibatches_no_larger_than_usual():
    """Two rounds of the written world have so many states; a minibatch of a whole batch has 8."""
    there = [tuple(source) for position in (0, B) for source in round_at(position).source.tolist()]
    run, seen = few_rounds(40, 5, short_batch="use"), []
    _, carried, progress, metrics, _ = one_step(*run, seen, *begun())
    assert 8 < len(there) < 40 and metrics["states/missing"] == 40 - len(there)
    cuts = -(-len(there) // 8)
    assert len(seen) == 2 * cuts  # epochs
    for epoch in (seen[:cuts], seen[cuts:]):
        assert max(map(len, epoch)) <= 8 * M
        assert sorted({row[:3] for rows in epoch for row in rows}) == sorted(there)
        assert sum(map(len, epoch)) == len(there) * M
    assert groups.count(carried) == 0 and progress.empty_steps == 0
    assert f"batch short by {40 - len(there)} states" in step_line(metrics)
    # With a batch that is full the option changes nothing.
    full, other = [], []
    *_, usual, _ = one_step(*few_rounds(4, short_batch="use"), full, *begun())
    one_step(*few_rounds(4), other, *begun())
    assert full == other and "states/missing" not in usual


def test_steps_without_a_state_change_nothing_and_so_many_in_a_row_end_the_run():
    run, seen = few_rounds(4, max_rounds=1, short_batch="use", reject=none_accepted), []
    carried, progress = begun()
    for step in (1, 2):
        _, carried, progress, metrics, _ = one_step(*run, seen, carried, progress)
        assert (progress.step, progress.empty_steps, progress.skipped) == (step, step, 0)
        assert metrics["states/missing"] == 4 and "update/loss" not in metrics
        assert "no state to train on, no update" in step_line(metrics)
        json.loads(to_line(metrics), parse_constant=pytest.fail)  # NaN is no JSON
    with pytest.raises(SamplingError, match=r"step 3: .*the 2 before it none either.*optimizer.max_skipped"):
        one_step(*run, seen, carried, progress)
    assert seen == []
    _, _, progress, *_ = one_step(*few_rounds(2, max_rounds=1), seen, carried, progress)
    assert progress.empty_steps == 0 and seen


@pytest.mark.parametrize(("states", "count"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (40, 5)])
def test_minibatches_are_as_many_as_the_states_need(states, count):
    config, _ = few_rounds(40, 5)
    assert minibatches_of(states, config) == count


@given(st.integers(1, 30), st.integers(1, 8))
def test_uneven_minibatches_take_every_state_once(states, parts):
    empty = groups.empty_groups(1, 1, 1)
    some = jax.tree.map(lambda x: np.zeros((states, *x.shape[1:]), x.dtype), empty)
    some.query_length[:] = np.arange(states)
    cut = groups.minibatches(some, parts, np.random.default_rng(0))
    assert sorted(np.concatenate([part.query_length for part in cut]).tolist()) == list(range(states))
    sizes = [groups.count(part) for part in cut]
    assert len(sizes) == parts and max(sizes) - min(sizes) <= 1
    if states % parts == 0:  # as it was cut when a batch had to divide
        order = np.random.default_rng(0).permutation(states).reshape(parts, -1)
        assert [part.query_length.tolist() for part in cut] == order.tolist()


# --- the weight of the entropy


@pytest.mark.parametrize(
    ("weight", "entropy", "following"),
    [
        (0.0, 0.1, 1e-3),
        (2e-3, 0.1, 3e-3),
        (2e-3, 0.3, 1e-3),
        (5e-4, 0.3, 0.0),  # down to 0
        (4.5e-3, 0.1, 5e-3),  # up to the limit
        (5e-3, 0.1, 5e-3),
        (2e-3, 0.2, 2e-3),
    ],
)
def test_the_weight_grows_below_the_target_and_shrinks_above_it(weight, entropy, following):
    assert adapted_coefficient(weight, entropy, 0.2, 1e-3, 5e-3) == pytest.approx(following, abs=1e-12)


@given(st.lists(st.floats(0, 3), max_size=30), st.floats(0, 5e-3))
def test_the_weight_stays_within_its_bounds(entropies, weight):
    for entropy in entropies:
        before, weight = weight, adapted_coefficient(weight, entropy, 0.5, 7e-4, 5e-3)
        assert 0 <= weight <= 5e-3 and abs(weight - before) <= 7e-4 + 1e-12


def test_the_weight_goes_from_step_to_step_and_stays_where_there_is_no_update():
    loss = LossConfig(entropy_coefficient=1e-3, entropy_target=0.5, entropy_step=1e-3)
    optimizer = OptimizerConfig(batch_states=4, minibatches=2, micro_tokens=64)
    run = written_run(loss=loss, optimizer=optimizer)
    carried, progress = begun()
    told, used = [], []
    for entropy in (0.1, 0.2, 0.9):
        measured = {"entropy": np.float32(entropy), "entropy_coefficient": used}
        _, carried, progress, metrics, _ = one_step(*run, [], carried, progress, measured)
        told.append(metrics["update/entropy_coefficient"])
    assert told == pytest.approx([1e-3, 2e-3, 3e-3]) and progress.entropy_coefficient == pytest.approx(2e-3)
    assert used == [weight for weight in told for _ in range(2)]  # one weight for all updates of a step
    empty = written_run(
        loss=loss,
        optimizer=optimizer,
        credit=CreditConfig(max_rounds=1, short_batch="use", reject=none_accepted),
    )
    _, _, after, *_ = one_step(*empty, [], groups.empty_groups(M, P, S), progress)
    assert after.entropy_coefficient == progress.entropy_coefficient
    *_, metrics, _ = one_step(*few_rounds(4), [], *begun())
    assert "update/entropy_coefficient" not in metrics


def test_the_weight_is_in_the_record_of_a_checkpoint_to_the_last_bit_and_may_be_missing():
    progress = Progress(step=7, entropy_coefficient=0.1 + 0.2, empty_steps=1)
    written = json.loads(json.dumps(Record(progress, "text", {}).as_json()))
    assert parse_record(written, 7).progress == progress
    earlier = {"step": 1, "data_position": 2, "tokens_generated": 3, "seconds": 0.5, "seed": 4, "skipped": 0}
    assert parse_progress(earlier).entropy_coefficient is None
    for bad in ("0.1", -1.0, True):
        with pytest.raises(DamagedError, match="entropy_coefficient"):
            parse_progress({**earlier, "entropy_coefficient": bad})
    with pytest.raises(DamagedError, match="the seconds"):
        parse_progress({**earlier, "seconds": None})


@pytest.mark.slow
def test_a_task_that_is_too_easy_ends_with_what_to_change(tmp_path):
    """Queries of one digit have no carries to forget: no state ever carries a gradient."""
    flags = ["--data.min_digits=1", "--data.max_digits=1", "--data.held_out=8", "--credit.max_rounds=2"]
    ended = call("train", *SMALL, *flags, "--optimizer.batch_states=64", "--run_dir", tmp_path / "run")
    assert ended.returncode == 1
    assert "2 rounds gave" in ended.stderr and "max_rounds" in ended.stderr
    assert "No step is saved in" in ended.stderr
    kept = read_rollouts(tmp_path / "run", 1).to_pylist()  # to see what was wrong
    assert {row["round"] for row in kept} == {0, 1} and {row["rejected"] for row in kept} >= {"all wrong"}
    assert not (tmp_path / "run" / LOCK_FILE).exists()
