"""The programs of a step, compiled for a slice, and what each needs on one chip."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fr3e_jax.config import Config, updates_of
from fr3e_jax.engine import seats as seating
from fr3e_jax.engine.caches import Caches
from fr3e_jax.engine.rollout import Engine, root_branches
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.make import learner_of
from fr3e_jax.learner.state import TrainState, sampling_cast, state_shardings
from fr3e_jax.learner.update import Learner, Prefilled, applying
from fr3e_jax.models.decoder import DecoderConfig, abstract_params, graph_of, logical_axes
from fr3e_jax.parallel.mesh import MESH_AXES, place_model, row_parts
from fr3e_jax.planning.hlo import Instruction, Program
from fr3e_jax.planning.workload import Chunk, Decode, Leg, Work
from fr3e_jax.types import Batch, Queries, States, Trunks

END_TOKENS = (0, 1)
"""Any two tokens: which ones they are does not change a program."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a run of a program, or of a part of it, on one chip.

    flops: of matrix products, those of kernels included. bytes: read and written in main memory. wire: bytes
    that a chip receives, by kind of collective and the mesh axes that it goes over. calls: collectives.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wire: Mapping[tuple[str, tuple[str, ...]], float] = dataclasses.field(default_factory=dict)
    calls: float = 0.0

    def __add__(self, other: "Costs") -> "Costs":
        wire = {k: self.wire.get(k, 0.0) + other.wire.get(k, 0.0) for k in {**self.wire, **other.wire}}
        return Costs(self.flops + other.flops, self.bytes + other.bytes, wire, self.calls + other.calls)

    def times(self, factor: float) -> "Costs":
        """So often."""
        wire = {k: factor * v for k, v in self.wire.items()}
        return Costs(factor * self.flops, factor * self.bytes, wire, factor * self.calls)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program. Bytes are of one chip, as XLA laid it out.

    arguments, results: bytes. aliased: of the results that take the place of arguments. temporary: bytes
    beside them, code included. once, each: costs of a run, and of each round of its loop over tokens, if it
    has one. seconds: that compiling took. short: what XLA said if the program alone is too large; then
    results and costs are not known, and `temporary` is all that it asked for beside the arguments.
    """

    name: str
    arguments: int
    results: int
    aliased: int
    temporary: int
    once: Costs
    each: Costs
    seconds: float
    short: str | None = None

    @property
    def peak(self) -> int:
        """Bytes while it runs."""
        return self.arguments + self.results - self.aliased + self.temporary


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def held_by(tree: Any) -> int:
    """Bytes of arrays on one chip."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        local = x.shape if sharding is None else sharding.shard_shape(x.shape)
        size = 16 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += int(np.prod(local, dtype=float)) * size
    return total


def attention_flops(kernel: Instruction) -> float:
    """Of a call of the splash kernel, from its name and the shapes that it is given.

    A block of scores on the diagonal is computed whole. Forward has two matrix products a block, the gradient
    of queries three, that of keys and values four.
    """
    told = re.search(
        r"operand_layout_constraints=\{(.*?)\}, (?:custom_call|metadata|frontend|backend)", kernel.line
    )
    sizes = [
        tuple(map(int, found.split(",")))
        for found in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", told[1] if told else "")
    ]
    arrays = [x for x in sizes if len(x) >= 3]
    if "splash" not in kernel.name or len(arrays) < 2:
        return 0.0
    query, key = arrays[0], arrays[1]
    products = 4 if "dkv" in kernel.name else 3 if "_dq" in kernel.name else 2
    length, slots, width = query[-2], key[-2], query[-1]
    pairs = length * (slots - length) + length * (length + min(512, length)) / 2
    return 2.0 * products * float(np.prod(query[:-2])) * pairs * width


def needed_bytes(message: str) -> int | None:
    """What XLA asked for, from its message about too large a program, bytes; None where it does not say."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\)? exceeds available", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message
    )
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def costs_of(text: str, mesh: Mesh, steps: float) -> Costs:
    """Of a compiled program whose loop over tokens, if it has one, runs so many times."""
    program, trips = Program(text), (steps,)
    wire: dict[tuple[str, tuple[str, ...]], float] = {}
    calls = 0.0
    for found in program.collectives(trips):
        axes = axes_of(found.group, mesh)
        if received := found.received(mesh.size):
            wire[found.kind, axes] = wire.get((found.kind, axes), 0.0) + received
            calls += found.times
    kernels = sum(times * attention_flops(kernel) for times, kernel in program.kernels(trips))
    return Costs(program.flops(trips) + kernels, float(program.bytes(trips)), wire, calls)


def axes_of(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that a group of chips, numbered in the mesh's order, extends over."""
    sizes = tuple(mesh.shape[name] for name in MESH_AXES)
    if not group:
        return tuple(name for name in MESH_AXES if mesh.shape[name] > 1)
    places = np.array(np.unravel_index(np.array(group), sizes))
    return tuple(name for name, place in zip(MESH_AXES, places, strict=True) if len(set(place.tolist())) > 1)


