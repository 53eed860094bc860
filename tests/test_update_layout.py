"""Updates in another layout than sampling: the same devices and numbers, chosen by what fits and is fast."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support import TINY, mesh_of, placement, tiny_params

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, dump, resolve
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import init_state, make_optimizer, sampling_cast
from fr3e_jax.models.decoder import logical_axes
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import MESH_AXES, PlacementError, place_model, update_mesh
from fr3e_jax.plan import PLANS, model_of
from fr3e_jax.planning import update_layout
from fr3e_jax.planning.fit import RESERVE
from fr3e_jax.planning.make import Question, estimated_plan
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.slices import find_slice
from fr3e_jax.planning.topology import positions_in, run_mesh
from fr3e_jax.planning.update_layout import (
    EXCESS,
    GAIN,
    chosen_by_estimate,
    fastest_fitting,
    slice_of,
    update_needs,
    with_update_tensor,
)
from fr3e_jax.planning.workload import Assumptions
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.resume import resume
from fr3e_jax.run.saved import Progress

AXES = logical_axes(TINY)


@pytest.mark.parametrize(
    ("sizes", "tensor", "expected"),
    [
        ((1, 2, 4), 1, (1, 8, 1)),
        ((2, 2, 2), 4, (2, 1, 4)),
        ((1, 8, 1), 2, (1, 4, 2)),
        ((1, 2, 4), None, (1, 2, 4)),
    ],
)
def test_updates_have_the_devices_of_sampling_in_the_same_order(sizes, tensor, expected):
    sampling = mesh_of(*sizes)
    mesh = update_mesh(sampling, tensor)
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == MESH_AXES
    assert mesh.devices.flatten().tolist() == sampling.devices.flatten().tolist()


@pytest.mark.parametrize("tensor", [3, 8])
def test_a_layout_of_updates_that_cannot_be_is_refused_with_those_that_can(tensor):
    """3 does not divide 8 devices, and 8 parts do not divide 4 heads."""
    with pytest.raises(PlacementError, match=rf"--mesh.update_tensor {tensor} .*: 1, 2, 4$"):
        place_model(mesh_of(1, 2, 4), AXES, tiny_params(), tensor)


@pytest.mark.parametrize(("sizes", "tensor"), [((1, 2, 4), 1), ((1, 2, 4), 2), ((2, 2, 2), 4)])
def test_the_copy_for_sampling_is_the_same_from_any_layout_and_no_device_holds_a_weight_whole(sizes, tensor):
    params = tiny_params()
    training, sampling = place_model(mesh_of(*sizes), AXES, params, tensor)
    assert training.mesh.shape["tensor"] == tensor
    placed = jax.device_put(params, training.shardings(AXES, params))
    cast = sampling_cast(sampling, AXES, params, jnp.bfloat16)
    copy = cast(placed)
    for ours, theirs, at in zip(
        *map(jax.tree.leaves, (copy, params, sampling.shardings(AXES, params))), strict=True
    ):
        assert ours.sharding == at
        np.testing.assert_array_equal(ours, jnp.asarray(theirs, jnp.bfloat16))
    text = cast.lower(placed).compile().as_text()
    layers, hidden, mlp = TINY.num_hidden_layers, TINY.hidden_size, TINY.intermediate_size
    assert re.search(rf"\[{layers},{hidden},{mlp // sizes[2]}\]", text)
    assert not re.search(rf"\[{layers},({hidden},{mlp}|{mlp},{hidden})\]", text)


def asked(name):
    """The question of a shipped preset on its slice."""
    config, _ = parse(Config, "plan", f"configs/slices/{name}.yaml", [])
    return Question(name, config, model_of(config.model.path), PLANS[name], Assumptions())


@functools.cache
def setup_of(name):
    """(the run of a preset on the mesh of its slice, updates in the layout of sampling, and the slice)."""
    question = asked(name)
    tpu = find_slice(question.topology)
    mesh = run_mesh(tpu, question.config.mesh, positions_in(tpu))
    return Setup(resolve(question.config), question.model, mesh), tpu


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen2.5_7b_v5e16", 2),
        pytest.param("qwen2.5_32b_v5p128", 4, marks=pytest.mark.slow),
    ],
)
def test_the_layout_that_a_plan_takes_fits_surely_and_is_not_slower(name, tensor):
    setup, tpu = setup_of(name)
    usual, _ = update_needs(setup, tpu)
    plan = estimated_plan(asked(name), tpu)
    assert plan.setup.config.mesh.update_tensor == tensor == plan.setup.update.mesh.shape["tensor"]
    assert plan.setup.mesh == setup.mesh
    seconds = plan.phases[-1].seconds.total
    largest = max(stage.total for stage in plan.stages if stage.phase in ("reshard", "update"))
    if tensor == setup.mesh.shape["tensor"]:
        assert seconds == usual
    else:
        assert seconds < GAIN * usual
        assert EXCESS * largest <= tpu.chip.usable - RESERVE


def test_the_choice_is_the_fastest_that_fits_and_that_of_sampling_without_one(monkeypatch):
    setup, tpu = setup_of("qwen2.5_7b_v5e16")
    free = (tpu.chip.usable - RESERVE) / EXCESS

    def chosen(fastest, other, usual=10.0):
        """Of the needs of tensor 1 and 2, where those of 4 are more than there is."""
        known = {1: fastest, 2: other, 4: (usual, 9 * free)}
        monkeypatch.setattr(
            update_layout, "update_needs", lambda setup, _: known[setup.update.mesh.shape["tensor"]]
        )
        return fastest_fitting(setup.config, setup.model, setup.mesh, tpu)

    assert chosen((7.0, free), (8.0, free)) == 1
    assert chosen((8.0, free), (8.0, free)) == 1
    assert chosen((7.0, free + 1), (8.0, free)) == 2
    assert chosen((9.6, free), (9.6, free)) == 4  # they gain less than a twentieth
    assert chosen((7.0, free + 1), (8.0, free + 1)) == 4


@pytest.mark.parametrize("name", ["v5e-16", "v5p-128", "v6e-8"])
def test_a_slice_is_recognised_by_its_chips(name):
    tpu = find_slice(name)
    found = slice_of(positions_in(tpu))
    assert (found.generation, found.shape, found.rings) == (tpu.generation, tpu.shape, tpu.rings)


def test_devices_that_are_no_known_tpus_update_in_the_layout_of_sampling():
    hosts = Hosts(mesh_of(1, 2, 4), 60)
    assert chosen_by_estimate(Config(), PRESETS["qwen2.5-7b"].config, hosts) is None
    assert slice_of(positions_in(find_slice("v5e-16"))[:-1]) is None  # nor those of a part of a slice
    assert slice_of([dataclasses.replace(positions_in(find_slice("v5e-4"))[0], device_kind="TPU v9")]) is None


def test_with_update_tensor_only_the_layout_of_updates_changes():
    setup, _ = setup_of("qwen2.5_7b_v5e16")
    other = with_update_tensor(setup, 1)
    assert (other.parts, other.update.parts, other.update.update.parts) == (4, 16, 16)
    assert setup.update is setup
    work, usual = (one.work(Assumptions()) for one in (other, setup))
    assert (work.rounds, work.tokens) == (usual.rounds, usual.tokens)
    assert sum(work.chunks.values()) < sum(usual.chunks.values())


def test_a_run_goes_on_in_another_layout_of_updates_and_tells_of_it(tmp_path):
    """And does not where only sampling is laid out otherwise than the parameters of a checkpoint."""
    run, hosts, config = epath.Path(tmp_path), Hosts(mesh_of(1, 2, 4), 60), Config()
    progress, carried = Progress(seed=config.seed), groups.empty_groups(2, 3, 5)
    optimizer = make_optimizer(config.optimizer, AXES)

    def state(*sizes):
        return init_state(placement(*sizes), optimizer, AXES, tiny_params())

    writer = Checkpoints(run, keep=1, settings=dump(config))
    writer.save(state(1, 4, 2), carried, dataclasses.replace(progress, step=1))
    writer.close()
    fresh = ((state(*sizes), carried, progress) for sizes in ((1, 4, 2), (1, 8, 1)))
    same, other = (resume(run, config, each, hosts, None) for each in fresh)
    assert same.messages == []
    told = "mesh: {data: 1, fsdp: 4, tensor: 2} -> {data: 1, fsdp: 8, tensor: 1}"
    assert other.messages == [f"settings changed since the checkpoint: {told}"]
    for ours, theirs in zip(*map(jax.tree.leaves, (other.state, same.state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dict(other.state.params["embedding"].sharding.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
