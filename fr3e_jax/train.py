"""FR3E and its baselines: `python -m fr3e_jax.train --config configs/quickstart.yaml`.

Sets a run up, goes through its steps (the pipeline is in step.py), evaluates, saves, reports, and exports
the model at the end. A run directory that holds a checkpoint is resumed.
"""

import dataclasses
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fr3e_jax.cli import fail, parse
from fr3e_jax.config import Config, ConfigError, check, resolve, updates_of
from fr3e_jax.cost import utilisation
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.host import groups
from fr3e_jax.host.checkpoints import Checkpoints, Progress
from fr3e_jax.host.data import QueryStream, encode_queries
from fr3e_jax.host.export import export_model
from fr3e_jax.host.metrics import Reporter, read_metrics
from fr3e_jax.host.model import PlacedModel, open_model
from fr3e_jax.host.run_dir import differing, open_run_dir, refuse_other_settings
from fr3e_jax.host.tasks import Problem, make_task
from fr3e_jax.host.text import load_text
from fr3e_jax.host.verify import Verifier
from fr3e_jax.learner.attention import make_splash
from fr3e_jax.learner.state import TrainState, init_state, make_optimizer, sampling_cast
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.attention import attend_sequence
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.models.qwen2 import Params
from fr3e_jax.parallel.mesh import PlacementError, make_mesh, row_parts
from fr3e_jax.step import Run, SamplingError, SkippedError, train_step


