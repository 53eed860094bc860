"""What a run needs on a slice: the work of a step, the verdict and the command."""

import dataclasses
import json
import math
import subprocess

import numpy as np
import pytest
from environment import REPOSITORY
from support import TINY, call, command, needs_compiler, placement, run

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, RolloutConfig
from fr3e_jax.plan import PLANS, PlanConfig, model_of
from fr3e_jax.planning.answers import lengths_of
from fr3e_jax.planning.as_json import as_json
from fr3e_jax.planning.compiled import CompiledProgram
from fr3e_jax.planning.fit import RESERVE, Plan, memory_parts
from fr3e_jax.planning.make import MARGIN
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.show import conclusion
from fr3e_jax.planning.slices import GIB, find_slice
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.times import Phase, Rates, Seconds
from fr3e_jax.planning.topology import devices_of, mesh_on
from fr3e_jax.planning.workload import Assumptions, Chunk, workload_of

# --- what a step does


def test_answers_have_the_assumed_mean_before_they_are_cut():
    rng = np.random.default_rng(1)
    assert lengths_of(100_000, 500, 10**9, rng).mean() == pytest.approx(500, rel=0.02)
    cut = lengths_of(10_000, 500, 600, rng)
    assert cut.max() == 600
    assert cut.min() >= 1


CONFIG = Config(rollout=RolloutConfig(queries=8))


def test_a_step_is_longer_and_larger_where_answers_are():
    short, long = (workload_of(CONFIG, 4, Assumptions(response=share)) for share in (0.1, 0.6))
    assert long.explore.tokens > 2 * short.explore.tokens
    assert long.real > 2 * short.real
    assert long.explore.room == short.explore.room
    worst = workload_of(CONFIG, 4, Assumptions(), worst=True)
    assert worst.explore.room == long.explore.room
    assert worst.explore.tokens == worst.explore.lengths.size * CONFIG.rollout.max_response


def test_fewer_accepted_states_take_more_rounds():
    rounds = [workload_of(CONFIG, 4, Assumptions(accepted=share)).rounds for share in (1.0, 0.5, 0.1)]
    assert rounds == [1, 2, 8]


def test_rounds_without_positions_have_no_exploration():
    config = dataclasses.replace(CONFIG, explore=dataclasses.replace(CONFIG.explore, positions=0))
    work = workload_of(config, 4, Assumptions())
    assert work.explore is None
    assert work.first_return.lengths.shape == (4, 2, 16)


def test_segments_of_base_trajectories_are_rows_of_an_update():
    """One more for each state, of the tokens from one position to the next."""
    edge = dataclasses.replace(CONFIG, credit=dataclasses.replace(CONFIG.credit, estimator="edge"))
    plain, more = (workload_of(config, 4, Assumptions(response=0.3)) for config in (CONFIG, edge))
    segment = math.ceil(0.3 * CONFIG.rollout.max_response / (CONFIG.explore.positions + 1))
    assert more.trained - plain.trained == CONFIG.optimizer.batch_states * segment


# --- the verdict


def plan_of(total, refused=None, held=GIB):
    """A plan whose largest program has so many bytes."""
    rest = total - 2 * GIB - held
    program = CompiledProgram("chunk 2 x 64", arguments=2 * GIB, temporary=rest, refusal=refused)
    stage = Stage("update", program, {"optimizer": held}, {"gradient": 2 * GIB}, chunk=Chunk(2, 64, 64))
    small = dataclasses.replace(
        stage, phase="explore", program=dataclasses.replace(program, refusal=None, temporary=0)
    )
    at, config = find_slice("v5e-4"), dataclasses.replace(CONFIG, steps=7)
    mesh = placement(1, 4, 1).mesh
    phases = [] if refused else [Phase("update", Costs(flops=1e15), Seconds(10, 20, 5, 20))]
    return Plan(
        name="x",
        setup=Setup(config, TINY, mesh),
        slice=at,
        work=workload_of(config, 4, Assumptions()),
        assumptions=Assumptions(),
        stages=[small, stage],
        phases=phases,
        price=2.0,
    )


def placed_on(plan, monkeypatch):
    """`plan` where chips have no coordinates."""
    monkeypatch.setattr("fr3e_jax.planning.as_json.mesh_warnings", lambda *_: [])
    return plan


