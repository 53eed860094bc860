"""The decoding program compiled for TPUs. No TPU is needed: libtpu compiles for any slice.

`pip install 'fr3e_jax[tpu]'` brings libtpu.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fr3e_jax.engine.branches import Branches, Decoding
from fr3e_jax.engine.caches import CACHE_AXES
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.seats import Leg, take_seats
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import DecoderConfig, abstract_params, logical_axes
from fr3e_jax.parallel.mesh import place_model, row_parts
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.topology import slice_mesh
from fr3e_jax.run.build import policy_of_shape
from fr3e_jax.types import Rollouts

CACHE_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class DecodingShape:
    """Sizes of a decoding program to compile, and the slice that it is for.

    topology: as jax names it, such as `v5p:2x2x1`. mesh: data, fsdp, tensor; its product is the chips that
    are used. trajectories: over all chips. branches: of each trajectory. shared: slots of the segments that
    the branches of a trajectory share. slots: of each branch's own segment.
    """

    topology: str
    mesh: tuple[int, int, int]
    trajectories: int
    branches: int
    shared: tuple[int, ...]
    slots: int


@dataclasses.dataclass(frozen=True)
class CompiledDecoding:
    """Memory of a compiled decoding program, on one chip.

    cache: bytes of the branch cache. temporary: bytes beside arguments and results. accessed: bytes of main
    memory that a token of every branch reads and writes. necessary: bytes of all weights, of every shared
    segment and of every branch's own, once. moves: instructions that copy or move an array of the size of
    the cache's keys.
    """

    cache: int
    temporary: int
    accessed: int
    necessary: int
    moves: list[str]


def compile_decoding(
    config: DecoderConfig, shape: DecodingShape, before: int | None = None
) -> CompiledDecoding:
    """Compile the decoding of a model for a slice of TPUs.

    Args:
      config: the architecture; weights are bfloat16.
      shape: sizes and slice.
      before: rows of a part in the leg before, if rows move together first.
    """
    axes, shapes = logical_axes(config), abstract_params(config)
    _, placement = place_model(slice_mesh(shape.topology, shape.mesh), axes, shapes)
    parts, n, c = row_parts(placement.mesh), shape.trajectories, shape.branches
    rows = n * c // parts

    def array(dtype: Any, *sizes: int, axes: tuple[str | None, ...] = ("batch",)) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placement.sharding(*axes))

    def segment(slots: int) -> Segment:
        sizes = (config.num_hidden_layers, n, config.num_key_value_heads, slots, config.head_dim)
        cache = array(CACHE_DTYPE, *sizes, axes=CACHE_AXES)
        return Segment(cache, cache, array(jnp.int32, n, c))

    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, CACHE_DTYPE, sharding=sharding),
        shapes,
        placement.shardings(axes, shapes),
    )
    numbers, cells = array(jnp.int32, n, c), array(jnp.float32, n, c, shape.slots)
    key_type = jax.eval_shape(lambda: jax.random.key(0)).dtype
    branches = Branches(
        token=numbers,
        position=numbers,
        context=tuple(map(segment, shape.shared)),
        limit=numbers,
        key=array(key_type, n, c),
    )
    sizes = (config.num_hidden_layers, parts, config.num_key_value_heads, rows * shape.slots)
    cache = array(CACHE_DTYPE, *sizes, config.head_dim, axes=CACHE_AXES)
    flags, number = array(jnp.bool_, n, c), array(jnp.int32, axes=())
    rollouts = Rollouts(array(jnp.int32, n, c, shape.slots), cells, cells, cells, numbers, flags)
    decoding = Decoding(rollouts, flags, numbers, Segment(cache, cache, number), number)
    seats = jax.tree.map(
        lambda x: array(jnp.int32, *x.shape), take_seats(np.ones((parts, n // parts, c), bool), rows)
    )
    engine = policy_of_shape(config, placement.mesh, (0,), jnp.dtype(CACHE_DTYPE)).engine(shape.slots)
    origin = None if before is None else array(jnp.int32, parts, rows)
    size_before = before or rows, rows * shape.slots // (before or rows)
    leg = Leg(seats, origin, until=number, leave=number, before=size_before, slots=shape.slots)
    compiled = Engine.advance.lower(engine, params, branches, decoding, leg, sampling=Sampling()).compile()

    def held(*arrays: Any) -> int:
        """Add up the bytes of arrays on a chip."""
        local = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in arrays]
        return sum(int(np.prod(sizes)) * size for sizes, size in local)

    untied = "lm_head" in params  # of the embedding then only a few rows are read
    read = {name: leaf for name, leaf in params.items() if not (untied and name == "embedding")}
    shared = [x for segment in branches.context for x in (segment.key, segment.value)]
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    program = Program(text)
    return CompiledDecoding(
        cache=held(cache, cache),
        temporary=memory.temp_size_in_bytes,
        accessed=program.bytes((1, config.num_hidden_layers)),
        necessary=held(*jax.tree.leaves(read), *shared, cache, cache),
        moves=program.moves(held(cache) // jnp.dtype(CACHE_DTYPE).itemsize),
    )
