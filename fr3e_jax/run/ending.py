"""The rules by which a run ends before its last step: an accuracy that is reached, a budget that is spent."""

from collections.abc import Mapping

from fr3e_jax.config import EndConfig
from fr3e_jax.parallel.hosts import Hosts, is_first
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


def shared_reason(end: EndConfig, accuracies: Mapping[int, float], progress: Progress, hosts: Hosts) -> str:
    """Say which rule ends a run here, the same on every host: what the first one finds."""
    if end == EndConfig(evaluations=end.evaluations):
        return ""
    return hosts.said(
        reason_to_end(end, accuracies, progress) if is_first() else "", "whether the run is decided"
    )
