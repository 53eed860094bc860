"""Supervised warm-up: `python -m fr3e_jax.sft --config configs/quickstart_sft.yaml`.

Teaches a model worked solutions and writes it as a Hugging Face directory, from which reinforcement starts.
Loss on the solution and its end token, not on the question. Without a model to begin from it makes a small
one, with a tokenizer for the characters of the problems.
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.progress import Progress

from fr3e_jax.algorithm.loss import masked_sum
from fr3e_jax.cli import ending_in_one_line, parse
from fr3e_jax.config import ConfigError, OptimizerConfig, SFTConfig, check_options
from fr3e_jax.engine.finite import NotFiniteError
from fr3e_jax.learner.forward import Forward, Prefilled, row_statistics, trained
from fr3e_jax.learner.state import TrainState, decayed, init_state
from fr3e_jax.models.decoder import Decoder, Params, init_params
from fr3e_jax.models.hf import CheckpointError, config_json
from fr3e_jax.models.presets import small
from fr3e_jax.parallel.mesh import Placement, PlacementError, row_parts
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.pretrained.export import check_out, export_model
from fr3e_jax.pretrained.model import PlacedModel
from fr3e_jax.pretrained.text import Text
from fr3e_jax.pretrained.tokenizer import new_tokenizer
from fr3e_jax.problems.worked import WorkedProblems, worked_problems
from fr3e_jax.run.build import mesh_of, open_policy
from fr3e_jax.types import Batch


def check_sft(config: SFTConfig, row_parts: int) -> None:
    """Refuse what cannot run.

    Args:
      config: of the command.
      row_parts: in how many parts the mesh splits rows (data x fsdp).

    Raises:
      ConfigError: with one line that says what to change.
    """
    check_options(config)
    if config.warmup >= config.steps:
        raise ConfigError(
            f"warmup_steps is {config.warmup}, must be below steps, which is {config.steps}; lower it"
        )
    if config.batch % row_parts:
        raise ConfigError(f"batch {config.batch} does not divide by the mesh's data x fsdp {row_parts}")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ConfigError(
            f"hidden_size {config.hidden_size} does not divide by 2 x num_attention_heads "
            f"{config.num_attention_heads} (a head's dimensions are rotated in pairs)"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} does not divide by num_key_value_heads "
            f"{config.num_key_value_heads}"
        )


def write_new_model(config: SFTConfig, problems: WorkedProblems, directory: Path) -> None:
    """Write config.json and tokenizer of a new model that can say the problems.

    Raises:
      ConfigError: as `WorkedProblems.alphabet`.
    """
    tokenizer = new_tokenizer(problems.alphabet(config.data.template))
    model = small(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocab=len(tokenizer),
        context=config.max_position_embeddings,
    )
    tokenizer.save_pretrained(directory)
    raw = config_json(model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def make_batch(config: SFTConfig, problems: WorkedProblems, text: Text, step: int, width: int) -> Batch:
    """Questions with worked solutions, host arrays; a function of (seed, step).

    Raises:
      ConfigError: a solution does not fit into the model's context, or the tokenizer cannot say it.
    """
    rng = np.random.default_rng((config.seed, step))
    token = np.zeros((config.batch, width), np.int32)
    start, length = np.zeros((2, config.batch), np.int32)
    drawn = problems.draw(rng, config.batch)
    if lost := text.lost(part for problem, solution in drawn for part in (problem.question, solution)):
        i = min(lost)
        problem = drawn[i // 2][0]
        raise ConfigError(
            f"{problem.place or problem.source}: the model's tokenizer cannot say {lost[i][:40]!r} of the "
            f"{'solution' if i % 2 else 'question'} ({problem.question[:40]!r}); start from another model "
            "(init_path), or make a new one"
        )
    for row, (problem, solution) in enumerate(drawn):
        query = text.query(problem.question, problem.before)
        ids = [*query, *text.encoded(solution), text.end_tokens[0]]
        if len(ids) > width:
            raise ConfigError(
                f"{problem.question[:40]!r} with its solution has {len(ids)} tokens, more than "
                f"max_position_embeddings {width}; raise it"
            )
        token[row, : len(ids)] = ids
        start[row], length[row] = len(query), len(ids)
    longest = next_multiple(int(length.max()), 16)
    nothing = np.zeros((config.batch, longest), np.float32)
    none = np.zeros((config.batch,), np.int32)
    return Batch(
        token=token[:, :longest],
        length=length,
        start=start,
        old_logprob=nothing,
        advantage=nothing[:, 0],
        trunk=none,
        prefix=none,
    )


def make_step(
    graph: nnx.GraphDef[Decoder], placement: Placement, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Array]]:
    """The jitted step: mean negative log-likelihood of the solutions' tokens, one optimizer step."""

    chunk = OptimizerConfig().logit_chunk
    forward = Forward(graph, placement, compute_dtype=jnp.float32, logit_chunk=chunk, remat=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        mask = trained(batch)

        def loss(params: Params) -> Array:
            logprob, _ = row_statistics(forward, Prefilled(params, None), batch, entropy=False)
            return -masked_sum(logprob, mask) / jnp.sum(mask)

        value, gradient = jax.value_and_grad(loss)(state.params)
        changes, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        return TrainState(params, moments), value

    return step


def run(config: SFTConfig) -> Path:
    """Train and write the model.

    Returns:
      The model's directory.
    """
    started = time.perf_counter()
    out = Path(config.out)
    check_out(out)
    mesh = mesh_of(config.mesh)
    check_sft(config, row_parts(mesh))
    problems = worked_problems(config.data, config.seed, config.dropped_carry)
    with tempfile.TemporaryDirectory() as scratch:
        if config.init_path is None:
            write_new_model(config, problems, Path(scratch))
        name, template = config.init_path or scratch, config.data.template
        policy, text = open_policy(name, template, (), mesh, jnp.dtype(jnp.float32))
        params = warm_up(config, problems, policy.model, text)
        export_model(policy.model.source, out, params)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{count:,} parameters, {config.steps} steps in {time.perf_counter() - started:.0f} s; model in {out}"
    )
    return out


def warm_up(config: SFTConfig, problems: WorkedProblems, model: PlacedModel, text: Text) -> Params:
    """Train the model (of which only the shape exists, without `init_path`) on the problems' solutions."""
    placement = model.training
    if config.init_path is None:
        params = init_params(model.config, config.seed)
    else:
        params = model.read_params(placement)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed(model.axes)),
    )
    state = init_state(placement, optimizer, model.axes, params)
    width = min(model.config.context, config.max_position_embeddings)
    step = make_step(model.graph, placement, optimizer)
    with Progress(transient=True) as progress:
        bar = progress.add_task("warm-up", total=config.steps)
        for i in range(config.steps):
            batch = placement.place_rows(make_batch(config, problems, text, i, width))
            state, loss = step(state, batch)
            progress.advance(bar)
            if i % 50 == 0 or i == config.steps - 1:
                if not np.isfinite(loss):
                    raise NotFiniteError(f"step {i}: the loss is {float(loss)}; lower learning_rate")
                progress.console.print(f"step {i:>5} | loss {float(loss):.4f} nats per token")
    return state.params


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(SFTConfig, "sft", "configs/quickstart_sft.yaml")
    with ending_in_one_line("sft", (ConfigError, PlacementError, CheckpointError), (NotFiniteError,)):
        run(config)


if __name__ == "__main__":
    main()
