"""The programs of a step by arithmetic instead of compilation: memory, FLOPs and traffic in seconds.

Exact are the bytes of parameters, moments, gradient, their copies, and KV caches. Temporaries are what the
algorithm itself needs beside them: logits, activations that the backward pass reads, gathered weights, the
caches of a few sequences in their prefill. Left out are the buffers that XLA adds (layout changes,
padding to tiles, code), reading and writing of activations in main memory while decoding, and collectives
other than those of weights, gradients and activations. Compiled plans say how far that is off: see
planning/README.md.
"""

from fr3e_jax.engine.caches import prefilled_together
from fr3e_jax.engine.seats import strip_size
from fr3e_jax.planning.decodes import Decode
from fr3e_jax.planning.model_sizes import ModelSizes
from fr3e_jax.planning.position_programs import estimated_second_pass, pass_needs
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.rollout_programs import prefilled_trajectories
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.stages import Stage, stage_of, state_bytes, without
from fr3e_jax.planning.update_programs import FORWARD, typical_chunk
from fr3e_jax.planning.workload import Workload


def estimate_step(setup: Setup, work: Workload) -> list[Stage]:
    """The stages of a step, as `compile_step` would find them, by arithmetic."""
    always, sizes = state_bytes(setup), ModelSizes(setup)
    explore, prefilled = setup.config.explore, prefilled_trajectories(setup.config.explore, work)
    stages = [cast_stage(sizes, always)]
    if work.first_return is not None:
        stages.append(prefill_stage(sizes, work.first_return, always))
        stages.append(decode_stage(sizes, "first return", work.first_return, always))
    if "positions" in prefilled:
        stages.append(prefill_trajectories_stage(sizes, "positions", prefilled["positions"], always))
        if pass_needs(explore):
            stages.append(estimated_second_pass(sizes, work, always))
        if work.pilots is not None:
            stages.append(open_states_stage(sizes, "positions", "open pilots", work.pilots, always))
            stages.append(decode_stage(sizes, "positions", work.pilots, always))
    if work.explore is not None:
        if "explore" in prefilled:
            stages.append(prefill_trajectories_stage(sizes, "explore", prefilled["explore"], always))
        stages.append(open_states_stage(sizes, "explore", work.opening, work.explore, always))
        stages.append(decode_stage(sizes, "explore", work.explore, always))
    return [*stages, *update_stages(ModelSizes(setup.update), work, always)]


def cast_stage(sizes: ModelSizes, always: dict[str, int]) -> Stage:
    """The cast of the parameters to the copy for sampling, which gathers them over fsdp.

    Where updates have another tensor axis, its parts are exchanged before for those of fsdp.
    """
    moved = sizes.largest_weight if sizes.setup.mesh.shape["fsdp"] > 1 else 0
    wire, tensor = sizes.gathers(1), sizes.setup.update.mesh.shape["tensor"]
    if tensor != sizes.tensor:
        share = 1 - min(tensor, sizes.tensor) / max(tensor, sizes.tensor)
        wire["all-to-all", ("tensor",)] = share * sizes.compute_copy
    return stage_of(
        "reshard",
        "cast",
        without(always, "parameters"),
        {"parameters": always["parameters"]},
        results=sizes.sampling_copy,
        temporary=2 * moved,
        once=Costs(bytes=always["parameters"] + sizes.sampling_copy, wire=wire),
    )


def prefill_stage(sizes: ModelSizes, first: Decode, always: dict[str, int]) -> Stage:
    """The prefill of the queries, with the empty pages of their branches."""
    width = sizes.setup.config.rollout.max_prompt
    opened = sizes.query_cache + opened_bytes(sizes, first)
    return stage_of(
        "first return",
        "prefill",
        always,
        {"sampling copy": sizes.sampling_copy},
        results=opened,
        temporary=prefill_temporary(sizes, sizes.queries, width, sizes.query_cache),
        once=prefill_costs(sizes, sizes.queries, width, opened),
    )


def prefill_trajectories_stage(sizes: ModelSizes, phase: str, count: int, always: dict[str, int]) -> Stage:
    """The prefill of `count` trajectories."""
    rollout = sizes.setup.config.rollout
    width = rollout.max_prompt + rollout.max_response
    caches = sizes.setup.context_bytes(count, width)
    return stage_of(
        phase,
        "prefill trajectories",
        always,
        {"sampling copy": sizes.sampling_copy},
        results=caches,
        temporary=prefill_temporary(sizes, count, width, caches),
        once=prefill_costs(sizes, count, width, caches),
    )


