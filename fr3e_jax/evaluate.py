"""Benchmarks: `python -m fr3e_jax.evaluate --model DIR_OR_RUN --suite math`.

Every answer is written with its verdict while the batch after it is sampled, and a command that was ended
goes on from there. The table says how sure its numbers are, and `--compare` tells whether one model is better
than another.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from rich.console import Console

from fr3e_jax.cli import one_line, parse, warn
from fr3e_jax.config import (
    ConfigError,
    DistributedConfig,
    MeshConfig,
    ScoringConfig,
    check_options,
)
from fr3e_jax.config.values import Bounds, CountOrNone, Name, Rows, Seed, Size, TopK, TopP
from fr3e_jax.engine.finite import NotFiniteError
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.evaluation.answers import MOST_PROBLEMS, MOST_SAMPLES, Ask, Respondent
from fr3e_jax.evaluation.record import (
    ANSWERS,
    SUMMARY,
    Writer,
    check_comparison,
    held_settings,
    note_resolved,
    open_directory,
    without_done,
)
from fr3e_jax.evaluation.report import (
    asked_of,
    compare,
    comparison_table,
    read_answers,
    scores_of,
    summarize,
    table,
)
from fr3e_jax.evaluation.suites import Benchmark, benchmarks_of
from fr3e_jax.learner.state import sampling_cast
from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts, initialize, is_first, leaving_at_once
from fr3e_jax.parallel.mesh import PlacementError, make_mesh, row_parts
from fr3e_jax.parallel.waiting import HostError, waiting
from fr3e_jax.pretrained.model import Model, PlacedModel, compute_type, open_model
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.problems.corpus import checksum, judging_problems, judging_source
from fr3e_jax.problems.stream import QueryStream, padded_width
from fr3e_jax.progress import bars
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verdict import ScorerError
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.compilation import keep_compiled
from fr3e_jax.run.run_dir import holds_run
from fr3e_jax.run.storage import StorageError, in_bucket, location, write_atomically
from fr3e_jax.run.trained import read_trained, setting, steps_of
from fr3e_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Ask a model the problems of benchmarks, and tell what share it answers right."""

    model: Name
    """Run directory of train (its last whole checkpoint), Hugging Face directory, name on the hub, or
    `quickstart`."""
    suite: Name = "math"
    """`math`, or names of benchmarks with commas between (fr3e_jax/evaluation/README.md), or sources of
    problems as data.source has them, such as FILE.jsonl."""
    step: CountOrNone | None = None
    """Checkpoint of a run; by default the last."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Benchmark -> a copy of its data here (`--files.aime24 aime24.jsonl`), read instead of the hub's."""
    samples: Annotated[int, Bounds(least=0, most=MOST_SAMPLES)] = 0
    """Answers to each problem, k; 0 takes each benchmark's own."""
    temperature: Annotated[float, Bounds(least=0, besides=-1, why="-1 takes each benchmark's own")] = -1.0
    """Of sampling; 0 takes the most likely token, -1 each benchmark's own."""
    top_k: TopK = 0
    """Draw from this many of the most likely tokens; 0 from all."""
    top_p: TopP = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all."""
    max_response: Size = 3072
    """Longest answer, tokens; one that is cut off is wrong."""
    template: Name = "auto"
    """What the model sees, as data.template of train; `auto`: as the run was trained, else `boxed_chat` where
    the chat template ends its turns as the model does, and `boxed` for base models."""
    stop: list[str] | None = None
    """Texts that end an answer, as rollout.stop of train; by default those that the run was trained with."""
    limit: CountOrNone = 0
    """Take the first so many problems of each benchmark; 0 takes all."""
    rows: Rows = 64
    """Answers decoded at a time, of any problems; bounds memory. In bfloat16 an answer now and then differs
    with other rows."""
    seed: Seed = 0
    """The random numbers of an answer are a function of it, its problem and its sample's number; in float32
    so is the answer."""
    out: Name | None = None
    """Directory for answers and table; by default runs/evaluate-TIME. One that holds an evaluation that was
    ended goes on."""
    compare: Name | None = None
    """Directory of another evaluation: tell whether this model is better than that one, with a p-value."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and matrix products; `auto` is bfloat16 on accelerators and float32 on CPU."""
    compilation_cache: Name = "auto"
    """Where compiled programs are kept, as in train."""
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


HOW = {
    "out",
    "compare",
    "compilation_cache",
    "mesh",
    "distributed",
    "rows",
    "scoring",
    "files",
}
"""Settings that an evaluation may go on with otherwise: how it is done, not what is asked of whom."""


