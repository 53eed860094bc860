"""FR3E and its baselines: `python -m fr3e_jax.train --config configs/quickstart.yaml`.

Sets a run up, goes through its steps (the pipeline is in step/rounds.py), evaluates, saves, reports, and
exports the model at the end. A run directory that holds a checkpoint is resumed.
"""

import dataclasses
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.cli import one_line, parse
from fr3e_jax.config import Config, ConfigError, as_written, check, dump, resolve, updates_of, without_effect
from fr3e_jax.cost import utilisation
from fr3e_jax.engine.finite import NotFiniteError
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.evaluation.answers import Ask, Respondent
from fr3e_jax.learner import groups
from fr3e_jax.learner.make import learner_of
from fr3e_jax.learner.state import TrainState, init_state, sampling_cast
from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts, initialize, is_first, leaving_at_once
from fr3e_jax.parallel.mesh import PlacementError, make_mesh, row_parts
from fr3e_jax.parallel.waiting import HostError, waiting
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.pretrained.model import PlacedModel, open_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.corpus import Corpus, make_corpus, names_of
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verdict import ScorerError
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.compilation import keep_compiled
from fr3e_jax.run.interruption import Interrupted, Interruption
from fr3e_jax.run.reporter import Reporter, Silent, open_reporter, read_metrics
from fr3e_jax.run.resume import Resumed, resume, set_aside
from fr3e_jax.run.run_dir import differing, open_run_dir, refuse_other_settings
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.storage import StorageError, in_bucket, location, upload, writing
from fr3e_jax.step.metrics import Metrics
from fr3e_jax.step.rounds import Run
from fr3e_jax.step.update import SamplingError, SkippedError, train_step
from fr3e_jax.types import Problem

MODEL = "model"  # the directory of the final one, in the run directory