def test_a_run_fits_up_to_what_is_kept_free(monkeypatch):
    limit = int(15.75 * GIB) - RESERVE
    fits, short = (placed_on(plan_of(size), monkeypatch) for size in (limit, limit + GIB))
    assert fits.fits
    assert not short.fits
    assert short.missing == pytest.approx(GIB)
    assert any(line.startswith("fits: 0.0 GiB") for line in conclusion(fits))
    assert conclusion(fits)[-1].startswith("so it does if all answers go to the limit")
    *_, verdict, alternative = conclusion(short)
    assert verdict.startswith(
        "does not fit, short by 1.0 GiB (update: chunk 2 x 64); the largest are temporaries"
    )
    assert "--optimizer.micro_tokens 4096" in verdict
    assert "a larger slice" in verdict
    assert "by an estimate" in alternative


def test_queries_that_are_auto_are_told_with_what_bounds_them():
    plan = plan_of(4 * GIB)
    lines = conclusion(dataclasses.replace(plan, auto_queries=True))
    (line,) = set(lines) - set(conclusion(plan))
    assert line.startswith(f"rollout.queries auto: rounds of {plan.setup.queries} queries fill the batch")
    assert "rollout.max_queries 64, as far as their KV caches fit" in line


def test_what_xla_refuses_does_not_fit_whatever_its_size():
    plan = plan_of(4 * GIB, refused="RESOURCE_EXHAUSTED")
    assert not plan.fits
    assert plan.step_seconds is None
    assert plan.cost is None


def test_the_parts_of_a_stage_are_all_of_it():
    stage = plan_of(9 * GIB).largest
    sizes = memory_parts(stage)
    assert sum(sizes.values()) == stage.total == 9 * GIB
    assert sizes["optimizer"] == GIB
    assert sizes["gradient"] == 2 * GIB
    assert sizes["temporaries"] == 6 * GIB


def test_what_a_program_is_given_and_does_not_read_is_alive():
    program = CompiledProgram("open states", results=GIB)
    assert Stage("explore", program, {}, {"sampling copy": 3 * GIB}).total == 4 * GIB


def test_a_price_is_told_for_a_thousand_steps(monkeypatch):
    plan = placed_on(plan_of(4 * GIB), monkeypatch)
    assert plan.cost == pytest.approx(1000 * 20 / 3600 * 4 * 2.0)
    report = as_json(plan)
    assert json.loads(json.dumps(report)) == report
    assert report["fits"] is True
    assert report["cost_per_1000_steps"] == plan.cost
    assert report["phases"][0]["bound"] == "memory"


@needs_compiler
def test_each_of_the_three_can_bound_a_phase():
    at = find_slice("v5e-4")
    mesh = mesh_on((1, 2, 2), devices_of(at))
    rates = Rates(at, mesh, Assumptions())
    wire = {("all-gather", ("fsdp",)): 1e12}
    costs = {
        "compute": Costs(flops=1e18, bytes=1e12),
        "memory": Costs(flops=1e12, bytes=1e15),
        "network": Costs(flops=1e12, bytes=1e9, wire=wire),
    }
    for bound, each in costs.items():
        assert rates.seconds(each).bound == bound
    waited = Costs(flops=1e18, wire={("all-reduce", ("tensor",)): 1e12})
    seconds = rates.seconds(waited)
    assert seconds.total == pytest.approx(seconds.compute + seconds.network)


# --- the command


def test_flags_may_have_dashes_as_gcloud_has_them():
    config, _ = parse(
        PlanConfig,
        "plan",
        "configs/quickstart.yaml",
        ["--price-per-chip-hour", "2", "--topology=v5e-4", "--mesh.fsdp", "-1"],
    )
    assert (config.price_per_chip_hour, config.topology, config.mesh.fsdp) == (2.0, "v5e-4", -1)


