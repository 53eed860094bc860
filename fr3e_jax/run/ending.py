"""The end of a run: at its last step, or before it by an accuracy that is reached, a budget that is spent, an
alarm that goes off, or since too few questions are left.
"""

from collections.abc import Mapping
from typing import Any

from fr3e_jax.config import Config, EndConfig
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.run.alarms import alarm_to_end
from fr3e_jax.run.build import Parts
from fr3e_jax.run.reporter import Reporter, Silent
from fr3e_jax.run.saved import Progress


def reason_to_end(end: EndConfig, accuracies: Mapping[int, float], progress: Progress) -> str:
    """Say which rule ends a run here; empty where none does.

    Args:
      end: the rules.
      accuracies: step -> held-out accuracy, of the steps up to here that were evaluated.
      progress: up to here, with the tokens and FLOPs that were spent.
    """
    last = [accuracies[step] for step in sorted(accuracies)][-end.evaluations :]
    reached = end.accuracy is not None and len(last) == end.evaluations and min(last) >= end.accuracy
    if reached:
        return f"end.accuracy {end.accuracy} is reached in {end.evaluations} evaluations in a row"
    if end.tokens is not None and progress.tokens_generated >= end.tokens:
        return f"end.tokens {end.tokens:,} are spent"
    if end.flops is not None and progress.flops >= end.flops:
        return f"end.flops {end.flops:.3g} are spent"
    return ""


def shared_reason(
    config: Config,
    reporter: Reporter | Silent,
    progress: Progress,
    hosts: Hosts,
    following: Mapping[str, Any] | None = None,
) -> str:
    """Say which rule ends a run here, the same on every host: what the first one finds.

    Args:
      config: with the rules.
      reporter: has reported all steps up to here, but for `following`.
      progress: up to here.
      hosts: all processes.
      following: metrics of a step that is reported next; None where all are reported.
    """
    if config.end == EndConfig(evaluations=config.end.evaluations) and not config.alarms.stop:
        return ""
    reason = ""
    if is_first():
        lines = reporter.lines if following is None else [*reporter.lines, following]
        reason = reason_to_end(config.end, reporter.accuracies, progress)
        reason = reason or alarm_to_end(config.alarms, lines)
    return hosts.said(reason, "whether the run is decided")


def is_last(config: Config, parts: Parts, progress: Progress) -> bool:
    """Decide whether the run ends here: all steps are made, or less than a round of questions is left."""
    if progress.step >= config.steps:
        return True
    difficulty, rates = parts.stream.difficulty, progress.rates
    if difficulty is None or difficulty.retire_above is None or rates is None:
        return False
    return difficulty.left(rates) < parts.round_sizes(config)[0]


def solved_message(config: Config, parts: Parts, progress: Progress) -> str:
    """Say why a run ended before its last step, and what to change."""
    least = parts.round_sizes(config)[0]
    auto = config.rollout.queries == "auto"
    number = "the smallest round of rollout.queries auto," if auto else "rollout.queries"
    return (
        f"the run is complete after step {progress.step} of {config.steps}: fewer than {number} "
        f"{least} questions are left that are not solved (data.retire_above "
        f"{config.data.retire_above}); harder questions, or another --run_dir with a higher "
        "data.retire_above, give it more to learn"
    )


def skipped_message(progress: Progress) -> str:
    """Say why a run ended whose updates were skipped, and what to try."""
    return (
        f"step {progress.step}: {progress.skipped} updates in a row were skipped, since their loss or "
        "gradient was not finite; parameters and moments are as before them. Start again with a lower "
        "optimizer.learning_rate or optimizer.max_grad_norm, or with model.compute_dtype float32; or go on "
        "from here with the same --run_dir, which counts from 0, and a higher optimizer.max_skipped."
    )