def setup(config: Config) -> tuple[Run, PlacedModel, TrainState, Corpus]:
    """Check the configuration, then load the model and place it on the mesh.

    Returns:
      (the run, the model that it starts from, its fresh state, its problems).
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = open_model(config.model.path).place(mesh)
    check(config, row_parts(mesh), model.config.context)
    text = load_text(model.source, config.data.template, config.rollout.stop)
    if endless := text.endless():
        raise ConfigError(f"data.template {config.data.template}: {endless} (rollout.stop)")
    corpus = make_corpus(config.data, config.seed, text, config.rollout.max_prompt)
    hosts = Hosts(mesh, config.distributed.timeout)
    hosts.require_same(corpus.checksum, "the problems of data.source")
    interruption = Interruption(hosts)
    engine = Engine(
        model.graph,
        model.sampling,
        config.rollout.max_response,
        text.end_tokens,
        interruption.check,
        text.stops,
    )
    dtype = jnp.dtype(config.model.compute_dtype)
    settings = (config.loss, config.optimizer, dtype, updates_of(config))
    learner = learner_of(model.graph, model.training, model.axes, *settings)
    state = init_state(model.training, learner.optimizer, model.axes, model.read_params(model.training))
    reference = None
    if config.loss.kl_coefficient > 0:
        reference = jax.tree.map(jnp.copy, state.params)  # the state is donated to updates
    stream = QueryStream(corpus.stream(config.seed), text, config.rollout.max_prompt, hosts)
    pool = ScoringPool(corpus.scorers, **asdict(config.scoring))
    verifier = Verifier(text, hosts, pool, config.reward)
    cast = sampling_cast(model.sampling, model.axes, state.params, dtype)
    run = Run(
        config, model.config, model.training, engine, learner, stream, verifier, reference, cast, interruption
    )
    return run, model, state, corpus


def evaluate(run: Run, params: Params, held_out: list[Problem], step: int) -> Metrics:
    """Greedy answers to the held-out problems: share right, share cut off, mean length in tokens."""
    begun, where = time.perf_counter(), f"evaluation after step {step}"
    respondent = Respondent(run.engine, run.stream, run.verifier, run.config.evaluate.rows, where)
    asks = [Ask(problem, number) for number, problem in enumerate(held_out)]
    with waiting("an evaluation"):
        batches = respondent.answers(run.sampling_params(params), asks, run.key(0), GREEDY)
        answers = [answer for batch in batches for answer in batch]
    return {
        "eval/accuracy": float(np.mean([answer.right for answer in answers])),
        "eval/cut": float(np.mean([answer.truncated for answer in answers])),
        "eval/length": float(np.mean([answer.length for answer in answers])),
        "time/evaluate": round(time.perf_counter() - begun, 4),
    }


def train(config: Config, name: str) -> dict[str, Any] | None:
    """Run or resume, and export the final model.

    Returns:
      What summary.json says; None if the run was asked to stop before its end.
    """
    started = time.perf_counter()
    given, config = config, resolve(config)
    lost = refuse_other_settings(config)
    run, model, state, corpus = setup(config)
    held_out = corpus.held_out
    carried = groups.empty_groups(
        config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    )
    progress = Progress(seed=config.seed, problems=corpus.checksum)
    resumed = Resumed(state, carried, progress, [], [])
    if config.run_dir is not None:
        fresh = (state, carried, progress)
        resumed = resume(location(config.run_dir), config, fresh, run.hosts, lost)
    state, carried, progress = resumed.state, resumed.carried, resumed.progress
    run.hosts.meet("the run directory is read, and not written yet")
    directory = open_run_dir(config, name)
    set_aside(directory, resumed.damaged)
    run.hosts.meet("the run directory is there")
    keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
    checkpoints = Checkpoints(directory, keep, keep_every, dump(config))
    started -= progress.seconds

    with open_reporter(directory, config.steps, progress.step) as reporter:
        reporter.say(
            f"{config.algorithm} on {config.model.path} | {', '.join(names_of(config.data))} | mesh "
            f"{dict(run.placement.mesh.shape)} on {jax.default_backend()} | run directory {directory}"
        )
        if implied := differing(as_written(given), as_written(config)):
            reporter.say(f"{config.algorithm} sets {', '.join(implied)}: see config.yaml")
        for line in (*without_effect(given), *corpus.told, *resumed.told):
            reporter.say(line)
        if progress.step:
            reporter.say(f"resumed from the checkpoint of step {progress.step}")
        try:
            if not progress.step:
                first = held_out[0]
                seen = run.stream.text.seen(first.question, first.before)
                reporter.say(f"the model sees, for example: {seen!r}")
                reporter.step({"step": 0} | evaluate(run, state.params, held_out, 0) | {"tokens/total": 0})
            while progress.step < config.steps or progress.unreported is not None:
                if progress.unreported is None:
                    checkpoints.check()
                    with waiting(f"step {progress.step + 1}"):
                        state, carried, progress, metrics, sample = train_step(run, state, carried, progress)
                    told = {"metrics": metrics, "sample": sample}
                    progress = dataclasses.replace(progress, unreported=told)
                else:
                    metrics, sample = progress.unreported["metrics"], progress.unreported["sample"]
                every, last = config.evaluate.every, progress.step == config.steps
                if last or (every and progress.step % every == 0):
                    metrics |= evaluate(run, state.params, held_out, progress.step)
                seconds = time.perf_counter() - started
                progress = dataclasses.replace(progress, unreported=None, seconds=seconds)
                metrics |= utilisation(metrics, run.placement.mesh.devices.flat)
                reporter.step(metrics, sample)
                if progress.skipped >= config.optimizer.max_skipped:
                    # Counted from 0 when it is resumed: whoever starts it again wants it to try on.
                    checkpoints.save_last(state, carried, dataclasses.replace(progress, skipped=0))
                    raise SkippedError(skipped_message(progress))
                if last or progress.step % config.checkpoint.every == 0:
                    checkpoints.save(state, carried, progress)
        except (SamplingError, ScorerError):
            checkpoints.save_last(state, carried, progress)
            raise
        except Interrupted:
            progress = dataclasses.replace(progress, seconds=time.perf_counter() - started)
            checkpoints.save_last(state, carried, progress)
            reporter.say(
                f"stopped as asked; step {progress.step} is saved, and --run_dir {directory} goes on from it"
                if progress.step
                else "stopped as asked, before the first step was done"
            )
            return None
        finally:
            run.verifier.pool.close()
        checkpoints.close()
        with waiting("the export"):
            export_run(directory / MODEL, model.source, state.params, jnp.dtype(config.model.export_dtype))
        return finish(reporter, directory, progress)


def export_run(out: epath.Path, source: Path, params: Params, dtype: Any) -> None:
    """Write the final model; to a bucket from a folder here."""
    if not in_bucket(out):
        with writing(out):
            export_model(source, Path(out), params, dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder):
            export_model(source, Path(folder) / out.name, params, dtype)
        if is_first():
            upload(Path(folder) / out.name, out)


def skipped_message(progress: Progress) -> str:
    """Why a run ended whose updates were skipped, and what to try."""
    return (
        f"step {progress.step}: {progress.skipped} updates in a row were skipped, since their loss or "
        "gradient was not finite; parameters and moments are as before them. Start again with a lower "
        "optimizer.learning_rate or optimizer.max_grad_norm, or with model.compute_dtype float32; or go on "
        "from here with the same --run_dir, which counts from 0, and a higher optimizer.max_skipped."
    )


def finish(reporter: Reporter | Silent, directory: epath.Path, progress: Progress) -> dict[str, Any]:
    """Write and show the summary."""
    accuracy = {m["step"]: m["eval/accuracy"] for m in read_metrics(directory) if "eval/accuracy" in m}
    before, after = accuracy.get(0), accuracy.get(progress.step)  # None where the line is lost
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens_generated": progress.tokens_generated,
        "seed": progress.seed,
    }
    reporter.summary(
        summary,
        {
            "held-out accuracy before": share(before),
            "held-out accuracy after": share(after),
            "steps": f"{progress.step} in {progress.seconds:.0f} s",
            "tokens generated": f"{progress.tokens_generated:,}",
            "model": str(directory / MODEL),
            "checkpoints": str(directory / "checkpoints"),
            "metrics": str(directory / "metrics.jsonl"),
            "rollouts to read": str(directory / "samples.jsonl"),
            "log": str(directory / "log.txt"),
        },
    )
    return summary


def share(accuracy: float | None) -> str:
    """An accuracy for people."""
    return "not recorded" if accuracy is None else f"{accuracy:.1%}"


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, name = parse(Config, "train", "configs/quickstart.yaml")
    interrupted = "interrupted; with --run_dir DIR this run goes on from its last checkpoint"
    failures = (SamplingError, NotFiniteError, ScorerError, SkippedError, HostError, StorageError)
    mistakes = (ConfigError, RuleError, PlacementError, CheckpointError)
    with leaving_at_once("train"), one_line("train", mistakes, failures, interrupted):
        initialize(config.distributed)
        keep_compiled(config.compilation_cache, config.run_dir)
        train(config, name)


if __name__ == "__main__":
    main()