def check(config: EvaluationConfig, row_parts: int) -> None:
    """Refuse what cannot run.

    Raises:
      ConfigError: with one line that says what to change.
    """
    check_options(config)
    if config.rows % row_parts:
        raise ConfigError(
            f"rows is {config.rows}, which does not divide by the mesh's data x fsdp = {row_parts}"
        )


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Ask, write, and tell.

    Returns:
      What summary.json says.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check(config, row_parts(mesh))
    if in_bucket(config.out or ""):
        raise ConfigError(f"out {config.out} is in a bucket; write to a directory")
    benchmarks = benchmarks_of(config.suite)
    if unknown := sorted(config.files.keys() - {one.name for one in benchmarks}):
        raise ConfigError(
            f"files names {', '.join(unknown)}, which is not in the suite; it has "
            f"{', '.join(one.name for one in benchmarks)}"
        )
    directory = Path(config.out or f"runs/evaluate-{datetime.now():%Y%m%d-%H%M%S}")
    hosts = Hosts(mesh, config.distributed.timeout)
    config = dataclasses.replace(config, step=step_asked(config, directory, hosts))
    read = {one: problems_of(one, config) for one in benchmarks}
    asked = {one: asks_of(one, problems, config) for one, (problems, _) in read.items()}
    number = checksum([ask.problem for asks in asked.values() for ask in asks])
    hosts.require_same(number, "the problems of the suite")
    if is_first():
        if config.compare:
            check_comparison(Path(config.compare), [one.name for one in benchmarks])
        open_directory(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in HOW})
    held = read_answers(directory / ANSWERS) if is_first() else []
    missing = {one: without_done(one.name, asks, held, directory, hosts) for one, asks in asked.items()}
    console = Console(highlight=False, soft_wrap=True, quiet=not is_first())
    for line in (line for _, told in read.values() for line in told):
        console.print(line, markup=False)
    if any(missing.values()):
        ask_all(config, missing, hosts, directory, console)
    if not is_first():
        return {}
    return tell(config, directory, console)


def step_asked(config: EvaluationConfig, directory: Path, hosts: Hosts) -> int | None:
    """The checkpoint that is asked, as the first process knows it: of a run, and None of other models.

    Without a step an evaluation that goes on asks the one that it began with, whatever was saved since.

    Raises:
      ConfigError: the run has no such checkpoint, none of it is whole, or it is no run.
    """
    run = location(config.model)
    if not holds_run(run):
        if config.step is not None:
            raise ConfigError(
                f"{config.model} is not a run directory, so there is no --step {config.step} of it"
            )
        return None
    step = -1
    if is_first():
        began = held_settings(directory).get("step") if config.step is None else config.step
        step = -1 if began is None else steps_of(run, began)[0]
    step = hosts.of_first(step + 1, "the checkpoint is chosen") - 1
    if step >= 0:
        return step
    # Which is whole is known when it is read. It is read again when the model is loaded: an evaluation that
    # goes on must know its step before, and may have nothing left to ask.
    trained = read_trained(run, None, None, hosts)
    if is_first():
        for line in trained.told:
            warn("evaluate", line)
    return trained.step


def problems_of(benchmark: Benchmark, config: EvaluationConfig) -> tuple[list[Problem], tuple[str, ...]]:
    """The problems of a benchmark, and lines for people on answers of it that can never be right."""
    source = judging_source(benchmark.dataset, config.files.get(benchmark.name))
    problems, told = judging_problems(source, config.seed, config.limit)
    if len(problems) > MOST_PROBLEMS:
        raise ConfigError(
            f"{benchmark.name} has {len(problems)} problems; set --limit to {MOST_PROBLEMS} or less"
        )
    return problems, told


def asks_of(benchmark: Benchmark, problems: Sequence[Problem], config: EvaluationConfig) -> list[Ask]:
    """Every answer that a benchmark wants: all problems' first samples, then their second ones, and so on."""
    samples = config.samples or benchmark.samples
    return [Ask(problem, n, sample) for sample in range(samples) for n, problem in enumerate(problems)]


def ask_all(
    config: EvaluationConfig,
    missing: dict[Benchmark, list[Ask]],
    hosts: Hosts,
    directory: Path,
    console: Console,
) -> None:
    """Load the model, and append its answers as they come."""
    found, text = find_asked(config)
    resolved = {
        "model": config.model if holds_run(location(config.model)) else found.name,
        "source": found.name,
        "template": text.template,
        "stop": list(text.stop),
        "compute_dtype": compute_type(config.compute_dtype).name,
    }
    if is_first():
        note_resolved(directory, resolved)
    model, params = load(config, found, hosts)
    asks = [ask for some in missing.values() for ask in some]
    scorers = sorted({ask.problem.scorer for ask in asks})
    pool = ScoringPool(scorers, **dataclasses.asdict(config.scoring))
    verifier = Verifier(text, hosts, pool)
    # One for all: programs are compiled for an engine.
    engine = Engine(model.graph, model.sampling, config.max_response, text.end_tokens, stops=text.stops)
    context = model.config.context
    respondents = {
        one: Respondent(engine, stream_of(config, context, verifier, wanted), verifier, config.rows, one.name)
        for one, wanted in missing.items()
        if wanted
    }
    names, on = ", ".join(one.name for one in respondents), jax.default_backend()
    console.print(
        f"{asked_of(resolved | {'step': config.step})} | {names} | mesh {dict(hosts.mesh.shape)} on {on} | "
        f"answers to {directory}",
        markup=False,
    )
    if endless := text.endless():
        console.print(f"template {text.template}: {endless} (stop)", markup=False)
    first = asks[0].problem
    seen = text.seen(first.question, first.before)
    console.print(f"the model sees, for example: {seen!r}", markup=False)
    key = jax.random.key(config.seed)
    try:
        writing = Writer(directory / ANSWERS, text.seen)
        with bars(console, disable=not is_first()) as progress, writing as writer:
            for benchmark, respondent in respondents.items():
                wanted = missing[benchmark]
                temperature = benchmark.temperature if config.temperature < 0 else config.temperature
                sampling = Sampling(temperature, config.top_k, config.top_p)
                settings = resolved | {
                    "step": config.step,
                    **dataclasses.asdict(sampling),
                    "max_response": config.max_response,
                    "seed": config.seed,
                }
                bar = progress.add_task(benchmark.name, total=len(wanted))
                begun, at = time.perf_counter(), 0
                with waiting(benchmark.name):
                    for answers in respondent.answers(params, wanted, key, sampling):
                        writer.write(benchmark.name, wanted[at : at + len(answers)], answers, settings)
                        at += len(answers)
                        progress.update(bar, completed=at)
                seconds = time.perf_counter() - begun
                console.print(f"{benchmark.name}: {at} answers in {seconds:.0f} s", markup=False)
    finally:
        pool.close()


