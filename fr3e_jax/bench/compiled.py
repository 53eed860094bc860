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
from fr3e_jax.engine.pages import ON_TPU, PAGE_AXES, Pages, PageSizes
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.schedule import Room, Schedule
from fr3e_jax.engine.seats import map_leg
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import DecoderConfig, abstract_params, logical_axes
from fr3e_jax.parallel.mesh import place_model, row_parts
from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.planning.decodes import run_leg, runs_of
from fr3e_jax.planning.hlo import Program
from fr3e_jax.planning.topology import slice_mesh
from fr3e_jax.run.build import policy_of_shape
from fr3e_jax.types import Rollouts

CACHE_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class DecodingShape:
    """Sizes of a decoding program to compile, and the slice that it is for.

    topology: as jax names it, such as `v5p:2x2x1`. mesh: data, fsdp, tensor; its product is the chips that
    are used. trajectories: over all chips. branches: of each trajectory. shared: slots of what the branches
    of a trajectory share, all filled. slots: tokens that every branch has drawn.
    """

    topology: str
    mesh: tuple[int, int, int]
    trajectories: int
    branches: int
    shared: int
    slots: int


@dataclasses.dataclass(frozen=True)
class CompiledDecoding:
    """Memory of a compiled decoding program, on one chip.

    pages: bytes of the branches' pages. temporary: bytes beside arguments and results. accessed: bytes of
    main memory that a token of every branch reads and writes. necessary: bytes of all weights, of what is
    shared and of every branch's own, once. moves: instructions that copy or move an array of the size of the
    pages' keys, or of the keys of what is shared.
    """

    pages: int
    temporary: int
    accessed: int
    necessary: int
    moves: list[str]


def compile_decoding(
    config: DecoderConfig, shape: DecodingShape, sizes: PageSizes = ON_TPU
) -> CompiledDecoding:
    """Compile the decoding of a model for a slice of TPUs.

    Args:
      config: the architecture; weights are bfloat16.
      shape: sizes and slice.
      sizes: of blocks and pages.
    """
    axes, shapes = logical_axes(config), abstract_params(config)
    _, placement = place_model(slice_mesh(shape.topology, shape.mesh), axes, shapes)
    parts, n, c = row_parts(placement.mesh), shape.trajectories, shape.branches
    room = Room(sizes, n // parts, c, shape.slots, 0)
    room = dataclasses.replace(room, pages=room.useful)
    heads, width, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers

    def array(dtype: Any, *sizes: int, axes: tuple[str | None, ...] = ("batch",)) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placement.sharding(*axes))

    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, CACHE_DTYPE, sharding=sharding),
        shapes,
        placement.shardings(axes, shapes),
    )
    numbers, cells = array(jnp.int32, n, c), array(jnp.float32, n, c, shape.slots)
    shared = array(CACHE_DTYPE, layers, n, heads, shape.shared, width, axes=CACHE_AXES)
    branches = Branches(
        token=numbers,
        position=numbers,
        context=Segment(shared, shared, numbers),
        limit=numbers,
        key=array(jax.eval_shape(lambda: jax.random.key(0)).dtype, n, c),
    )
    sizes = room.sizes
    page = (parts, heads, sizes.rows, sizes.slots, width)
    pages = array(CACHE_DTYPE, layers, room.pages, *page, axes=PAGE_AXES)
    flags, number = array(jnp.bool_, n, c), array(jnp.int32, axes=())
    rollouts = Rollouts(array(jnp.int32, n, c, shape.slots), cells, cells, cells, numbers, flags)
    decoding = Decoding(rollouts, flags, numbers, Pages(pages, pages), number)
    engine = policy_of_shape(config, placement.mesh, (0,), jnp.dtype(CACHE_DTYPE)).engine(shape.slots)
    engine = dataclasses.replace(engine, sizes=sizes)
    turn = Schedule(room, np.ones((parts, room.n * c), np.int32)).next()
    leg = map_leg(
        turn.leg,
        lambda x: array(x.dtype, *x.shape),
        lambda x: array(x.dtype, *x.shape, axes=()),
    )
    compiled = Engine.advance.lower(engine, params, branches, decoding, leg, sampling=Sampling()).compile()

    def held(*arrays: Any) -> int:
        """Add up the bytes of arrays on a chip."""
        local = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in arrays]
        return sum(int(np.prod(sizes)) * size for sizes, size in local)

    untied = "lm_head" in params  # of the embedding then only a few rows are read
    read = {name: leaf for name, leaf in params.items() if not (untied and name == "embedding")}
    own = array(CACHE_DTYPE, layers, n, heads, c * shape.slots, width, axes=CACHE_AXES)
    work = run_leg(turn, room, np.full((parts, room.n * c), shape.shared), steps=1)
    full = work.blocks * ceil_divide(shape.slots, sizes.slots)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    program = Program(text)
    item = jnp.dtype(CACHE_DTYPE).itemsize
    return CompiledDecoding(
        pages=held(pages, pages),
        temporary=memory.temp_size_in_bytes,
        accessed=program.bytes(runs_of(dataclasses.replace(work, pages=full))),
        necessary=held(*jax.tree.leaves(read), shared, shared, own, own),
        moves=program.moves(held(pages) // item) + program.moves(held(shared) // item),
    )
