"""The programs of the update compiled for TPUs. No TPU is needed: libtpu compiles for any slice."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import DecoderConfig, abstract_params, logical_axes
from fr3e_jax.parallel.mesh import row_parts
from fr3e_jax.planning.topology import slice_mesh
from fr3e_jax.run.build import policy_of_shape
from fr3e_jax.types import Batch, Trunks


@dataclasses.dataclass(frozen=True)
class UpdateShape:
    """Sizes of the programs of a bundle to compile, and the slice that they are for.

    topology: as jax names it, such as `v5p:2x2x1`. mesh: data, fsdp, tensor; its product is the chips that
    are used. trunks: on each part. trunk: tokens of each. rows: of a chunk on each part. length: tokens of
    each row. window: tokens of the trunks that the rows see.
    """

    topology: str
    mesh: tuple[int, int, int]
    trunks: int
    trunk: int
    rows: int
    length: int
    window: int


@functools.cache
def compile_update(config: DecoderConfig, shape: UpdateShape) -> dict[str, Any]:
    """Compile the programs that compute the gradient of a bundle, in bfloat16 with the splash kernel.

    Returns:
      Compiled programs by name: `prefill` and `add_trunks` run once a bundle, `add_chunk` once a chunk. None
      of them depends on the number of chunks.
    """
    axes, shapes = logical_axes(config), abstract_params(config)
    mesh = slice_mesh(shape.topology, shape.mesh)
    policy = policy_of_shape(config, mesh, (), jnp.dtype(jnp.bfloat16))
    learner = policy.learner(LossConfig(), OptimizerConfig(remat=True), on_tpu=True)
    placement, parts = policy.model.training, row_parts(mesh)

    def array(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placement.sharding("batch"))

    def params(dtype: Any) -> Any:
        at = placement.shardings(axes, shapes)
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, dtype, sharding=to), shapes, at)

    compute, gradient = params(jnp.bfloat16), params(jnp.float32)
    trunks = Trunks(array(jnp.int32, parts, shape.trunks, shape.trunk), array(jnp.int32, parts, shape.trunks))
    opened = Learner.prefill_and_zero_gradient.lower(learner, compute, trunks)
    programs = {"prefill": opened.compile()}
    caches, cache_gradient = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
        opened.out_info,
        programs["prefill"].output_shardings,
    )
    rows = shape.rows * parts
    tokens, numbers = (rows, shape.length + 1), array(jnp.int32, rows)
    chunk = Batch(
        token=array(jnp.int32, *tokens),
        length=numbers,
        start=numbers,
        old_logprob=array(jnp.float32, *tokens),
        advantage=array(jnp.float32, rows),
        trunk=numbers,
        prefix=numbers,
    )
    denominator = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (learner, gradient, cache_gradient, Prefilled(compute, caches), None, chunk, denominator)
    programs["add_chunk"] = Learner.add_chunk.lower(*arguments, window=shape.window).compile()
    programs["add_trunks"] = Learner.add_trunks.lower(
        learner, gradient, cache_gradient, compute, trunks
    ).compile()
    return programs
