"""Asking a model the problems of benchmarks: every answer is written as it comes."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fr3e_jax.config import ConfigError, RewardConfig
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.evaluation.answers import MOST_PROBLEMS, Ask, Respondent
from fr3e_jax.evaluation.asked_model import AskedModel, load_asked
from fr3e_jax.evaluation.record import ANSWERS, Writer
from fr3e_jax.evaluation.report import asked_of
from fr3e_jax.evaluation.scores import HowAsked
from fr3e_jax.evaluation.settings import EvaluationConfig
from fr3e_jax.evaluation.suites import Benchmark, source_of
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.parallel.waiting import waiting
from fr3e_jax.pretrained.model import compute_type
from fr3e_jax.problems.corpus import judging_problems
from fr3e_jax.problems.stream import QueryStream, padded_width
from fr3e_jax.progress import bars
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.trained import Trained
from fr3e_jax.types import Problem


def asked_problems(benchmark: Benchmark, config: EvaluationConfig) -> tuple[list[Problem], tuple[str, ...]]:
    """Read the problems of a benchmark.

    Returns:
      (the problems, lines for people on answers that no response can be right for).
    """
    source = source_of(benchmark, config.files.get(benchmark.name))
    problems, messages = judging_problems(source, config.seed, config.limit)
    if len(problems) > MOST_PROBLEMS:
        raise ConfigError(
            f"{benchmark.name} has {len(problems)} problems; set --limit to {MOST_PROBLEMS} or less"
        )
    return problems, messages


def asks_of(benchmark: Benchmark, problems: Sequence[Problem], config: EvaluationConfig) -> list[Ask]:
    """List the answers that a benchmark wants: first samples of all problems, then second ones, and so on."""
    samples = config.samples or benchmark.samples
    return [Ask(problem, n, sample) for sample in range(samples) for n, problem in enumerate(problems)]


def resolved_settings(config: EvaluationConfig, asked: AskedModel) -> dict[str, Any]:
    """What the settings of a command come to: the model with its commit, what `auto` stands for."""
    return {
        "model": config.model if asked.run else asked.model.name,
        "source": asked.model.name,
        "template": asked.text.template,
        "stop": list(asked.text.stop),
        "compute_dtype": compute_type(config.compute_dtype).name,
    }


def how_asked(
    config: EvaluationConfig, benchmark: Benchmark, resolved: Mapping[str, Any], problems: Sequence[Problem]
) -> HowAsked:
    """How a benchmark is going to be asked."""
    temperature = benchmark.temperature if config.temperature < 0 else config.temperature
    settings = {
        **resolved,
        "step": config.step,
        "temperature": temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "max_response": config.max_response,
        "seed": config.seed,
        "success_at": config.success_at,
    }
    numbered = {n: (problem.question, problem.answer) for n, problem in enumerate(problems)}
    return HowAsked(settings, config.samples or benchmark.samples, numbered)


def ask_all(
    config: EvaluationConfig,
    asked: AskedModel,
    trained: Trained | None,
    missing: dict[Benchmark, list[Ask]],
    planned: Mapping[str, HowAsked],
    hosts: Hosts,
    directory: Path,
    console: Console,
) -> None:
    """Load the model, and append its answers as they come.

    Args:
      config: settings of the command, with the step of a run.
      asked: the model.
      trained: its checkpoint, if it was read already.
      missing: the answers that are wanted.
      planned: benchmark -> how it is asked.
      hosts: all processes.
      directory: of the evaluation.
      console: where people read.
    """
    text = asked.text
    policy, params = load_asked(config, asked, trained, hosts)
    asks = [ask for some in missing.values() for ask in some]
    scorers = sorted({ask.problem.scorer for ask in asks})
    pool = ScoringPool(scorers, **dataclasses.asdict(config.scoring))
    verifier = Verifier(text, hosts, pool, RewardConfig(success_at=config.success_at))
    # One engine for all benchmarks: programs are compiled for an engine.
    engine, context = policy.engine(config.max_response), policy.model.config.context
    respondents = {
        one: Respondent(engine, stream_of(config, context, verifier, wanted), verifier, config.rows, one.name)
        for one, wanted in missing.items()
        if wanted
    }
    names, on = ", ".join(one.name for one in respondents), jax.default_backend()
    console.print(
        f"{asked_of(planned[next(iter(respondents)).name].settings)} | {names} | mesh "
        f"{dict(hosts.mesh.shape)} on {on} | answers to {directory}",
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
                wanted, settings = missing[benchmark], planned[benchmark.name].settings
                sampling = Sampling(settings["temperature"], settings["top_k"], settings["top_p"])
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


def stream_of(config: EvaluationConfig, context: int, verifier: Verifier, asks: Sequence[Ask]) -> QueryStream:
    """Make what tokenizes the questions of a benchmark, padded to the width that they need.

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