def find_asked(config: EvaluationConfig) -> tuple[Model, Text]:
    """The model that is asked, of a run the one that it began from, without weights; and its text."""
    run = location(config.model)
    template = None if config.template == "auto" else config.template
    if holds_run(run):
        model = open_model(setting(run, "model", "path"))
        stop = config.stop if config.stop is not None else setting(run, "rollout", "stop", [])
        return model, load_text(model.source, template or setting(run, "data", "template"), stop)
    model = open_model(config.model)
    text = load_text(model.source, template or "plain", config.stop or ())
    if template is None:
        text = dataclasses.replace(text, template="boxed_chat" if text.chats else "boxed")
    return model, text


def load(config: EvaluationConfig, found: Model, hosts: Hosts) -> tuple[PlacedModel, Params]:
    """The weights that are asked: a run's checkpoint, or those of the model that was found.

    Returns:
      (the model, its parameters in the layout for sampling).
    """
    dtype = compute_type(config.compute_dtype)
    run = location(config.model)
    if holds_run(run):
        trained = read_trained(run, config.step, found.name, hosts)
        model = trained.model
        return model, sampling_cast(model.sampling, model.axes, trained.params, dtype)(trained.params)
    model = found.place(hosts.mesh)
    return model, model.read_params(model.sampling, dtype)


def stream_of(config: EvaluationConfig, context: int, verifier: Verifier, asks: Sequence[Ask]) -> QueryStream:
    """What tokenizes the questions of a benchmark, padded as they need.

    Raises:
      ConfigError: a question and the longest answer are more than the model's context.
    """
    longest = context - config.max_response
    asked = dict.fromkeys((ask.problem.question, ask.problem.before) for ask in asks)
    questions, before = zip(*asked, strict=True)
    most = max(verifier.text.query_lengths(questions, before))
    if most > longest:
        raise ConfigError(
            f"max_response {config.max_response} leaves {longest} of the model's context of {context} tokens "
            f"for the question, and the longest has {most}; lower it"
        )
    return QueryStream(None, verifier.text, min(padded_width(most), longest), verifier.hosts)


def tell(config: EvaluationConfig, directory: Path, console: Console) -> dict[str, Any]:
    """Write and show the table, and the comparison if there is to be one."""
    scores = scores_of(read_answers(directory / ANSWERS))
    summaries = [summarize(score) for score in scores.values()]
    console.print(table(summaries))
    told: dict[str, Any] = next((one["settings"] for one in summaries if one["settings"]), {})
    summary: dict[str, Any] = {
        "model": told.get("model", config.model),
        "seed": config.seed,
        **{name: told.get(name) for name in ("step", "source", "template", "stop", "compute_dtype")},
        "benchmarks": summaries,
    }
    place = location(str(directory / SUMMARY))
    write_atomically(place, json.dumps(summary, indent=2) + "\n")
    if config.compare:
        rows = compare(directory / ANSWERS, Path(config.compare) / ANSWERS)
        console.print(comparison_table(rows, str(directory), config.compare))
        summary["compared_with"] = {"evaluation": config.compare, "rows": rows}
        write_atomically(place, json.dumps(summary, indent=2) + "\n")
    console.print(
        f"answers with their verdicts: {directory / ANSWERS}\nnumbers: {directory / SUMMARY}", markup=False
    )
    return summary


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(EvaluationConfig, "evaluate", None)
    interrupted = f"interrupted; the same command with --out {config.out or 'DIR'} goes on"
    mistakes = (ConfigError, CheckpointError, PlacementError)
    failures = (HostError, NotFiniteError, ScorerError, StorageError)
    with leaving_at_once("evaluate"), one_line("evaluate", mistakes, failures, interrupted):
        initialize(config.distributed)
        keep_compiled(config.compilation_cache, None)
        evaluate(config)


if __name__ == "__main__":
    main()