def compile_program(name: str, lowered: Any, mesh: Mesh) -> tuple[Compiled, Any]:
    """Compile, and read what it costs.

    Returns:
      (the program, its results as abstract arrays where they will lie, None where it is too large).
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        asked = needed_bytes(message) or 0
        told = Compiled(name, 0, 0, 0, asked, Costs(), Costs(), time.perf_counter() - started, message)
        return told, None
    seconds, text, memory = time.perf_counter() - started, compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    once = costs_of(text, mesh, 0)
    each = costs_of(text, mesh, 1) + once.times(-1)
    results = jax.tree.map(
        lambda x, at: abstract(x.shape, x.dtype, at), lowered.out_info, compiled.output_shardings
    )
    told = Compiled(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        once,
        each,
        seconds,
    )
    return told, results


@dataclasses.dataclass(frozen=True)
class Stage:
    """A program in its place in the step.

    phase: of the step. held: bytes on a chip that are alive and not given to it, by name. own: bytes of what
    it is given, by name. leg, chunk: what it is compiled for, if it decodes, or runs rows of the update.
    """

    phase: str
    program: Compiled
    held: Mapping[str, int]
    own: Mapping[str, int]
    leg: Leg | None = None
    chunk: Chunk | None = None

    @property
    def total(self) -> int:
        """Bytes on a chip while it runs. What it is given and does not read is alive too."""
        unread = max(sum(self.own.values()) - self.program.arguments, 0)
        return self.program.peak + unread + sum(self.held.values())


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run on a mesh, without arrays. `config` is resolved."""

    config: Config
    model: DecoderConfig
    mesh: Mesh

    @functools.cached_property
    def axes(self) -> Any:
        """Logical axes of the parameters."""
        return logical_axes(self.model)

    @functools.cached_property
    def shapes(self) -> Any:
        """The parameters."""
        return abstract_params(self.model)

    @functools.cached_property
    def placements(self) -> Any:
        """(Training, sampling)."""
        return place_model(self.mesh, self.axes, self.shapes)

    @functools.cached_property
    def dtype(self) -> Any:
        """Of matrix products."""
        return jnp.dtype(self.config.model.compute_dtype)

    @functools.cached_property
    def parts(self) -> int:
        """Row parts of the mesh."""
        return row_parts(self.mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        """As training makes it."""
        return Engine(graph_of(self.model), self.placements[1], self.config.rollout.max_response, END_TOKENS)

    @functools.cached_property
    def learner(self) -> Learner:
        """As training makes it on a TPU."""
        training, _ = self.placements
        settings = (self.config.loss, self.config.optimizer, self.dtype, updates_of(self.config))
        return learner_of(graph_of(self.model), training, self.axes, *settings, on_tpu=True)

    @functools.cached_property
    def state(self) -> TrainState:
        """Parameters and moments."""
        at = state_shardings(self.placements[0], self.learner.optimizer, self.axes, self.shapes)
        moments = jax.eval_shape(self.learner.optimizer.init, self.shapes)
        place = functools.partial(jax.tree.map, lambda x, to: abstract(x.shape, x.dtype, to))
        return TrainState(place(self.shapes, at.params), place(moments, at.optimizer))

    def params(self, dtype: Any, sampling: bool = False) -> Any:
        """The parameters in a type, placed for training or sampling."""
        at = self.placements[sampling].shardings(self.axes, self.shapes)
        return jax.tree.map(lambda x, to: abstract(x.shape, dtype, to), self.shapes, at)

    def rows(self, dtype: Any, *sizes: int) -> Any:
        """An array whose first axis is split as rows are."""
        return abstract(sizes, dtype, self.placements[0].sharding("batch"))


def compile_step(setup: Setup, work: Work, say: Callable[[str], None]) -> Iterator[Stage]:
    """Compile the programs of a step, in its order. Those that need the results of one that is too large are
    left out.

    Args:
      say: told the name of each before it is compiled.
    """
    state, copy = setup.state, setup.params(setup.dtype, sampling=True)
    params, moments = held_by(state.params), held_by(state.optimizer)
    always = {"parameters": params, "optimizer": moments}
    reference = setup.params(jnp.float32) if setup.config.loss.kl_coefficient > 0 else None
    if reference is not None:
        always["reference"] = held_by(reference)

    def stage(
        phase: str, name: str, lower: Callable[[], Any], held: Mapping[str, int], own: Mapping[str, int]
    ) -> tuple[Stage, Any]:
        say(name)
        program, results = compile_program(name, lower(), setup.mesh)
        if program.short is not None:
            given = sum(own.values())
            rest = max(program.temporary - given, 0)
            program = dataclasses.replace(program, arguments=given, temporary=rest)
        return Stage(phase, program, held, own), results

    cast: Any = sampling_cast(setup.placements[1], setup.axes, setup.shapes, setup.dtype)
    found, _ = stage(
        "reshard",
        "cast",
        lambda: cast.lower(state.params),
        without(always, "parameters"),
        {"parameters": params},
    )
    yield found
    yield from compile_rollouts(setup, work, stage, always, copy)
    yield from compile_updates(setup, work, stage, always, reference)


def without(tree: Mapping[str, int], *names: str) -> dict[str, int]:
    """All but some."""
    return {name: size for name, size in tree.items() if name not in names}


def cache_bytes(setup: Setup, leg: Leg) -> int:
    """Of a branch cache that a chip reads for a token of every row: the slots that are there."""
    heads = setup.model.num_key_value_heads
    split = setup.mesh.shape["tensor"] if heads >= setup.mesh.shape["tensor"] else 1
    each = 2 * setup.model.num_hidden_layers * heads // split * setup.model.head_dim * setup.dtype.itemsize
    return each * leg.rows * min(leg.slots, setup.config.rollout.max_response)


def compile_rollouts(
    setup: Setup, work: Work, stage: Any, always: Mapping[str, int], copy: Any
) -> Iterator[Stage]:
    """First return and exploration."""
    config, engine = setup.config, setup.engine
    rollout, weights = config.rollout, held_by(copy)
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p)
    seed = jax.eval_shape(lambda: jax.random.key(0))
    numbers = setup.rows(jnp.int32, rollout.queries)
    queries = Queries(setup.rows(jnp.int32, rollout.queries, rollout.max_prompt), numbers, numbers)
    count = work.first_return.lengths.shape[2]
    branches_of = jax.eval_shape(lambda queries: root_branches(queries, count), queries)

    def decode(
        phase: str, name: str, decoding: Any, branches: Any, plan: Decode, leg: Leg, held: Any
    ) -> Stage:
        size = leg.before * leg.before_slots
        own = decoding.own
        cache = abstract((*own.key.shape[:3], size, own.key.shape[4]), own.key.dtype, own.key.sharding)
        was = dataclasses.replace(decoding, own=own._replace(key=cache, value=cache))
        seats = jax.tree.map(lambda x: setup.rows(jnp.int32, *x.shape), leg.seats)
        origin = setup.rows(jnp.int32, setup.parts, leg.rows) if leg.moves else None
        number = abstract((), jnp.int32)
        placed = seating.Leg(seats, origin, number, number, (leg.before, leg.before_slots), leg.slots)
        lower = functools.partial(
            Engine.advance.lower, engine, copy, branches, was, placed, sampling=sampling
        )
        own_sizes = {"sampling copy": weights, "shared caches": held_by(branches.context)}
        own_sizes |= {"branch caches": held_by((cache, cache)), "rollouts": held_by(decoding.rollouts)}
        return dataclasses.replace(stage(phase, name, lower, held, own_sizes)[0], leg=leg)

    opened, results = stage(
        "first return",
        "prefill",
        lambda: Engine.open_queries.lower(engine, copy, queries, branches_of, seed, 0),
        always,
        {"sampling copy": weights},
    )
    yield opened
    if results is None:
        return
    branches, decoding = results
    base_leg = work.first_return.largest
    yield decode("first return", "decode", decoding, branches, work.first_return, base_leg, always)
    if work.explore is None:
        return

    own = decoding.own.key
    rows = own.shape[3] // work.first_return.legs[0].slots
    last = work.first_return.legs[-1]
    cache = abstract((*own.shape[:3], last.rows * last.slots, own.shape[4]), own.dtype, own.sharding)
    (query_segment,) = branches.context
    caches = Caches(
        query_segment._replace(length=numbers), decoding.own._replace(key=cache, value=cache), rows, count
    )
    n, j = work.trajectories * setup.parts, config.explore.positions + 1
    states = States(
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n),
        setup.rows(jnp.int32, n, rollout.max_response),
        setup.rows(jnp.int32, n, j),
        setup.rows(jnp.bool_, n, j),
    )
    own_sizes = {"sampling copy": weights, "shared caches": held_by(caches)}
    opened, results = stage(
        "explore",
        "open states",
        lambda: Engine.open_states.lower(
            engine, copy, queries, caches, states, seed_key=seed, step=0, rollouts=config.explore.rollouts
        ),
        always,
        own_sizes,
    )
    yield opened
    if results is None:
        return
    branches, decoding = results
    held = {**always, "queries' caches": held_by(caches.query)}
    legs = [work.explore.legs[0]]
    if work.explore.largest.moves:
        legs.append(work.explore.largest)
    elif len(work.explore.legs) > 1:
        legs.append(work.explore.legs[1])
    for leg in legs:
        name = f"decode {leg.rows} x {leg.slots}" + (" after a move" if leg.moves else "")
        yield decode("explore", name, decoding, branches, work.explore, leg, held)


