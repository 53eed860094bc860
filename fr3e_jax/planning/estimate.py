"""The programs of a step by arithmetic instead of compilation: memory, FLOPs and traffic in seconds.

Exact are the bytes of parameters, moments, gradient, their copies, and KV caches. Temporaries are what the
algorithm itself needs beside them: logits, activations that the backward pass reads, gathered weights, a
cache while it moves. Left out are the buffers that XLA adds (layout changes, padding to tiles, code), reading
and writing of activations in main memory while decoding, and collectives other than those of weights,
gradients and activations. Compiled plans say how far that is off: see planning/README.md.
"""

from fr3e_jax.engine.seats import Leg
from fr3e_jax.planning.model_sizes import ModelSizes
from fr3e_jax.planning.position_programs import estimated_second_pass, pass_needs
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.rollout_programs import decode_name, legs_to_compile
from fr3e_jax.planning.setup import Setup
from fr3e_jax.planning.stages import Stage, stage_of, state_bytes, without
from fr3e_jax.planning.update_programs import FORWARD, typical_chunk
from fr3e_jax.planning.workload import Workload


def estimate_step(setup: Setup, work: Workload) -> list[Stage]:
    """The stages of a step, as `compile_step` would find them, by arithmetic."""
    always, sizes = state_bytes(setup), ModelSizes(setup)
    stages = [
        cast_stage(sizes, always),
        prefill_stage(sizes, work, always),
        decode_stage(sizes, work, "first return", "decode", work.first_return.largest, always),
    ]
    if work.explore is not None:
        if pass_needs(setup.config.explore):
            stages.append(estimated_second_pass(sizes, work, always))
        held = {**always, "queries' caches": sizes.query_cache}
        if work.pilots is not None:
            base = {"base caches": sizes.slot * work.first_return.legs[-1].size}
            stages.extend(restart_stages(sizes, work, "positions", "open pilots", always, held | base))
        stages.extend(restart_stages(sizes, work, "explore", "open states", always, held))
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


def prefill_stage(sizes: ModelSizes, work: Workload, always: dict[str, int]) -> Stage:
    """The prefill of the queries, with the empty caches of their branches."""
    tokens = sizes.queries * sizes.setup.config.rollout.max_prompt
    first = work.first_return.legs[0]
    opened = sizes.query_cache + sizes.slot * first.size + sizes.rollouts(first.rows)
    pairs = tokens * sizes.setup.config.rollout.max_prompt / 2
    return stage_of(
        "first return",
        "prefill",
        always,
        {"sampling copy": sizes.sampling_copy},
        results=opened,
        temporary=sizes.activations(tokens),
        once=Costs(
            sizes.flops(tokens, pairs, 0),
            sizes.sampling_copy + opened,
            sizes.reductions(tokens, 1),
            sizes.calls(1) if sizes.tensor > 1 else 0.0,
        ),
    )


def restart_stages(
    sizes: ModelSizes, work: Workload, phase: str, opening: str, always: dict[str, int], held: dict[str, int]
) -> list[Stage]:
    """The opening of branches from states, and their decoding.

    Args:
      opening: name of the program that opens them.
      held: bytes on a chip that are in use while they are decoded and are not arguments.
    """
    stages = [open_states_stage(sizes, work, phase, opening, always)]
    for leg in legs_to_compile(work.decoding_of(phase)):
        stages.append(decode_stage(sizes, work, phase, decode_name(leg), leg, held))
    return stages


def open_states_stage(
    sizes: ModelSizes, work: Workload, phase: str, opening: str, always: dict[str, int]
) -> Stage:
    """The opening of branches from states: caches of kept trajectories are taken out, and empty ones made."""
    decode = work.decoding_of(phase)
    opened = shared_cache(sizes, work, phase) + sizes.slot * decode.legs[0].size
    opened += sizes.rollouts(decode.lengths[0].size)
    last = work.first_return.legs[-1]
    base = sizes.slot * last.size
    return stage_of(
        phase,
        opening,
        always,
        {"sampling copy": sizes.sampling_copy, "shared caches": sizes.query_cache + base},
        results=opened,
        once=Costs(bytes=2.0 * opened),
    )


def shared_cache(sizes: ModelSizes, work: Workload, phase: str) -> int:
    """KV caches that the branches of a part share: queries, and for exploration kept trajectories."""
    if phase == "first return":
        return sizes.query_cache
    slots = work.first_return.legs[-1].slots
    return sizes.slot * work.trajectories * (sizes.setup.config.rollout.max_prompt + slots)


def decode_stage(
    sizes: ModelSizes, work: Workload, phase: str, name: str, leg: Leg, held: dict[str, int]
) -> Stage:
    """A call of the decoding program."""
    config, rows = sizes.setup.config, leg.rows
    decode = work.decoding_of(phase)
    shared, before = shared_cache(sizes, work, phase), sizes.slot * leg.size_before
    after = sizes.slot * leg.size
    grown = after if after != before else 0
    context = config.rollout.max_prompt
    context += work.first_return.legs[-1].slots if phase != "first return" else 0
    keys = rows * (context + min(leg.slots, config.rollout.max_response))
    read = sizes.sampling_copy + shared + sizes.setup.cache_bytes(rows, leg.slots) + 2 * sizes.logits(rows)
    return stage_of(
        phase,
        name,
        held,
        {
            "sampling copy": sizes.sampling_copy,
            "shared caches": shared,
            "branch caches": before,
            "rollouts": sizes.rollouts(decode.lengths[0].size),
        },
        results=grown,
        temporary=2 * sizes.logits(rows) + (sizes.padding * grown if sizes.padding > 1 else 0),
        once=Costs(bytes=float(before + after)) if leg.moves else Costs(),
        each=Costs(
            sizes.flops(rows, keys, rows),
            read,
            sizes.reductions(rows, 1),
            sizes.calls(1) if sizes.tensor > 1 else 0.0,
        ),
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
