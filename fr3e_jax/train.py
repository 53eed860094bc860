"""FR3E and its baselines: `python -m fr3e_jax.train --config configs/quickstart.yaml`.

Sets a run up, goes through its steps (the pipeline is in step/rounds.py), evaluates, saves, reports, and
exports the model at the end. A run directory that holds a checkpoint is resumed.
"""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.cli import ending_in_one_line, parse
from fr3e_jax.config import Config, ConfigError, as_written, dump, resolve, rows_of_state, without_effect
from fr3e_jax.cost import utilisation
from fr3e_jax.engine.filters import Sampling
from fr3e_jax.engine.finite import NotFiniteError
from fr3e_jax.evaluation.answers import Ask, Respondent
from fr3e_jax.evaluation.held_out import held_out_metrics
from fr3e_jax.learner import groups
from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts, initialize, is_first, leaving_at_once
from fr3e_jax.parallel.mesh import PlacementError
from fr3e_jax.parallel.waiting import HostError, waiting
from fr3e_jax.planning.cache_budget import cache_bytes_here
from fr3e_jax.planning.update_layout import chosen_by_estimate
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.pretrained.hub import FINAL_MODEL
from fr3e_jax.problems.corpus import names_of
from fr3e_jax.problems.difficulty import unseen
from fr3e_jax.rewards.verdict import ScorerError
from fr3e_jax.run.build import Parts, build, mesh_of
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.compilation import keep_compiled
from fr3e_jax.run.ending import is_last, shared_reason, skipped_message, solved_message
from fr3e_jax.run.interruption import Interrupted, Interruption
from fr3e_jax.run.lock import Lock
from fr3e_jax.run.reporter import Reporter, Silent, open_reporter
from fr3e_jax.run.resume import Resumed, resume, set_aside
from fr3e_jax.run.rollout_files import ROLLOUTS
from fr3e_jax.run.run_dir import (
    begun_anew,
    changes,
    completed,
    describe_completed,
    open_run_dir,
    refuse_other_settings,
    what_may_change,
)
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.storage import StorageError, in_bucket, location, upload, writing
from fr3e_jax.run.trackers import require_trackers
from fr3e_jax.step.batch import SamplingError
from fr3e_jax.step.metrics import Metrics
from fr3e_jax.step.record import open_recorder
from fr3e_jax.step.shortage import OutOfMemoryError, raise_shortage
from fr3e_jax.step.stages import draws_of
from fr3e_jax.step.update import SkippedError, train_step

LINE = (
    "a step's line: root reward, the mean reward from the bare question; entropy of a token; states that are "
    "trained on (+) and that are not (-); tokens drawn; seconds, by stage (all numbers: "
    "python -m fr3e_jax.step.meanings)"
)


def evaluate_held_out(config: Config, parts: Parts, params: Params, step: int) -> Metrics:
    """Ask the held-out problems: their metrics, and the seconds that it took."""
    begun, where = time.perf_counter(), f"evaluation after step {step}"
    respondent = Respondent(parts.engine, parts.stream, parts.verifier, config.evaluate.rows, where)
    samples, sampling = range(config.evaluate.samples), Sampling(config.evaluate.temperature)
    asks = [Ask(problem, n, sample) for sample in samples for n, problem in enumerate(parts.corpus.held_out)]
    draws = draws_of(config.seed, step, parts.engine.placement)
    key = jax.random.fold_in(draws.evaluation, draws.step)
    with waiting("an evaluation"):
        batches = respondent.answers(parts.policy.sampling_params(params), asks, key, sampling)
        answers = [answer for batch in batches for answer in batch]
    measured = held_out_metrics(answers, config.evaluate.samples)
    return measured | {"time/evaluate": round(time.perf_counter() - begun, 4)}


def train(config: Config, name: str) -> dict[str, Any] | None:
    """Run or resume, and export the final model.

    Returns:
      What summary.json says; None if the run was asked to stop before its end.
    """
    refuse_other_settings(resolve(config))  # before anything is written
    require_trackers(config.report)
    hosts = Hosts(mesh_of(config.mesh), config.distributed.timeout)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(Lock("train", hosts))
        if config.run_dir is not None:
            lock.take(location(config.run_dir))
        return train_locked(config, name, lock, stack)


