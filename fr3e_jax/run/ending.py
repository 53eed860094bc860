"""The rules by which a run ends before its last step: an accuracy that is reached, a budget that is spent, an
alarm that goes off.
"""

from collections.abc import Mapping
from typing import Any

from fr3e_jax.config import Config, EndConfig
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.run.alarms import alarm_to_end
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