def prefill_temporary(sizes: ModelSizes, count: int, width: int, caches: int) -> float:
    """Bytes that the prefill of some sequences needs beside its results: those that run together twice."""
    together = prefilled_together(count, width)
    return sizes.activations(width * together) + 2 * caches * together / count


def prefill_costs(sizes: ModelSizes, count: int, width: int, results: int) -> Costs:
    """Costs of the prefill of some sequences."""
    tokens, runs = count * width, count // prefilled_together(count, width)
    moved = runs * sizes.sampling_copy + 3.0 * results
    calls = sizes.calls(runs) if sizes.tensor > 1 else 0.0
    return Costs(sizes.flops(tokens, tokens * width / 2, 0), moved, sizes.reductions(tokens, 1), calls)


def opened_bytes(sizes: ModelSizes, decode: Decode) -> int:
    """Pages and rollouts of a decoding."""
    return decode.room.pages * sizes.setup.page_bytes(decode.room) + sizes.rollouts(decode.lengths[0].size)


def open_states_stage(
    sizes: ModelSizes, phase: str, opening: str, decode: Decode, always: dict[str, int]
) -> Stage:
    """The opening of branches from states: empty pages are made. opening: name of the program."""
    opened = opened_bytes(sizes, decode)
    shared = sizes.setup.context_bytes(decode.room.n, decode.slots)
    return stage_of(
        phase,
        opening,
        always,
        {"sampling copy": sizes.sampling_copy, "shared caches": shared},
        results=opened,
        once=Costs(bytes=float(opened)),
    )


def decode_stage(sizes: ModelSizes, phase: str, decode: Decode, always: dict[str, int]) -> Stage:
    """A leg of a decoding."""
    setup, room, leg = sizes.setup, decode.room, decode.typical
    rows, page = leg.span * room.sizes.rows, room.sizes.rows * room.sizes.slots
    each = strip_size(room.n, width := min(room.c, rows))
    context = min(room.sizes.context, decode.slots)
    span = Costs(
        sizes.flops(rows, 0, rows),
        sizes.sampling_copy + 2 * sizes.logits(rows),
        sizes.reductions(rows, 1),
        sizes.calls(1) if sizes.tensor > 1 else 0.0,
    )
    return stage_of(
        phase,
        "decode",
        always,
        {
            "sampling copy": sizes.sampling_copy,
            "shared caches": setup.context_bytes(room.n, decode.slots),
            "branch caches": room.pages * setup.page_bytes(room),
            "rollouts": sizes.rollouts(decode.lengths[0].size),
        },
        temporary=2 * sizes.logits(rows),
        loops={
            "spans": span,
            "pages": Costs(sizes.flops(0, page, 0), float(sizes.slot * page)),
            "tiles": Costs(sizes.flops(0, each * width * context, 0), float(sizes.slot * each * context)),
        },
        leg=leg,
    )


