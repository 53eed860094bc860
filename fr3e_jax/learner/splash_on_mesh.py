"""The splash kernel on a mesh."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from fr3e_jax.models.attention import Attend, Prefix
from fr3e_jax.models.splash import splash_sequence
from fr3e_jax.parallel.mesh import Placement


def make_splash(placement: Placement, interpret: bool = False) -> Attend:
    """Make `splash_sequence` for a mesh: each device attends with its own heads.

    XLA cannot split a kernel. So `jax.shard_map` splits the heads here, for one sequence, as `placement`
    does. The caller's `jax.vmap` splits the rows: its `spmd_axis_name` names the mesh axes of what it maps,
    and without a name the rows stay within a device.

    Args:
      placement: `kv_heads` may be held by every device while `heads` are split.
      interpret: run the kernel as ordinary operations, which any backend can.

    Returns:
      An `Attend`, differentiable once. The number of heads must divide by the parts that `placement` splits
      them into, which `place_model` checks; else jax raises ValueError.
    """
    heads, kv_heads = placement.table["heads"], placement.table["kv_heads"]
    copied = heads != kv_heads
    query_spec = PartitionSpec(None, heads, None)
    own_spec, prefix_spec = PartitionSpec(kv_heads, None, None), PartitionSpec(None, kv_heads, None, None)
    everywhere = PartitionSpec()

    def local(
        query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None, group: Array
    ) -> Array:
        if copied:
            key, value = key[group], value[group]
            if prefix is not None:
                prefix = prefix._replace(key=prefix.key[:, group], value=prefix.value[:, group])
        return splash_sequence(query, key, value, real, prefix, interpret)

    def attend(query: Array, key: Array, value: Array, real: Array, prefix: Prefix | None) -> Array:
        group = jnp.arange(query.shape[1]) // (query.shape[1] // key.shape[0])
        before = None if prefix is None else Prefix(prefix_spec, prefix_spec, everywhere, everywhere)
        return jax.shard_map(
            local,
            mesh=placement.mesh,
            in_specs=(query_spec, own_spec, own_spec, everywhere, before, PartitionSpec(heads)),
            out_specs=query_spec,
            # A kernel does not say over which mesh axes its results differ.
            check_vma=False,
        )(query, key, value, real, prefix, group)

    return attend
