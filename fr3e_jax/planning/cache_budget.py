"""How many bytes of a device the KV caches of a run may take, planned or begun."""

from typing import Any

from fr3e_jax.config import Config
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.memory import device_memory, share_of_host
from fr3e_jax.planning.fit import RESERVE
from fr3e_jax.planning.model_sizes import ModelSizes
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.stages import state_bytes
from fr3e_jax.planning.update_layout import slice_of
from fr3e_jax.planning.workload import Assumptions, kept_trajectories
from fr3e_jax.run.build import given_bytes
from fr3e_jax.run.queries import continued_shape, least_cache, most_kept, query_room, round_sizes

XLA_SHARE = 0.05  # of a chip, for what XLA needs beside the arrays that are counted
SHARED_UNIT = 2**20  # processes share the number in this unit


def cache_bytes_here(config: Config, model: DecoderConfig, hosts: Hosts) -> int | None:
    """Find the most bytes of a device that the KV caches of a decoding take, on the devices that a run is on.

    Args:
      config: resolved, and checked for the mesh; with mesh.update_tensor.
      model: the model's architecture.
      hosts: all processes, which get the number of the first, with the mesh of sampling.

    Returns:
      The bytes; None, for any number, where the memory of the devices is not known.
    """
    if (given := given_bytes(config)) is not None:
        return given
    devices = hosts.mesh.devices.flat
    if devices[0].platform == "cpu":
        known, found = True, share_of_host()
    else:
        tpu = slice_of(devices)
        usable = tpu.chip.usable if tpu is not None else device_memory()
        known = usable > 0
        found = cache_bytes_of(Setup(config, model, hosts.mesh), usable) if known else 0
    # 0 says that it is not known, 1 that nothing is left.
    number = int(found) // SHARED_UNIT + 1 if known else 0
    shared = hosts.of_first(number, "the memory of KV caches is found")
    return (shared - 1) * SHARED_UNIT if shared else None


def cache_bytes_of(setup: Setup, usable: float) -> int:
    """Most bytes of a chip that the KV caches of a decoding take, shared and own.

    With `rollout.cache_gb` of `auto` that is what the state of training, the copy for sampling, the
    rollouts and the temporaries of decoding leave.

    Args:
      usable: bytes of a chip that XLA gives to programs.
    """
    if (given := given_bytes(setup.config)) is not None:
        return given
    sizes, waits = ModelSizes(setup), setup.config.rollout.wait_for == 1
    left = usable * (1 - XLA_SHARE) - RESERVE
    left -= sum(state_bytes(setup).values()) + sizes.sampling_copy
    # The prefill of the queries may need their caches twice.
    left -= sizes.query_cache if waits else 0
    # Without waiting there is memory for all branches that may come to be, in the largest round that fits.
    possible = (setup.queries,) if waits else round_sizes(setup.config.rollout, setup.parts)[::-1]
    for queries in possible:
        found = max(int(left - beside_caches(sizes, queries // setup.parts)), 0)
        if waits or caches_fit(setup, found, queries):
            break
    return found


def beside_caches(sizes: ModelSizes, queries: int) -> float:
    """Bytes of a chip that the rollouts and the logits of a decoding take.

    Args:
      queries: of a round, of a part.
    """
    engine, branches = sizes.setup.engine, most_branches(sizes.setup.config, queries)
    rows = max(engine.sizes.spans_of(engine.sizes.blocks(branches))) * engine.sizes.rows
    return sizes.rollouts(branches) + 2 * sizes.logits(rows)


def most_branches(config: Config, queries: int) -> int:
    """Most branches of a part that a decoding has room for.

    Args:
      queries: of a round, of a part.
    """
    explore = config.explore
    if config.rollout.wait_for < 1:
        return continued_shape(config, queries).rows * query_room(config).branches
    if not explore.positions:
        return queries * explore.rollouts
    _, kept = kept_trajectories(config, queries, Assumptions(kept=float(most_kept(config))))
    return max(queries * config.rollout.base_trajectories, kept * (explore.positions + 1) * explore.rollouts)


def caches_fit(setup: Setup, cache_bytes: int, queries: int) -> bool:
    """Whether every branch of a round of so many queries can be decoded to the limit."""
    model: Any = setup.model
    return least_cache(setup.config, setup.engine, model, queries) <= cache_bytes
