"""The decoding program as TPUs would run it, compiled without one; and the reading of compiled programs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, needs_compiler

from fr3e_jax.bench.compiled import DecodingShape, compile_decoding
from fr3e_jax.bench.process import compilations
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.hlo_text import array_types

SMALL = dataclasses.replace(
    TINY,
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    num_hidden_layers=4,
)
SLICES = {"v4:2x2x1": 4, "v5e:2x2": 4, "v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x2": 4}


# Each slice, and of each kind of chip one with each split.
CASES = [(topology, "all") for topology in SLICES]
CASES += [(topology, split) for topology in ("v5e:2x2", "v5p:2x2x1") for split in ("fsdp", "tensor")]
# By default one of them, since a compilation is seconds.
OFTEN = [("v6e:2x2", "all")]


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "split"),
    [pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_no_cache_is_copied_on_a_tpu(topology, split):
    """Nothing of the size of the pages, or of what branches share, is copied, transposed or scattered.

    What else is needed is small beside them.
    """
    chips = SLICES[topology]
    mesh = {"fsdp": (1, chips, 1), "tensor": (1, 1, 4), "all": (1, chips // 2, 2)}[split]
    parts = mesh[0] * mesh[1]
    told = compile_decoding(SMALL, DecodingShape(topology, mesh, 2 * parts, 32, 1024, 2048))
    assert told.moves == []
    assert told.temporary < 0.05 * told.pages


@needs_compiler
def test_a_copied_cache_is_seen():
    """What the test above looks for is found where it is."""
    text = jax.jit(lambda x: (x.T @ x, x.T + 1)).lower(jnp.zeros((64, 32))).compile().as_text()
    assert Program(text).moves(64 * 32)


@needs_compiler
def test_pages_and_contexts_are_read_once_for_a_token():
    """And weights; what XLA puts down meanwhile is less than half as much."""
    told = compile_decoding(SMALL, DecodingShape("v5e:2x2", (1, 1, 4), 2, 64, 1024, 1024))
    assert 1 < told.accessed / told.necessary < 1.5


# --- counting programs


def test_programs_are_counted_by_what_is_compiled_and_not_by_signatures():
    """Two signatures share a program, which the cache of a jitted function counts twice."""

    @jax.jit
    def advance(x):
        return x + 1

    @jax.jit
    def start(x):
        return x - 1

    host, device, longer = np.ones(3, np.float32), jnp.ones(3), jnp.ones(4)
    with compilations("advance") as compiled:
        for x in (host, device, longer, host):
            start(advance(x))
    assert compiled == ["advance", "advance"] and advance._cache_size() == 3
    advance(jnp.ones(5))
    assert len(compiled) == 2


# --- counting bytes


def program_of(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_sizes_are_those_of_main_memory():
    text = "(f32[8,128]{1,0:T(8,128)S(1)}, bf16[4,2]{1,0}, pred[], s32[3])"
    found = array_types(text)
    assert [(shape.bytes, shape.in_memory) for shape in found] == [
        (4096, False),
        (16, True),
        (1, True),
        (12, True),
    ]


def test_a_loop_is_counted_as_often_as_it_runs():
    """The bytes of a scan over stacked weights: every weight once, whatever the number of layers."""
    for layers in (4, 8):

        def run(x, weights):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

        program = program_of(run, jnp.zeros((8, 256)), jnp.zeros((layers, 256, 256)))
        weights = layers * 256 * 256 * 4
        counted = program.bytes()
        assert weights < counted < 3.5 * weights  # CPUs lay a layer's slice out before they multiply by it


def test_an_update_in_place_counts_what_it_changes():
    def run(cache, row, at):
        return jax.lax.dynamic_update_slice(cache, row, (at, 0))

    lowered = jax.jit(run, donate_argnums=0).lower(jnp.zeros((1024, 256)), jnp.zeros((1, 256)), 3)
    counted = Program(lowered.compile().as_text()).bytes()
    assert counted < 16 * 256 * 4 < 1024 * 256 * 4


@pytest.mark.parametrize("size", [128, 4096])
def test_elementwise_bytes_are_read_and_written_once(size):
    program = program_of(lambda x, y: jnp.exp(x) * y + x, jnp.zeros(size), jnp.zeros(size))
    assert program.bytes() == 3 * size * 4
    assert not re.search("transpose", "".join(program.moves(size)))