def setup(config: Config) -> tuple[Run, PlacedModel, TrainState, list[Problem]]:
    """Check the configuration, then load the model and place it on the mesh.

    Returns:
      (the run, the model that it starts from, its fresh state, held-out problems).
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = open_model(config.model.path).place(mesh)
    check(config, row_parts(mesh), model.config.context)
    text = load_text(model.source, config.data.template)
    task = make_task(config.data)
    held_out = task.held_out(config.data.held_out)
    encode_queries(held_out, text, config.rollout.max_prompt)  # too long a query fails here, not later
    engine = Engine(model.graph, model.sampling, config.rollout.max_response, text.end_tokens)
    dtype = jnp.dtype(config.model.compute_dtype)
    optimizer = make_optimizer(config.optimizer, model.axes, updates_of(config))
    learner = Learner(
        model.graph,
        model.training,
        optimizer,
        config.loss,
        dtype,
        config.optimizer.logit_chunk,
        config.optimizer.remat,
        make_splash(model.training) if jax.default_backend() == "tpu" else attend_sequence,
    )
    state = init_state(model.training, optimizer, model.axes, model.read_params(model.training))
    reference = None
    if config.loss.kl_coefficient > 0:
        reference = jax.tree.map(jnp.copy, state.params)  # the state is donated to updates
    stream = QueryStream(task, text, config.rollout.max_prompt, config.seed)
    verifier = Verifier(task, text)
    cast = sampling_cast(model.sampling, model.axes, state.params, dtype)
    run = Run(config, model.config, model.training, engine, learner, stream, verifier, reference, cast)
    return run, model, state, held_out


def evaluate(run: Run, params: Params, held_out: list[Problem]) -> float:
    """Share of the held-out problems that greedy decoding answers right."""
    params = run.sampling_params(params)
    rows, right = run.config.evaluate.rows, 0.0
    for start in range(0, len(held_out), rows):
        problems = held_out[start : start + rows]
        padded = problems + problems[:1] * (rows - len(problems))
        queries = encode_queries(padded, run.stream.text, run.config.rollout.max_prompt)
        placed = run.engine.placement.place_rows(queries)
        rollouts, _ = run.engine.sample(params, placed, run.key(0), 0, 1, GREEDY)
        right += run.verifier.base(jax.device_get(rollouts), padded)[: len(problems)].sum()
    return float(right) / len(held_out)


def train(config: Config, name: str) -> dict[str, Any]:
    """Run or resume, and export the final model.

    Returns:
      What summary.json says.
    """
    started = time.perf_counter()
    given, config = config, resolve(config)
    refuse_other_settings(config)
    run, model, state, held_out = setup(config)
    directory = open_run_dir(config, name)
    checkpoints = Checkpoints(directory, config.checkpoint.keep)
    progress = Progress(seed=config.seed)
    carried = groups.empty_groups(
        config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    )
    if (latest := checkpoints.latest()) is not None:
        state, carried, progress = checkpoints.restore(latest, state)
    started -= progress.seconds

    with Reporter(directory, config.steps, progress.step) as reporter:
        reporter.say(
            f"{config.algorithm} on {config.model.path} | {config.data.task} | mesh "
            f"{dict(run.placement.mesh.shape)} on {jax.default_backend()} | run directory {directory}"
        )
        if implied := differing(asdict(given), asdict(config)):
            reporter.say(f"{config.algorithm} sets {', '.join(implied)}: see config.yaml")
        if progress.step:
            reporter.say(f"resumed from the checkpoint of step {progress.step}")
        else:
            question = run.stream.text.query(held_out[0].question)
            shown = run.stream.text.tokenizer.decode(question)
            reporter.say(f"the model sees, for example: {shown!r}")
            reporter.step(
                {"step": 0, "eval/accuracy": evaluate(run, state.params, held_out), "tokens/total": 0}
            )
        while progress.step < config.steps:
            try:
                state, carried, progress, metrics, sample = train_step(run, state, carried, progress)
            except SamplingError:
                checkpoints.save_last(state, carried, progress)
                raise
            every, last = config.evaluate.every, progress.step == config.steps
            if last or (every and progress.step % every == 0):
                begun = time.perf_counter()
                metrics["eval/accuracy"] = evaluate(run, state.params, held_out)
                metrics["time/evaluate"] = round(time.perf_counter() - begun, 4)
            progress = dataclasses.replace(progress, seconds=time.perf_counter() - started)
            metrics |= utilisation(metrics, run.placement.mesh.devices.flat)
            reporter.step(metrics, sample)
            if progress.skipped >= config.optimizer.max_skipped:
                # Counted from 0 when it is resumed: whoever starts it again wants it to try on.
                checkpoints.save_last(state, carried, dataclasses.replace(progress, skipped=0))
                raise SkippedError(skipped_message(progress))
            if last or progress.step % config.checkpoint.every == 0:
                checkpoints.save(state, carried, progress)
        checkpoints.close()
        export_model(model.source, directory / "model", state.params, jnp.dtype(config.model.export_dtype))
        return finish(reporter, directory, progress)


def skipped_message(progress: Progress) -> str:
    """Why a run ended whose updates were skipped, and what to try."""
    return (
        f"step {progress.step}: {progress.skipped} updates in a row were skipped, since their loss or "
        "gradient was not finite; parameters and moments are as before them. Start again with a lower "
        "optimizer.learning_rate or optimizer.max_grad_norm, or with model.compute_dtype float32; or go on "
        "from here with the same --run_dir, which counts from 0, and a higher optimizer.max_skipped."
    )


def finish(reporter: Reporter, directory: Path, progress: Progress) -> dict[str, Any]:
    """Write and show the summary."""
    accuracies = [m["eval/accuracy"] for m in read_metrics(directory) if "eval/accuracy" in m]
    summary = {
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens_generated": progress.tokens_generated,
        "seed": progress.seed,
    }
    reporter.summary(
        summary,
        {
            "held-out accuracy before": f"{accuracies[0]:.1%}",
            "held-out accuracy after": f"{accuracies[-1]:.1%}",
            "steps": f"{progress.step} in {progress.seconds:.0f} s",
            "tokens generated": f"{progress.tokens_generated:,}",
            "model": str(directory / "model"),
            "checkpoints": str(directory / "checkpoints"),
            "metrics": str(directory / "metrics.jsonl"),
            "rollouts to read": str(directory / "samples.jsonl"),
            "log": str(directory / "log.txt"),
        },
    )
    return summary


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, name = parse(Config, "train", "configs/quickstart.yaml")
    try:
        train(config, name)
    except (ConfigError, PlacementError, CheckpointError) as error:
        fail("train", error)
    except (SamplingError, SkippedError) as error:
        fail("train", error, code=1)
    except KeyboardInterrupt:
        fail("train", "interrupted; with --run_dir DIR this run goes on from its last checkpoint", 130)


if __name__ == "__main__":
    main()
