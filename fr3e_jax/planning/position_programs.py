"""The program that a position rule may need: one forward pass over kept trajectories."""

from typing import Any

import jax.numpy as jnp

from fr3e_jax.config import ExploreConfig, rule_needs
from fr3e_jax.engine.second_pass import block_size, needs_pass, second_pass, second_pass_bytes
from fr3e_jax.models.attention import Segment
from fr3e_jax.parallel.sizes import ceil_divide
from fr3e_jax.planning.model_sizes import ModelSizes
from fr3e_jax.planning.program_costs import Costs
from fr3e_jax.planning.setup import bytes_on_chip
from fr3e_jax.planning.stages import Stage, StageCompiler, stage_of
from fr3e_jax.planning.workload import Workload
from fr3e_jax.types import Queries, States

SECOND_PASS = ("positions", "second pass")
"""Phase and program of the pass in reports."""


def pass_needs(explore: ExploreConfig) -> tuple[str, ...]:
    """What the position rule needs that takes a forward pass; empty where none is run."""
    needs = rule_needs(explore) if explore.positions else ()
    return needs if needs_pass(needs) else ()


def compile_second_pass(
    compiler: StageCompiler, params: Any, queries: Queries, caches: Segment, states: States
) -> Stage:
    """Compile the pass. The arguments, all abstract, are those of `second_pass`."""
    setup = compiler.setup
    length = setup.rows(jnp.int32, states.query.shape[0])
    needs = pass_needs(setup.config.explore)
    return compiler(
        *SECOND_PASS,
        lambda: second_pass.lower(setup.engine, needs, params, queries, caches, states, length),
        held=compiler.always,
        own={"sampling copy": bytes_on_chip(params), "shared caches": bytes_on_chip(caches)},
    )[0]


def estimated_second_pass(sizes: ModelSizes, work: Workload, always: dict[str, int]) -> Stage:
    """The pass by arithmetic: every slot of the kept trajectories' caches runs through the layers."""
    setup = sizes.setup
    rollout, needs = setup.config.rollout, pass_needs(setup.config.explore)
    slots = rollout.max_response
    temporary = second_pass_bytes(
        setup.model,
        needs,
        rows=work.trajectories,
        prompt=rollout.max_prompt,
        response=slots,
        heads=sizes.logical["heads"],
        tensor=sizes.tensor,
    )
    tokens = work.trajectories * slots
    logits = 2 * tokens if "gradient" in needs else 0
    held = sizes.setup.context_bytes(work.trajectories, rollout.max_prompt + slots)
    flops = sizes.flops(tokens, tokens * (rollout.max_prompt + slots), logits)
    blocks = ceil_divide(slots, block_size(work.trajectories, slots))  # each reads weights and caches
    moved = blocks * (sizes.sampling_copy + held) + 2.0 * temporary + 2 * sizes.logits(logits)
    calls = sizes.calls(blocks) if sizes.tensor > 1 else 0.0
    return stage_of(
        *SECOND_PASS,
        always,
        {"sampling copy": sizes.sampling_copy, "shared caches": held},
        temporary=temporary,
        once=Costs(flops, moved, sizes.reductions(tokens, 1), calls),
    )
