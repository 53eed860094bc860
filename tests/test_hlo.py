"""Loops, collectives, products and sizes, read from compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, placement

from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.state import make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import abstract_params, graph_of, logical_axes
from fr3e_jax.planning.compiled import requested_bytes
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.hlo_collectives import group_of
from fr3e_jax.planning.hlo_flops import valid_pairs
from fr3e_jax.planning.program_costs import costs_by_loop, costs_of
from fr3e_jax.planning.slices import GIB
from fr3e_jax.types import Batch, Trunks

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


def test_a_loop_that_is_unrolled_counts_by_more_than_one():
    """As XLA has those in which weights come shard by shard: two products in a body, half as many runs."""
    body = "ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %h)"
    assert body in LOOP
    unrolled = LOOP.replace(
        body, "%two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  " + body.replace("%i,", "%next,")
    )
    assert Program(unrolled).flops() == 3 * 2 * 8 * 16 * 32  # from 1 to 6 by 2
    assert Program(unrolled.replace("constant(2)", "constant(1)")).flops() == 5 * 2 * 8 * 16 * 32


def looping(name, end, body):
    """A loop with a number of runs that is an argument, and a name."""

    def run(x, n):
        with jax.named_scope(name):
            return jax.lax.fori_loop(0, n[end], lambda _, x: body(x, n), x)

    return run


def test_loops_that_end_when_data_say_so_are_counted_by_their_names():
    """A product in each of two loops, in a loop over layers, in a loop: each costs what it costs."""
    size, layers = 64, 3
    inner = looping("inner", 0, lambda x, n: jnp.tanh(x @ x))
    other = looping("other", 1, lambda x, n: jnp.tanh(x @ x[:, :8] @ x[:8]))

    def over_layers(x, n):
        return jax.lax.scan(lambda x, _: (other(inner(x, n), n), None), x, None, layers)[0]

    lowered = jax.jit(looping("outer", 2, over_layers)).lower(jnp.zeros((size, size)), jnp.zeros(3, int))
    program = Program(lowered.compile().as_text())
    assert program.loops() == {"outer": (), "inner": ("outer",), "other": ("outer",)}
    product, narrow = 2 * size**3, 2 * 2 * size**2 * 8
    trips = {"outer": 2, "inner": 5, "other": 7}
    assert program.flops(trips) == 2 * layers * (5 * product + 7 * narrow)
    assert program.flops() == layers * (product + narrow)  # each once, where nothing is said
    once, loops = costs_by_loop(program, placement(1, 1, 1).mesh)
    assert once.flops == loops["outer"].flops == 0
    assert (loops["inner"].flops, loops["other"].flops) == (layers * product, layers * narrow)
    whole = costs_of(program, placement(1, 1, 1).mesh, trips)
    assert whole.bytes == pytest.approx(
        once.bytes + 2 * (loops["outer"].bytes + 5 * loops["inner"].bytes + 7 * loops["other"].bytes)
    )


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
