"""Plans: slices by name, what is read from compiled programs, what a step is taken to do, and the verdict."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import REPOSITORY
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, call, command, needs_compiler, placement, run, tiny_params

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, LossConfig, MeshConfig, OptimizerConfig, RolloutConfig
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.state import make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import abstract_params, graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE, PlacementError
from fr3e_jax.plan import PLANS, PlanConfig, model_of
from fr3e_jax.planning.as_json import as_json
from fr3e_jax.planning.compiled import CompiledProgram, requested_bytes
from fr3e_jax.planning.fit import RESERVE, Plan, memory_parts
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.hlo_collectives import group_of
from fr3e_jax.planning.hlo_flops import valid_pairs
from fr3e_jax.planning.make import MARGIN
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.show import conclusion
from fr3e_jax.planning.slices import GIB, find_slice, slice_names
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.times import Phase, Rates, Seconds
from fr3e_jax.planning.topology import devices_of, lane_of, mesh_on, mesh_sizes, mesh_warnings, run_mesh
from fr3e_jax.planning.workload import Assumptions, Chunk, decode_of, lengths_of, workload_of
from fr3e_jax.types import Batch, Queries, Trunks

# --- slices


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-8", "v5e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-64", "v4:2x4x4", 32),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("V5E-4", "v5e:2x2", 4),
    ],
)
def test_a_slice_is_found_by_the_name_that_it_is_rented_under(name, topology, chips):
    """v4 and v5p count TensorCores, two to a chip."""
    at = find_slice(name)
    assert (at.topology, at.chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("v5p-12", "v5p-8, v5p-16"),
        ("v5e-3", "v5e-4, v5e-8"),
        ("v5e16", "v5e-16"),
        ("v7-8", "v"),
        ("a100", "v5e-16"),
        ("v5e:2x2x2", "v5e"),
    ],
)
def test_an_unknown_slice_is_refused_with_those_that_are_near(name, similar):
    with pytest.raises(ConfigError, match="there is no slice") as error:
        find_slice(name)
    assert similar in str(error.value)
    assert "\n" not in str(error.value)


@needs_compiler
@pytest.mark.parametrize("name", [n for n in slice_names() if int(n.rpartition("-")[2]) <= 64])
def test_libtpu_knows_every_slice_with_as_many_chips(name):
    at = find_slice(name)
    devices = devices_of(at)
    assert len(devices) == at.chips
    assert {device.device_kind for device in devices} == {at.chip.kind}


def test_a_mesh_that_does_not_cover_the_chips_is_refused():
    assert mesh_sizes(MeshConfig(1, -1, 4), 16) == (1, 4, 4)
    for config in (MeshConfig(1, 3, 4), MeshConfig(1, -1, 5), MeshConfig(2, 2, 2)):
        with pytest.raises(PlacementError, match="does not cover the 16 chip"):
            mesh_sizes(config, 16)


@needs_compiler
def test_a_mesh_that_jax_cannot_lay_on_the_torus_is_refused_with_those_that_it_can():
    at = find_slice("v5p-128")
    with pytest.raises(PlacementError, match="fsdp x tensor can be 64 x 1, 16 x 4"):
        run_mesh(at, MeshConfig(1, 8, 8))
    assert dict(run_mesh(at, MeshConfig(1, 16, 4)).shape) == {"data": 1, "fsdp": 16, "tensor": 4}


@needs_compiler
def test_axes_are_known_to_be_rings_or_lines_or_neither():
    whole = find_slice("v5e-256")
    mesh = run_mesh(whole, MeshConfig(1, 16, 16))
    assert lane_of(whole, mesh, ("tensor",)) == lane_of(whole, mesh, ("fsdp",))
    ring = lane_of(whole, mesh, ("tensor",))
    assert (ring.size, ring.dimensions, ring.ring, ring.hops) == (16, 1, True, 1)
    part = find_slice("v5e-16")
    line = lane_of(part, run_mesh(part, MeshConfig(1, 4, 4)), ("tensor",))
    assert (line.ring, line.hops) == (False, 1)
    assert ring.bandwidth(1.0) == 2 * line.bandwidth(1.0) == 2
    assert mesh_warnings(part, run_mesh(part, MeshConfig(1, 4, 4))) == []
    assert "mesh.fsdp 2" in mesh_warnings(part, run_mesh(part, MeshConfig(1, 2, 8)))[0]


# --- reading programs

LOOP = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%fused (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,32]{1,0} parameter(1)
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%p1), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
  ROOT %convolution.1 = bf16[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%gathering (p0: bf16[8,32]) -> bf16[16,32] {
  %p0.1 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,32]{1,0} all-gather(%p0.1), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
}

%all-reduce-scatter.3 (p0: f32[64]) -> f32[32] {
  %p0.2 = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p0.2), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %slice.1 = f32[32]{0} slice(%all-reduce.9), slice={[0:32]}
}

%body (w: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %w = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%w), index=0
  %h = bf16[8,16]{1,0} get-tuple-element(%w), index=1
  %k = bf16[16,32]{1,0} broadcast(%i)
  %early = bf16[8,32]{1,0} broadcast(%i)
  %start = bf16[16,32]{1,0} fusion(%early), kind=kCustom, calls=%gathering
  %f = bf16[8,32]{1,0} fusion(%h, %k), kind=kOutput, calls=%fused
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %h)
}

%cond (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: bf16[8,16], v: f32[64]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %v = f32[64]{0} parameter(1)
  %one = s32[] constant(1)
  %r = f32[32]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.3
  %init = (s32[], bf16[8,16]{1,0}) tuple(%one, %a)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_loops_are_counted_from_where_their_counter_starts_to_where_it_ends():
    assert Program(LOOP).flops() == 5 * 2 * 8 * 16 * 32


def test_a_collective_that_is_spread_over_fusions_is_counted_once_a_round():
    gathered, scattered = sorted(Program(LOOP).collectives(), key=lambda x: x.kind)
    assert (gathered.kind, gathered.times, gathered.size) == ("all-gather", 5, 16 * 32 * 2)
    assert gathered.group == (0, 2)
    assert gathered.received(4) == 5 * 16 * 32 * 2 / 2
    # An all-reduce of which each keeps its part moves half of what one does.
    assert (scattered.kind, scattered.size, scattered.group) == ("reduce-scatter", 256, (0, 1))
    assert scattered.received(4) == 128


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}", (0, 1, 2, 3)),
        ("source_target_pairs={{2,3},{3,2}}", (2, 3)),
        ("replica_groups={}", ()),
    ],
)
def test_groups_of_chips_are_read_in_every_notation(text, group):
    assert group_of(f"  %x = f32[8] all-gather(%y), {text}, dimensions={{0}}") == group


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A product, a batched one as TPUs have it, and one that is summed over heads.
        ("f32[4,8] convolution(%a, %b), dim_labels=bf_io->bf", ((4, 16), (16, 8), 2 * 4 * 16 * 8)),
        (
            "f32[8,2,16] convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1},"
            " dim_labels=bf0_i0o->b0f",
            ((8, 32, 1), (32, 2, 16), 2 * 8 * 32 * 2 * 16),
        ),
        (
            "f32[8,32,1] convolution(%a, %b), window={size=4}, dim_labels=b0f_0io->bf0",
            ((8, 4, 16), (4, 16, 32), 2 * 8 * 4 * 16 * 32),
        ),
        (
            "f32[2,4,8] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}",
            ((2, 4, 16), (2, 16, 8), 2 * 2 * 4 * 16 * 8),
        ),
    ],
    ids=["product", "heads", "over heads", "dot"],
)
def test_products_are_counted_in_every_form(line, flops):
    left, right, expected = flops

    def array(sizes):
        return f"f32[{','.join(map(str, sizes))}]"

    text = (
        f"ENTRY %m (a: {array(left)}, b: {array(right)}) -> f32[] {{\n  %a = {array(left)} parameter(0)\n"
        f"  %b = {array(right)} parameter(1)\n  ROOT %r = {line}\n}}\n"
    )
    assert Program(text).flops() == expected


WIDE = dataclasses.replace(
    TINY, hidden_size=256, intermediate_size=1024, head_dim=64, num_hidden_layers=5, vocab_size=512
)


def test_flops_of_a_forward_pass_are_the_models():
    """To 2%, all layers of the scan."""
    graph, size = graph_of(WIDE), 64

    def forward(params, token):
        model = nnx.merge(graph, params)
        return model.logits(model(token, jnp.arange(size), size)[0])

    token = jax.ShapeDtypeStruct((size,), jnp.int32)
    text = jax.jit(forward).lower(abstract_params(WIDE), token).compile().as_text()
    assert Program(text).flops() == pytest.approx(WIDE.forward_flops(size, size * size, size), rel=0.02)


def learner_of(config):
    at = placement(1, 1, 1)
    optimizer = make_optimizer(OptimizerConfig(), logical_axes(config))
    return Learner(
        graph_of(config),
        at,
        optimizer,
        LossConfig(),
        compute_dtype=jnp.dtype(jnp.float32),
        logit_chunk=64,
        remat=False,
    )


def array(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_flops_of_an_update_are_the_models():
    """To 2%: forward, and backward twice that; attention and the head run forward once more for it."""
    rows, width, trunk = 4, 64, 128
    learner, params = learner_of(WIDE), abstract_params(WIDE)
    trunks = Trunks(array(jnp.int32, 1, 1, trunk), array(jnp.int32, 1, 1))
    caches, cache_gradient = jax.eval_shape(learner.prefill_and_zero_gradient, params, trunks)
    numbers, cells = array(jnp.int32, rows), array(jnp.float32, rows, width + 1)
    chunk = Batch(
        array(jnp.int32, rows, width + 1), numbers, numbers, cells, array(jnp.float32, rows), numbers, numbers
    )
    arguments = (learner, params, cache_gradient, Prefilled(params, caches), None, chunk, array(jnp.float32))
    counted = Program(Learner.add_chunk.lower(*arguments, window=trunk).compile().as_text()).flops()
    tokens = rows * width
    pairs = tokens * (width + trunk)  # what is masked is computed: one block
    layers = WIDE.forward_flops(tokens, 0, 0)
    attention = WIDE.forward_flops(0, pairs, 0)
    head = WIDE.forward_flops(0, 0, tokens)
    assert counted == pytest.approx(3 * layers + 4 * attention + 4 * head, rel=0.02)


@given(
    *(st.integers(1, 4) for _ in range(3)),
    *(st.integers(1, 6) for _ in range(3)),
    st.integers(-3, 3),
)
def test_what_falls_on_padding_is_left_out(stride, spread, apart, size, kernel, result, low):
    """Against a table of all pairs."""
    window = {"stride": stride, "pad": f"{low}_0", "lhs_dilate": spread, "rhs_dilate": apart}
    at = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * apart - low
    expected = ((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum()
    assert valid_pairs({k: str(v) for k, v in window.items()}, 0, size, kernel, result) == expected


def test_what_xla_asked_for_is_read_from_its_refusal():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(24.50G) exceeds available HBM (15.75G)."
    )
    assert requested_bytes(message) == 24.5 * GIB
    assert requested_bytes("Used 812.00M of 15.75G hbm. Exceeded hbm capacity by") == 812 * 2**20
    assert requested_bytes("RESOURCE_EXHAUSTED: something else") is None


# --- what a step does


@pytest.mark.parametrize("max_new", [100, 400])
def test_the_calls_of_a_decoding_are_those_of_the_engine(max_new):
    """As many rows decoded, on lengths that the engine itself gave."""
    config = dataclasses.replace(TINY, max_position_embeddings=1024)
    at = placement(2, 1, 1, SAMPLING_TABLE)
    engine = Engine(graph_of(config), at, max_new, (3,))
    params = jax.device_put(
        tiny_params(config, 2.0), at.shardings(logical_axes(config), tiny_params(config, 2.0))
    )
    queries = Queries(np.full((4, 4), 5, np.int32), np.full(4, 4, np.int32), np.arange(4, dtype=np.int32))
    arguments = (params, at.place_rows(queries), jax.random.key(0), 0)
    rollouts, row_steps = engine.sample(*arguments, 16, Sampling())
    plan = decode_of(np.asarray(rollouts.length).reshape(2, 2, 16), max_new, compact=True)
    assert plan.row_steps == int(row_steps)
    assert plan.tokens == int(rollouts.length.sum())
    assert len(plan.legs) > 2


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
    assert long.explore.largest.cache > short.explore.largest.cache
    worst = workload_of(CONFIG, 4, Assumptions(), worst=True)
    assert worst.explore.largest.cache > long.explore.largest.cache
    assert worst.explore.tokens == worst.explore.lengths.size * CONFIG.rollout.max_response


def test_fewer_accepted_states_take_more_rounds():
    rounds = [workload_of(CONFIG, 4, Assumptions(accepted=share)).rounds for share in (1.0, 0.5, 0.1)]
    assert rounds == [1, 2, 8]


def test_rounds_without_positions_have_no_exploration():
    config = dataclasses.replace(CONFIG, explore=dataclasses.replace(CONFIG.explore, positions=0))
    work = workload_of(config, 4, Assumptions())
    assert work.explore is None
    assert work.first_return.lengths.shape == (4, 2, 16)


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
    assert conclusion(fits)[-1].startswith(("fits: 0.0 GiB", "but if"))
    *_, verdict, alternative = conclusion(short)
    assert verdict.startswith(
        "does not fit, short by 1.0 GiB (update: chunk 2 x 64); the largest are temporaries"
    )
    assert "--optimizer.micro_tokens 4096" in verdict
    assert "a larger slice" in verdict
    assert "by an estimate" in alternative


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
@pytest.mark.parametrize("topology", ["v5e-4", pytest.param("v5p-8", marks=pytest.mark.slow)])
def test_a_small_run_is_planned_from_end_to_end(topology):
    """By the command, on the quickstart's model with short answers."""
    flags = ["--topology", topology, "--json", "--price-per-chip-hour", "1.5", "--mesh.fsdp", "2"]
    done = run("plan", *flags, "--mesh.tensor", "2", *SHORT)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert done.stderr.count("(compiled in ") == len(plan["programs"])
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
    queries = "16384"
    done = run("plan", "--topology", "v5e-1", "--json", *SHORT, "--rollout.queries", queries)
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    assert plan["short_gib"] > 0
    assert "--rollout.queries 8192" in plan["try"]


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
