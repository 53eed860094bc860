"""What a step asked of the machine: memory, and the time for which the devices had nothing to do."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from fr3e_jax.step.metrics import Metrics

ON_DEVICES = ("first_return", "positions", "pilots", "explore", "mismatch", "update")
"""The stages whose time the devices work in. They come one after the other."""


def memory_metrics() -> Metrics:
    """Measure the memory of this process, and of its fullest device where that tells its own."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    metrics: Metrics = {"memory/host": round(host_memory() / 2**30, 4)}
    return metrics | ({"memory/device": round(max(known) / 2**30, 4)} if known else {})


def host_memory() -> int:
    """Find the memory that this process holds now, bytes; where the system is no Linux, the most it held."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def waiting_metrics(stages: Mapping[str, float], seconds: float) -> Metrics:
    """Compute the shares of a step for which it waited for verdicts, and the devices for the host.

    Args:
      stages: seconds of each.
      seconds: of the step.
    """
    busy = sum(stages.get(stage, 0.0) for stage in ON_DEVICES)
    return {
        "time/share_verify": round(stages.get("verify", 0.0) / seconds, 4),
        "time/share_idle": round(max(1.0 - busy / seconds, 0.0), 4),
    }
