"""Plans of runs that do not wait for their last rollouts."""

import dataclasses
import itertools

import numpy as np
import pytest
from support import TINY, placement
from test_plan_estimate import asked

from fr3e_jax.config import Config, RolloutConfig
from fr3e_jax.engine.laid_out import lay_out
from fr3e_jax.planning import stages
from fr3e_jax.planning.answers import AnswerLengths
from fr3e_jax.planning.compiled import CompiledProgram
from fr3e_jax.planning.estimate import estimate_step
from fr3e_jax.planning.make import key_of, quick_plan
from fr3e_jax.planning.rollout_programs import compile_rollouts, prefilled_share
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.show import conclusion
from fr3e_jax.planning.stages import StageCompiler, state_bytes
from fr3e_jax.planning.steady import first_decodings, unfinished_of
from fr3e_jax.planning.workload import Assumptions, rooms_for, workload_of
from fr3e_jax.run.queries import continued_shape, query_room

PARTS, QUERIES = 2, 8
CONFIG = Config(rollout=RolloutConfig(queries=QUERIES, wait_for=0.9, max_prompt=64, max_response=256))
ANSWERS = AnswerLengths(mean=90, limit=256, query=16)


def with_rollout(config, **changes):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))


def with_explore(config, **changes):
    return dataclasses.replace(config, explore=dataclasses.replace(config.explore, **changes))


