"""The programs of the update, compiled for a slice."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.learner.forward import Prefilled
from fr3e_jax.learner.update import Learner, applying
from fr3e_jax.learner.weights import weighs_tokens
from fr3e_jax.planning.setup import Setup, abstract, bytes_on_chip
from fr3e_jax.planning.stages import Stage, StageCompiler, without
from fr3e_jax.planning.workload import Chunk, Workload
from fr3e_jax.types import Batch, Trunks

FORWARD = "log-probabilities"
"""Name of the program of the forward pass before the update, in reports."""


def compile_updates(compiler: StageCompiler, work: Workload) -> Iterator[Stage]:
    """Compile the programs of the update: of its chunks, the one that most tokens run in, and the largest.

    Left out are programs that are not wanted, unless one that is wanted needs their results, and those that
    need the results of one that is too large.
    """
    if not compiler.wants("update"):
        return
    compiler = dataclasses.replace(compiler, setup=compiler.setup.update)
    setup, held = compiler.setup, dict(compiler.always)
    learner, state = setup.learner, setup.state
    sizes = {
        "compute copy": bytes_on_chip(setup.params(setup.dtype)),
        "gradient": bytes_on_chip(setup.params(jnp.float32)),
    }
    beginning, begun = compiler(
        "update",
        "cast and zero gradient",
        lambda: Learner.cast_and_zero_gradient.lower(learner, state.params),
        held=without(held, "parameters"),
        own={"parameters": held["parameters"]},
    )
    yield beginning
    if begun is None:
        return
    compute, gradient = begun
    reference = compute if setup.config.loss.kl_coefficient > 0 else None

    trunks = abstract_trunks(setup, work.widest_trunks)
    opening, opened = compiler(
        "update",
        "prefill trunks",
        lambda: Learner.prefill_and_zero_gradient.lower(learner, compute, trunks),
        held={**held, "gradient": sizes["gradient"]},
        own={"compute copy": sizes["compute copy"]},
    )
    yield opening
    if opened is None:
        return
    caches, cache_gradient = opened
    own = {
        "compute copy": sizes["compute copy"] * (1 if reference is None else 2),
        "gradient": sizes["gradient"],
        "trunk caches": bytes_on_chip((caches, cache_gradient)),
    }
    prefilled = Prefilled(compute, caches)
    prefilled_reference = None if reference is None else Prefilled(reference, caches)
    for chunk in dict.fromkeys((typical_chunk(work), work.widest)):
        if not compiler.wants("update", chunk.name):
            continue
        lower = functools.partial(
            Learner.add_chunk.lower,
            *(learner, gradient, cache_gradient, prefilled, prefilled_reference),
            *(abstract_batch(setup, chunk, weighted=True), abstract((), jnp.float32)),
            window=chunk.window,
        )
        yield compiler("update", chunk.name, lower, held=held, own=own, chunk=chunk)[0]
    if setup.config.loss.mismatch != "none" and compiler.wants("update", FORWARD):
        chunk = typical_chunk(work)
        lower = functools.partial(
            Learner.logprobs.lower, learner, prefilled, abstract_batch(setup, chunk), window=chunk.window
        )
        read = {"compute copy": sizes["compute copy"], "trunk caches": bytes_on_chip(caches)}
        yield compiler("update", FORWARD, lower, held=held, own=read, chunk=chunk)[0]
    if compiler.wants("update", "add trunks"):
        yield compiler(
            "update",
            "add trunks",
            lambda: Learner.add_trunks.lower(learner, gradient, cache_gradient, compute, trunks),
            held={**held, "trunk caches": bytes_on_chip(caches)},
            own={**own, "trunk caches": bytes_on_chip(cache_gradient)},
        )[0]
    if compiler.wants("update", "apply"):
        yield compile_apply(compiler, gradient, sizes["gradient"])


def compile_apply(compiler: StageCompiler, gradient: Any, gradient_bytes: int) -> Stage:
    """Compile the optimizer's step.

    Args:
      gradient: abstract. gradient_bytes: of it on a chip.
    """
    state, held = compiler.setup.state, compiler.always
    leaves, tree = jax.tree.flatten(state)
    apply = applying(compiler.setup.learner.optimizer, tree, tuple(x.sharding for x in leaves))
    return compiler(
        "update",
        "apply",
        lambda: apply.lower(state, gradient, abstract((), jnp.float32)),
        held=without(held, "parameters", "optimizer"),
        own={name: held[name] for name in ("parameters", "optimizer")} | {"gradient": gradient_bytes},
    )[0]


def typical_chunk(work: Workload) -> Chunk:
    """The shape of chunk that most tokens run in."""
    return max(work.chunks, key=lambda chunk: (work.chunks[chunk] * chunk.tokens, chunk.tokens))


def abstract_trunks(setup: Setup, shape: tuple[int, int]) -> Trunks:
    """The trunks of a bundle without arrays. shape: number and width of the trunks of a part."""
    count, width = shape
    return Trunks(setup.rows(jnp.int32, setup.parts, count, width), setup.rows(jnp.int32, setup.parts, count))


def abstract_batch(setup: Setup, chunk: Chunk, weighted: bool = False) -> Batch:
    """The batch rows of a chunk, on all parts, without arrays.

    Args:
      weighted: whether they have the weights that the options of the loss give them.
    """
    rows, loss = chunk.rows * setup.parts, setup.config.loss
    numbers = setup.rows(jnp.int32, rows)
    tokens = setup.rows(jnp.float32, rows, chunk.width + 1)
    return Batch(
        token=setup.rows(jnp.int32, rows, chunk.width + 1),
        length=numbers,
        start=numbers,
        old_logprob=tokens,
        advantage=setup.rows(jnp.float32, rows),
        trunk=numbers,
        prefix=numbers,
        weight=tokens if weighted and weighs_tokens(loss) else None,
        share=setup.rows(jnp.float32, rows) if weighted and loss.aggregate != "token" else None,
    )
