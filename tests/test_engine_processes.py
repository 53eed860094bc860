"""The engine on eight devices, and on those of two processes: the rollouts of one device.

Rows move and blocks wait for memory meanwhile, in every part of the mesh at once, though who runs on differs
by part.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from decoding import ENDS, GRAPH, MAX_NEW, MAX_PROMPT, PARAMS, POLICY, STEP
from jax.experimental.multihost_utils import process_allgather
from moving_rows import SMALL_PAGES, noted, total, with_pages
from support import TINY, mesh_of, two_processes

from fr3e_jax.engine.laid_out import lay_out
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.unfinished import QueryRoom, absorbed, begin
from fr3e_jax.models.decoder import logical_axes
from fr3e_jax.parallel.mesh import place_model, row_parts
from fr3e_jax.types import Queries, States

B, R, M, ANSWERS = 8, 2, 2, 6
KEPT = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [1, 0], [0, 0], [0, 1]], bool)

PROCESS = """
import json, sys
import jax, numpy as np

sizes, out, port, number = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))

from support import mesh_of
from test_engine_processes import rollouts_on
assert len(jax.local_devices()) == 4 and jax.device_count() == 8
np.savez(f"{out}.{number}.npz", **rollouts_on(mesh_of(*json.loads(sizes))))
"""


def queries():
    rng = np.random.default_rng(1)
    length = np.array([5, 8, 1, 3, 8, 2, 7, 4], np.int32)
    token = rng.integers(0, TINY.vocab_size, (B, MAX_PROMPT))
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0).astype(np.int32)
    return Queries(token, length, np.arange(30, 30 + B, dtype=np.int32))


def states_of(query, trajectory, real, base):
    """Of kept trajectories, laid out on the mesh.

    In the first half of the queries only states near the limit are valid, so that the branches in the first
    parts of the mesh, one process's, stop long before those of the others, which start from the root too.
    """
    length = base.length[query, trajectory]
    early = (query < B // 2)[:, None]
    prefix_length = np.stack([length - 1, length - 2, np.where(early[:, 0], length - 3, 0)], axis=1).clip(0)
    valid = real[:, None] & (~early | (prefix_length >= MAX_NEW - 4))
    return States(query, trajectory, base.token[query, trajectory], prefix_length, valid)


def rollouts_on(mesh):
    """What the engine generates on a mesh, on the host: {name: array}."""

    def host(tree):
        return jax.tree.map(lambda x: np.asarray(process_allgather(x, tiled=True)), tree)

    axes = logical_axes(TINY)
    _, placement = place_model(mesh, axes, PARAMS)
    engine = Engine(GRAPH, placement, MAX_NEW, ENDS, sizes=SMALL_PAGES)
    params = jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        PARAMS,
        placement.shardings(axes, PARAMS),
    )
    q, draws = placement.place_rows(queries()), (jax.random.key(7), STEP)
    with noted() as done:
        answering = with_pages(engine, (B, ANSWERS), MAX_PROMPT, 1)
        answers, _ = answering.sample(params, q, *draws, ANSWERS, POLICY)
        base, _ = engine.sample(params, q, *draws, R, POLICY)
        answers, base = host((answers, base))
        query, trajectory, real = engine.arrange(KEPT)
        states = states_of(query, trajectory, real, base)
        how = {"seed_key": draws[0], "step": STEP, "rollouts": M, "sampling": POLICY, "after": R}
        partial, row_steps = engine.explore(params, q, placement.place_rows(states), **how)
        partial, row_steps = host((partial, row_steps))
    assert not partial.length[~real].any()
    late, stops = left_and_gone_on(engine, params, host)
    where = {(q, t): n for n, (q, t) in enumerate(zip(query, trajectory, strict=True)) if real[n]}
    partial = jax.tree.map(lambda x: x[[where[kept] for kept in map(tuple, np.argwhere(KEPT))]], partial)
    rollouts = {"answers": answers, "base": base, "partial": partial, "late": late}
    return {
        **{
            f"{what}.{name}": x for what, of in rollouts.items() for name, x in dataclasses.asdict(of).items()
        },
        "row_steps": row_steps,
        "done": np.array(total(done)),
        "stops": np.array(stops),
    }


def left_and_gone_on(engine, params, host):
    """Base trajectories that are left in the middle, and go on, until all have ended; how many were left."""
    unfinished, left = begin(queries(), STEP, QueryRoom(R, 1, 1, 1, MAX_NEW)), []
    parts = row_parts(engine.placement.mesh)
    while not unfinished.base.ended.all():
        placed = lay_out(unfinished, R, R, [2 * B // parts], parts)
        drawn, running, _ = engine.go_on(
            params,
            *engine.placement.place_rows((placed.queries, placed.starts)),
            seed_key=jax.random.key(7),
            sampling=POLICY,
            may_run=int((~unfinished.base.ended).sum()) // 2,
        )
        unfinished = absorbed(unfinished, placed.place, *host((drawn, running)), STEP)
        left.append(unfinished.in_the_middle)
    return unfinished.base.rollouts, left[:1]


@functools.cache
def on_one_device():
    return rollouts_on(mesh_of(1, 1, 1))


def check_equal(found):
    """To the rollouts of one device; and rows did move, and blocks were set aside and taken up."""
    alone = on_one_device()
    for name in alone.keys() - {"row_steps", "done", "stops"}:
        if alone[name].dtype == np.float32:
            np.testing.assert_allclose(found[name], alone[name], atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], alone[name], err_msg=name)
    for name in ("token", "length", "stopped"):  # as if they had not been left
        np.testing.assert_array_equal(found[f"late.{name}"], found[f"base.{name}"], err_msg=name)
    assert found["done"].min() > 0 and found["stops"].min() > 0


@pytest.mark.slow
def test_what_is_compared_ends_at_very_different_times():
    """Most branches of the first queries, which are the first process's, at once; others at the limit."""
    length = on_one_device()["partial.length"]
    assert 0 < length[:8].max() <= 4
    assert length[8:].max() == MAX_NEW
    assert len(set(on_one_device()["answers.length"].reshape(-1))) > 10


@pytest.mark.parametrize("sizes", [(1, 2, 4), pytest.param((4, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_rollouts_do_not_depend_on_the_mesh(sizes):
    """Of which (1, 2, 4) splits the vocabulary, and holds key-value heads on every device."""
    check_equal(rollouts_on(mesh_of(*sizes)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)], ids=str)
def test_two_processes_take_the_same_decisions_and_end_together(sizes, tmp_path):
    two_processes(PROCESS, list(sizes), tmp_path / "found")
    first, second = (dict(np.load(tmp_path / f"found.{number}.npz")) for number in range(2))
    check_equal(first)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