def train_locked(config: Config, name: str, lock: Lock, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """Run or resume where no other run can write.

    Args:
      config: as given.
      name: of the run directory, where none is given.
      lock: on the run directory, held if one is given.
      stack: closed when the run ends.

    Returns:
      What summary.json says; None if the run was asked to stop before its end.
    """
    started = time.perf_counter()
    given, config = config, resolve(config)
    lost = refuse_other_settings(config)
    hosts = lock.hosts
    summary = completed(config) if lost is None else None
    if hosts.of_first(summary is not None, "whether the run is complete"):
        for line in describe_completed(summary, config) if is_first() and summary else []:
            print(line, flush=True)
        return summary
    anew = begun_anew(config)
    parts = build(
        config,
        hosts,
        stack.enter_context(Interruption(hosts)).check,
        lambda *decoded: reporter.within_step.rows(*decoded),
        chosen_by_estimate,
        cache_bytes_here,
    )
    corpus, policy = parts.corpus, parts.policy
    state, reference = policy.fresh_state(parts.learner), None
    if config.loss.kl_coefficient > 0:
        reference = jax.tree.map(jnp.copy, state.params)  # the state is donated to updates
    carried = groups.empty_groups(
        rows_of_state(config), config.rollout.max_prompt, config.rollout.max_response
    )
    difficulty = parts.stream.difficulty
    rates = None if difficulty is None else unseen(difficulty.questions)
    progress = Progress(seed=config.seed, problems=corpus.checksum, rates=rates)
    resumed = Resumed(state, carried, progress, [], [])
    if config.run_dir is not None:
        fresh = (state, carried, progress)
        resumed = resume(location(config.run_dir), config, fresh, hosts, lost)
    state, carried, progress = resumed.state, resumed.carried, resumed.progress
    hosts.meet("the run directory is read, and not written yet")
    directory = open_run_dir(config, name)
    set_aside(directory, resumed.damaged)
    hosts.meet("the run directory is there")
    lock.take(directory)
    keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
    recorder = stack.enter_context(
        open_recorder(
            config.record, directory, progress.step, hosts, parts.text, lambda line: reporter.say(line)
        )
    )
    checkpoints = Checkpoints(directory, keep, keep_every, dump(config), recorder.settle)
    started -= progress.seconds

    with open_reporter(directory, config, progress.step) as reporter:
        reporter.say(
            f"{config.algorithm} on {config.model.path} | {', '.join(names_of(config.data))} | mesh "
            f"{parts.policy.described_mesh} on {jax.default_backend()} | run directory {directory}"
        )
        if implied := changes(as_written(given), as_written(config)):
            reporter.say(f"{config.algorithm} sets {', '.join(implied)}: see config.yaml")
        for line in (*lock.messages, *anew, *without_effect(given), *corpus.messages, *resumed.messages):
            reporter.say(line)
        if progress.step:
            reporter.say(f"resumed from the checkpoint of step {progress.step}")
        if progress.step < config.steps:
            reporter.say(LINE)
        if progress.step > config.steps:
            reporter.say(
                f"--steps {config.steps} asks for fewer steps than there are: none is trained, and the model "
                f"of step {progress.step} is exported"
            )
        try:
            if not progress.step:
                first = corpus.held_out[0]
                seen = parts.text.seen(first.question, first.before)
                reporter.say(f"the model sees, for example: {seen!r}")
                reporter.step(
                    {"step": 0} | evaluate_held_out(config, parts, state.params, 0) | {"tokens/total": 0}
                )
            ended = shared_reason(config, reporter, progress, hosts)
            while progress.unreported is not None or not (ended or is_last(config, parts, progress)):
                if progress.unreported is None:
                    checkpoints.check()
                    recorder.check()
                    lock.check()
                    with waiting(f"step {progress.step + 1}"):
                        state, carried, progress, metrics, sample = train_step(
                            config, parts, reference, state, carried, progress, reporter.within_step, recorder
                        )
                    unreported = {"metrics": metrics, "sample": sample}
                    progress = dataclasses.replace(progress, unreported=unreported)
                else:
                    metrics, sample = progress.unreported["metrics"], progress.unreported["sample"]
                spent = shared_reason(config, reporter, progress, hosts, metrics)
                every, last = config.evaluate.every, bool(spent) or is_last(config, parts, progress)
                if last or (every and progress.step % every == 0):
                    metrics |= evaluate_held_out(config, parts, state.params, progress.step)
                seconds = time.perf_counter() - started
                progress = dataclasses.replace(progress, unreported=None, seconds=seconds)
                metrics |= utilisation(metrics, hosts.mesh.devices.flat)
                reporter.step(metrics, sample)
                ended = shared_reason(config, reporter, progress, hosts)
                if progress.skipped >= config.optimizer.max_skipped:
                    # Counted from 0 when it is resumed: whoever starts it again wants it to try on.
                    checkpoints.save_last(state, carried, dataclasses.replace(progress, skipped=0))
                    raise SkippedError(skipped_message(progress))
                if last or ended or progress.step % config.checkpoint.every == 0:
                    checkpoints.save(state, carried, progress)
        except (SamplingError, ScorerError) as error:
            checkpoints.save_last(state, carried, progress)
            if isinstance(error, SamplingError):
                raise SamplingError(f"{error} {what_may_change(str(error), directory)}") from None
            raise
        except (MemoryError, RuntimeError) as error:
            known = {"parameters": state.params, "optimizer": state.optimizer, "reference": reference}
            raise_shortage(error, config, directory, known, hosts.mesh, checkpoints.close)
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
            parts.verifier.pool.close()
        if ended:
            reporter.say(f"the run is complete after step {progress.step} of {config.steps}: {ended}")
        elif progress.step < config.steps:
            reporter.say(solved_message(config, parts, progress))
        checkpoints.close()
        lock.check()
        with waiting("the export"):
            export_type = jnp.dtype(config.model.export_dtype)
            export_run(directory / FINAL_MODEL, policy.model.source, state.params, export_type, hosts)
        return finish(reporter, directory, progress, ended)


def export_run(out: epath.Path, source: Path, params: Params, dtype: Any, hosts: Hosts) -> None:
    """Write the final model; to a bucket from a folder here."""
    if not in_bucket(out):
        with writing(out):
            export_model(source, Path(out), params, dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder):
            export_model(source, Path(folder) / out.name, params, dtype)
        hosts.first_alone(lambda: upload(Path(folder) / out.name, out), "the model is copied to the bucket")


def finish(
    reporter: Reporter | Silent, directory: epath.Path, progress: Progress, ended: str
) -> dict[str, Any]:
    """Write and show the summary.

    Args:
      ended: the rule by which the run ended before its last step; empty where none did.
    """
    before, after = (reporter.accuracies.get(step) for step in (0, progress.step))  # None where it is lost
    summary: dict[str, Any] = {
        "accuracy_before": before,
        "accuracy_after": after,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens_generated": progress.tokens_generated,
        "seed": progress.seed,
    }
    if ended:
        summary["ended"] = ended
    reporter.summary(
        summary,
        {
            "held-out accuracy before": share(before),
            "held-out accuracy after": share(after),
            "steps": f"{progress.step} in {progress.seconds:.0f} s",
            "tokens generated": f"{progress.tokens_generated:,}",
            "model": str(directory / FINAL_MODEL),
            "checkpoints": str(directory / "checkpoints"),
            "metrics": str(directory / "metrics.jsonl"),
            "rollouts to read": str(directory / "samples.jsonl"),
            "every rollout": str(directory / ROLLOUTS),
            "log": str(directory / "log.txt"),
            "all of it on a page": f"python -m fr3e_jax.view {directory}",
        },
    )
    return summary


def share(accuracy: float | None) -> str:
    """An accuracy for people."""
    return "not recorded" if accuracy is None else f"{accuracy:.1%}"


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    applied: list[str] = []
    config, name = parse(Config, "train", "configs/quickstart.yaml", None, applied.append)
    interrupted = "interrupted; with --run_dir DIR this run goes on from its last checkpoint"
    own = (SamplingError, NotFiniteError, ScorerError, SkippedError, OutOfMemoryError)
    failures = (*own, HostError, StorageError)
    mistakes = (ConfigError, RuleError, PlacementError, CheckpointError)
    with leaving_at_once("train"), ending_in_one_line("train", mistakes, failures, interrupted):
        initialize(config.distributed)
        if is_first():  # which is not known before
            print(*applied, flush=True)
        keep_compiled(config.compilation_cache, config.run_dir)
        train(config, name)


if __name__ == "__main__":
    main()