def test_models_are_planned_without_a_download(tmp_path):
    assert model_of("Qwen/Qwen2.5-Math-7B@main").max_position_embeddings == 4096
    assert model_of("quickstart").hidden_size == 128
    for name in ("Org/Unknown", str(tmp_path / "nothing")):
        with pytest.raises(ConfigError, match="no directory"):
            model_of(name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology says for which slice"),
        (["--topology", "v5e-17"], "there is no slice 'v5e-17'; v5e comes as v5e-1, v5e-4"),
        (["--topology", "v5e-4", "--fast"], "--fast"),
        (
            ["--topology", "v5e-4", "--assume.response", "2"],
            "assume.response is 2.0, must be above 0 and at most 1",
        ),
        (["--topology", "v5e-4", "--model.path", "Org/Unknown"], "known are"),
        (["--topology", "v5e-4", "--quick", "--peak"], "choose one of them"),
    ],
    ids=["none", "topology", "flag", "share", "model", "quick and peak"],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message):
    done = call("plan", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_every_planned_preset_is_there_and_has_the_numbers_of_the_release():
    for name in PLANS:
        config, _ = parse(Config, "plan", f"configs/slices/{name}.yaml", [])
        assert (config.explore.positions, config.explore.rollouts) == (4, 16), name
        assert (config.rollout.base_trajectories, config.optimizer.learning_rate) == (4, 2e-6), name
        assert config.rollout.max_prompt == 1024
        assert config.rollout.max_response == (16384 if "16k" in name else 3072)
        assert config.model.compute_dtype == "bfloat16"
    files = {path.stem for path in (REPOSITORY / "configs" / "slices").glob("*.yaml")}
    assert files == set(PLANS)


SHORT = (
    *("--rollout.max_response", "16", "--rollout.queries", "2", "--explore.rollouts", "2"),
    *("--optimizer.micro_tokens", "32", "--optimizer.batch_states", "4", "--evaluate.rows", "4"),
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("topology", "options"),
    [("v5e-4", []), ("v5p-8", ["--loss.mismatch", "mask", "--loss.aggregate", "sequence"])],
)
def test_a_small_run_is_planned_from_end_to_end(topology, options):
    """By the command, on the quickstart's model with short answers."""
    flags = ["--topology", topology, "--json", "--price-per-chip-hour", "1.5", "--mesh.fsdp", "2"]
    layout = ["--mesh.tensor", "2", "--mesh.update_tensor", "2"]  # whose updates exchange over both axes
    done = run("plan", *flags, *layout, *SHORT, *options)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert done.stderr.count("(compiled in ") == len(plan["programs"])
    assert ("log-probabilities" in {program["program"] for program in plan["programs"]}) == bool(options)
    assert plan["chips"] == 4
    assert plan["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert [phase["phase"] for phase in plan["phases"]] == ["reshard", "first return", "explore", "update"]
    for phase in plan["phases"]:
        assert phase["bound"] in ("compute", "memory", "network")
        assert phase["seconds"] > 0
        assert phase["bytes"] > 0
    update = plan["phases"][-1]
    assert update["flops"] > 0
    assert {tuple(x["axes"]) for x in update["collectives"]} >= {("fsdp",), ("tensor",)}
    # The cast gathers over fsdp, and nothing else.
    assert {tuple(x["axes"]) for x in plan["phases"][0]["collectives"]} == {("fsdp",)}
    assert plan["step_seconds"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"]))
    for program in plan["programs"]:
        assert sum(program["gib"].values()) == pytest.approx(program["total_gib"], abs=0.05)


@needs_compiler
@pytest.mark.slow
def test_a_run_that_is_too_large_is_done_so_with_exit_code_1():
    """Of a small model so many answers at a time that their caches are."""
    sizes = "--rollout.queries", "8192", "--rollout.max_prompt", "200"
    done = run("plan", "--topology", "v5e-1", "--json", *SHORT, *sizes)
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    assert plan["short_gib"] > 0
    assert "--rollout.queries 4096" in plan["try"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5_0.5b_v5e1", "qwen2.5_7b_v5e16", "qwen2.5_32b_v5p128"])
def test_shipped_presets_fit_their_slices(name):
    """By what is compiled: the largest programs, and all that their estimates leave in doubt.

    Of the others the estimate says that they fit, and `test_plan_estimate.py` how near it comes.
    """
    flags = ("--config", f"configs/slices/{name}.yaml", "--topology", PLANS[name], "--json", "--peak")
    done = subprocess.run(**command("plan", *flags), timeout=3600)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert {program["estimated"] for program in plan["programs"]} == {True, False}
    for program in plan["programs"]:
        assert program["total_gib"] * (MARGIN if program["estimated"] else 1) <= plan["available_gib"]