def steps_of(config=CONFIG, steps=6, kept=1.5, shapes=None, answers=ANSWERS):
    shapes = shapes or [continued_shape(config, QUERIES // PARTS)]
    rooms = rooms_for(config.rollout.max_response)
    return first_decodings(
        config, PARTS, QUERIES, shapes, answers, kept, np.random.default_rng(0), rooms, steps
    )


# --- a run step by step


def test_what_a_step_leaves_is_drawn_later():
    """No token is lost or drawn twice, and each step begins as much as it draws in the long run."""
    steps = steps_of(steps=12)
    for (before, decode), (after, _) in itertools.pairwise(steps):
        begins = after.base[-QUERIES:].sum() + after.partial[-QUERIES:].sum()
        assert after.left.sum() == before.left.sum() - decode.tokens + begins
        assert decode.left.sum() <= after.left.sum() - begins
    assert all(decode.left.any() for _, decode in steps[1:])
    most = max(len(in_work.judged) for in_work, _ in steps)
    assert QUERIES < most < 6 * QUERIES  # they do not pile up


def test_a_step_decodes_in_the_rows_that_the_engine_has():
    """Trajectories with branches are the first of each part; base trajectories see the query alone."""
    shapes = [continued_shape(CONFIG, size) for size in (1, QUERIES // PARTS, QUERIES)]
    counts = [shape.rows for shape in shapes]
    for in_work, decode in steps_of(shapes=shapes):
        _, n, c = decode.lengths.shape
        assert n in counts and c == query_room(CONFIG).branches == 80
        there = (decode.lengths > 0).any(axis=2)
        assert decode.trajectories == there.sum(axis=1).max() <= n
        assert (np.diff(there.astype(int), axis=1) <= 0).all()
        placed = lay_out(
            unfinished_of(in_work, query_room(CONFIG), ANSWERS.prefix(0, 5)), 4, c, counts, PARTS
        )
        assert ((placed.place >= 0) == (decode.lengths > 0).reshape(placed.place.shape)).all()
        assert decode.lengths.sum() == in_work.left[placed.place[placed.place >= 0]].sum()


def test_as_many_trajectories_are_explored_as_are_assumed():
    (first, _), *_ = steps_of(steps=1, kept=1.25)
    kept = (first.partial.reshape(QUERIES, 2, -1) > 0).any(axis=2).sum(axis=1)
    assert set(kept) == {1, 2} and kept.sum() == 1.25 * QUERIES


def test_without_positions_queries_have_their_answers_alone():
    config = with_explore(CONFIG, positions=0)
    work = workload_of(config, PARTS, Assumptions())
    assert work.first_return is None
    assert work.explore.lengths.shape[2] == config.explore.rollouts
    for in_work, decode in steps_of(config, kept=0.0):
        assert not in_work.partial.any()
        assert decode.tokens > 0


def test_all_answers_may_go_to_the_limit():
    work = workload_of(CONFIG, PARTS, Assumptions(), worst=True)
    assert work.explore.lengths.max() == CONFIG.rollout.max_response
    assert set(np.unique(work.explore.lengths + np.where(work.explore.lengths, 0, 256))) == {256}


def test_the_update_is_planned_as_where_a_step_waits():
    waits, goes_on = (
        workload_of(with_rollout(CONFIG, wait_for=share), PARTS, Assumptions()) for share in (1.0, 0.9)
    )
    for name in ("chunks", "trunks", "real", "trained", "trajectories"):
        assert getattr(waits, name) == getattr(goes_on, name), name


def test_rounds_that_do_not_wait_are_as_many_as_give_the_states_of_steps():
    """Two trajectories of a query with 5 states, of which half are accepted: 8 queries give 40 of 64."""
    for share, queries, rounds in ((1.0, 8, 2), (0.9, 8, 1.6), (1.0, 16, 1), (0.9, 16, 1)):
        config = with_rollout(CONFIG, wait_for=share, queries=queries)
        batch = dataclasses.replace(config.optimizer, batch_states=64)
        work = workload_of(dataclasses.replace(config, optimizer=batch), PARTS, Assumptions())
        assert work.rounds == rounds
        assert work.tokens == round(rounds * sum(decode.tokens for decode in work.decodings))


# --- its programs


def test_trajectories_without_branches_are_not_prefilled():
    (_, first), *_ = steps_of(steps=1)
    assert first.trajectories == QUERIES // PARTS  # base trajectories of a query sit in one
    together = 4096 // (64 + 256)
    assert prefilled_share(first) * first.room.n <= max(together, first.trajectories)
    waits = workload_of(with_rollout(CONFIG, wait_for=1.0), PARTS, Assumptions()).explore
    assert prefilled_share(waits) == 1


@pytest.mark.parametrize("rule", ["entropy", "mutual_information", "gradient"])
@pytest.mark.parametrize("wait_for", [1.0, 0.9])
def test_what_is_compiled_is_what_is_estimated(monkeypatch, rule, wait_for):
    """Program by program, of caches and branches of the same size. Here they are lowered only."""

    def lowered_alone(name, lowered, mesh):
        return CompiledProgram(name), lowered.out_info

    monkeypatch.setattr(stages, "compile_program", lowered_alone)
    config = with_explore(with_rollout(CONFIG, wait_for=wait_for), rule=rule)
    setup = Setup(config, dataclasses.replace(TINY, max_position_embeddings=1024), placement(1, 1, 1).mesh)
    work = setup.work(Assumptions())
    compiler = StageCompiler(setup, state_bytes(setup), lambda *_: None, lambda *_: None)
    compiled = {key_of(stage): stage for stage in compile_rollouts(compiler, work)}
    estimated = {key_of(stage): stage for stage in estimate_step(setup, work)}
    estimated = {key: estimated[key] for key in estimated if key[0] not in ("reshard", "update")}
    assert list(compiled) == list(estimated)
    expected = ("first return", "decode") if wait_for == 1 else ("explore", "open starts")
    assert expected in compiled
    assert ("positions" in {phase for phase, _ in compiled}) == (rule != "entropy")
    for key, stage in estimated.items():
        assert stage.own == pytest.approx(compiled[key].own, rel=0.01), key


# --- what it takes


def test_rollouts_take_less_time_where_a_step_does_not_wait():
    """Of the same answers, with an update that takes as long."""
    asks = asked("qwen2.5_7b_v5e16")
    plain = quick_plan(asks)
    plan = quick_plan(dataclasses.replace(asks, config=with_rollout(asks.config, wait_for=0.97)))
    before, after = ({phase.name: phase.seconds.total for phase in one.phases} for one in (plain, plan))
    assert before["update"] == after["update"]
    assert after["explore"] < 0.85 * (before["first return"] + before["explore"])
    assert plan.work.tokens == pytest.approx(plain.work.tokens, rel=0.1)
    assert plan.fits
    assert {stage.phase for stage in plan.stages} == {"reshard", "explore", "update"}
    (line,) = (line for line in conclusion(plan) if line.startswith("rollout.wait_for"))
    assert f"of {plan.work.explore.room.n} trajectories of a part" in line
    assert not any(line.startswith("rollout.wait_for") for line in conclusion(plain))