def compile_updates(
    setup: Setup, work: Work, stage: Any, always: Mapping[str, int], reference: Any
) -> Iterator[Stage]:
    """The update: the chunk that most of the work is in, and the largest that there can be."""
    learner, state, parts = setup.learner, setup.state, setup.parts
    sizes = {
        "compute copy": held_by(setup.params(setup.dtype)),
        "gradient": held_by(setup.params(jnp.float32)),
    }
    held = dict(always)
    if reference is not None:
        sizes["reference copy"] = sizes["compute copy"]
    begun, results = stage(
        "update",
        "begin",
        lambda: Learner.cast_and_zero_gradient.lower(learner, state.params),
        without(held, "parameters"),
        {"parameters": always["parameters"]},
    )
    yield begun
    if results is None:
        return
    compute, gradient = results
    base = None if reference is None else compute

    def trunks_of(shape: tuple[int, int]) -> Trunks:
        count, width = shape
        return Trunks(setup.rows(jnp.int32, parts, count, width), setup.rows(jnp.int32, parts, count))

    def chunk_of(shape: Chunk) -> Batch:
        rows, numbers = shape.rows * parts, setup.rows(jnp.int32, shape.rows * parts)
        return Batch(
            token=setup.rows(jnp.int32, rows, shape.width + 1),
            length=numbers,
            start=numbers,
            old_logprob=setup.rows(jnp.float32, rows, shape.width + 1),
            advantage=setup.rows(jnp.float32, rows),
            trunk=numbers,
            prefix=numbers,
        )

    trunks = trunks_of(work.widest_trunks)
    opened, results = stage(
        "update",
        "open trunks",
        lambda: Learner.prefill_and_zero_gradient.lower(learner, compute, trunks),
        {**held, "gradient": sizes["gradient"]},
        {"compute copy": sizes["compute copy"]},
    )
    yield opened
    if results is None:
        return
    caches, cache_gradient = results
    copies = 1 if base is None else 2
    own = {
        "compute copy": sizes["compute copy"] * copies,
        "gradient": sizes["gradient"],
        "trunk caches": held_by((caches, cache_gradient)),
    }
    policy = Prefilled(compute, caches)
    other = None if base is None else Prefilled(base, caches)
    for shape in dict.fromkeys((typical(work), work.widest)):
        name = f"chunk {shape.rows} x {shape.width}"
        lower = functools.partial(
            Learner.add_chunk.lower,
            *(learner, gradient, cache_gradient, policy, other),
            *(chunk_of(shape), abstract((), jnp.float32)),
            window=shape.window,
        )
        yield dataclasses.replace(stage("update", name, lower, held, own)[0], chunk=shape)
    yield stage(
        "update",
        "close trunks",
        lambda: Learner.add_trunks.lower(learner, gradient, cache_gradient, compute, trunks),
        {**held, "trunk caches": held_by(caches)},
        {**own, "trunk caches": held_by(cache_gradient)},
    )[0]
    leaves, tree = jax.tree.flatten(state)
    apply = applying(learner.optimizer, tree, tuple(x.sharding for x in leaves))
    yield stage(
        "update",
        "apply",
        lambda: apply.lower(state, gradient, abstract((), jnp.float32)),
        without(held, "parameters", "optimizer"),
        {name: always[name] for name in ("parameters", "optimizer")} | {"gradient": sizes["gradient"]},
    )[0]


def typical(work: Work) -> Chunk:
    """The shape of chunk that most tokens run in."""
    return max(work.chunks, key=lambda chunk: (work.chunks[chunk] * chunk.tokens, chunk.tokens))