def update_stages(sizes: ModelSizes, work: Workload, always: dict[str, int]) -> list[Stage]:
    """The programs of the update, the same as are compiled."""
    setup, params = sizes.setup, always["parameters"]
    compute, gradient = sizes.compute_copy, sizes.gradient
    count, width = work.widest_trunks
    # The caches in the compute dtype, and their gradient in float32.
    caches = sizes.slot * count * width
    cache_gradient = caches * 4 // setup.dtype.itemsize
    copies = compute * (2 if setup.config.loss.kl_coefficient > 0 else 1)
    own = {"compute copy": copies, "gradient": gradient, "trunk caches": caches + cache_gradient}
    pairs = count * width * width / 2
    begin = stage_of(
        "update",
        "cast and zero gradient",
        without(always, "parameters"),
        {"parameters": params},
        results=compute + gradient,
        once=Costs(bytes=float(params + compute + gradient)),
    )
    opening = stage_of(
        "update",
        "prefill trunks",
        {**always, "gradient": gradient},
        {"compute copy": compute},
        results=caches + cache_gradient,
        temporary=sizes.activations(count * width) + 2 * sizes.gathered_layer,
        once=forward_costs(sizes, count * width, pairs),
    )
    chunks = []
    for chunk in dict.fromkeys((typical_chunk(work), work.widest)):
        logits = min(chunk.tokens, setup.config.optimizer.logit_chunk)
        seen = chunk.tokens * (chunk.window + chunk.width / 2)
        stage = stage_of(
            "update",
            chunk.name,
            always,
            own,
            temporary=backward_temporary(sizes, chunk.tokens, logits),
            once=backward_costs(sizes, chunk.tokens, seen, head=True),
            chunk=chunk,
        )
        chunks.append(stage)
    if setup.config.loss.mismatch != "none":
        chunk = typical_chunk(work)
        logits = min(chunk.tokens, setup.config.optimizer.logit_chunk)
        seen = chunk.tokens * (chunk.window + chunk.width / 2)
        stage = stage_of(
            "update",
            FORWARD,
            always,
            {"compute copy": compute, "trunk caches": caches},
            temporary=sizes.activations(chunk.tokens) + 2 * sizes.gathered_layer + 2 * sizes.logits(logits),
            once=forward_costs(sizes, chunk.tokens, seen, chunk.tokens),
            chunk=chunk,
        )
        chunks.append(stage)
    closing = stage_of(
        "update",
        "add trunks",
        {**always, "trunk caches": caches},
        {**own, "trunk caches": cache_gradient},
        temporary=backward_temporary(sizes, count * width, 0) + caches,
        once=backward_costs(sizes, count * width, pairs, head=False),
    )
    apply = stage_of(
        "update",
        "apply",
        without(always, "parameters", "optimizer"),
        {"parameters": params, "optimizer": always["optimizer"], "gradient": gradient},
        once=Costs(bytes=2.0 * (params + always["optimizer"]) + gradient),
    )
    return [begin, opening, *chunks, closing, apply]


def backward_temporary(sizes: ModelSizes, tokens: int, logit_tokens: int) -> float:
    """Bytes that a forward and backward pass of tokens needs beside its arguments.

    These are the gradient in the compute dtype, what is kept of each layer, the arrays of one layer, its
    gathered weights with their gradient, and logits with their gradient.
    """
    setup, size = sizes.setup, sizes.logical
    kept = setup.dtype.itemsize * tokens * size["embed"] * setup.model.num_hidden_layers
    layer = sizes.activations(tokens)
    layers = kept + 2 * layer if setup.config.optimizer.remat else layer * setup.model.num_hidden_layers
    return sizes.compute_copy + layers + 3 * sizes.gathered_layer + 3 * sizes.logits(logit_tokens)


def forward_costs(sizes: ModelSizes, tokens: int, pairs: float, logits: int = 0) -> Costs:
    """Costs of a forward pass of the tokens of a part.

    Args:
      logits: tokens that have logits.
    """
    layers = sizes.setup.model.num_hidden_layers
    moved = sizes.setup.mesh.shape["fsdp"] * sizes.compute_copy + 3 * layers * sizes.activations(tokens)
    moved += 2 * sizes.logits(logits)
    wire = sizes.gathers(1) | sizes.reductions(tokens, 1)
    return Costs(sizes.flops(tokens, pairs, logits), moved, wire, sizes.calls(1))


def backward_costs(sizes: ModelSizes, tokens: int, pairs: float, head: bool) -> Costs:
    """Costs of a forward and a backward pass of the tokens of a part, recomputation included.

    Args:
      head: whether the tokens have logits.
    """
    setup = sizes.setup
    passes = 4.0 if setup.config.optimizer.remat else 3.0
    logits = tokens if head else 0
    flops = passes * sizes.flops(tokens, pairs, 0) + 4.0 * sizes.flops(0, 0, logits)
    layers, fsdp = setup.model.num_hidden_layers, setup.mesh.shape["fsdp"]
    moved = 3.0 * fsdp * sizes.compute_copy + 2.0 * sizes.gradient + 6.0 * sizes.logits(logits)
    moved += 3 * passes * layers * sizes.activations(tokens)
    wire = sizes.gathers(passes - 1) | sizes.reductions(tokens, passes)
    if fsdp > 1:
        wire["reduce-scatter", ("fsdp",)] = sizes.compute_copy * (fsdp - 1.0)
    if setup.mesh.shape["data"] > 1:
        wire["all-reduce", ("data",)] = 2.0 * sizes.compute_copy
    return Costs(flops, moved, wire, sizes.calls(passes))
