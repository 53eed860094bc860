"""The choice of `mesh.update_tensor` where a run leaves it open, by the estimate of its step.

The more parts `tensor` has, the less memory a chip needs for activations and the more it waits for others. So
sampling, which holds whole weights, may need another number of parts than updates do.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from fr3e_jax.config import Config
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import update_tensors
from fr3e_jax.planning.estimate import estimate_step
from fr3e_jax.planning.fit import RESERVE
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.slices import CHIPS, Slice
from fr3e_jax.planning.stages import Stage
from fr3e_jax.planning.times import Rates, phases_of
from fr3e_jax.planning.workload import Assumptions

EXCESS = 1.12
"""How many times its estimate a compiled program needs at most, in all but one of the shipped plans."""
GAIN = 0.95
"""A layout is taken if an update takes less than this share of the time that it takes in that of sampling."""


def chosen_by_estimate(config: Config, model: DecoderConfig, hosts: Hosts) -> int | None:
    """Choose `mesh.update_tensor` for the chips that a run is on; all processes get the choice of the first.

    Args:
      config: resolved, and checked for the mesh.
      model: the model's architecture.
      hosts: all processes, with the mesh of sampling.

    Returns:
      The size; None, for the layout of sampling, where the chips are not known.
    """
    tpu = slice_of(hosts.mesh.devices.flat)
    if tpu is None:
        return None
    return hosts.of_first(fastest_fitting(config, model, hosts.mesh, tpu), "the layout of updates is chosen")


def slice_of(devices: Iterable[Any]) -> Slice | None:
    """Find the slice that devices form by their kind and coordinates; None where they are not a known one."""
    members = list(devices)
    kinds = {chip.kind: generation for generation, chip in CHIPS.items()}
    generation = kinds.get(members[0].device_kind)
    if generation is None:
        return None
    places = zip(*(device.coords for device in members), strict=True)
    extent = [max(place) - min(place) + 1 for place in places]
    if math.prod(extent) != len(members):
        return None
    return Slice(generation, generation, tuple(extent[: CHIPS[generation].dimensions]))


def fastest_fitting(config: Config, model: DecoderConfig, mesh: Mesh, tpu: Slice) -> int:
    """Choose the size of `tensor` in updates: the fastest that surely fits, the smallest of equally fast.

    Sizes above that of sampling are not tried. That of sampling stays where no other fits and is faster.

    Args:
      config: resolved.
      model: the model's architecture.
      mesh: of sampling.
      tpu: the slice.
    """
    usual = mesh.shape["tensor"]
    setup = with_update_tensor(Setup(config, model, mesh), usual)
    smaller = [tensor for tensor in update_tensors(mesh, setup.axes, setup.shapes) if tensor < usual]
    if not smaller:
        return usual
    seconds, _ = update_needs(setup, tpu)
    best = (GAIN * seconds, usual)
    for tensor in smaller:
        seconds, largest = update_needs(with_update_tensor(setup, tensor), tpu)
        if EXCESS * largest <= tpu.chip.usable - RESERVE:
            best = min(best, (seconds, tensor))
    return best[1]


def with_update_tensor(setup: Setup, tensor: int) -> Setup:
    """Give a run another `mesh.update_tensor`."""
    mesh = dataclasses.replace(setup.config.mesh, update_tensor=tensor)
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, mesh=mesh))


def update_needs(setup: Setup, tpu: Slice) -> tuple[float, float]:
    """Estimate what the layout of updates decides on.

    What cannot be known before a run is as `Assumptions` has it by default.

    Returns:
      (seconds of the updates of a step, most bytes of a chip during them and the copy for sampling).
    """
    assumptions = Assumptions()
    work = setup.work(assumptions)
    stages: Sequence[Stage] = estimate_step(setup, work)
    update = phases_of(setup, work, stages, Rates(tpu, setup.mesh, assumptions))[-1]
    largest = max(stage.total for stage in stages if stage.phase in ("reshard", "update"))
    return update.seconds.total, float(largest)
