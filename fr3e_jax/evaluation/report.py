"""The table of an evaluation, for people."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

MEAN = "mean"


def table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Show summaries; of several benchmarks also their mean, in which each counts the same."""
    notes = ["n problems; ± standard error and (95% interval) over them; cut: by the length limit, %"]
    notes += [
        f"{escape(one['benchmark'])}: {one['left_out']} left out, answers of samples that some problems lack"
        for one in summaries
        if one["left_out"]
    ]
    asked = dict.fromkeys(asked_of(one["settings"]) for one in summaries if one["settings"])
    notes += [escape(line) for line in asked]
    shown = Table(title="right answers, %", caption="\n".join(notes))
    add_columns(shown, "benchmark", "n", "avg@k", "pass@k", "maj@k", "cut", "tokens")
    for one in summaries:
        k = one["k"]
        most = max(one["pass"], key=int)
        several = [f"@{most} {percent(one['pass'][most])}", percent(one["maj"])] if k > 1 else ["", ""]
        shown.add_row(
            escape(one["benchmark"]),
            str(one["problems"]),
            f"avg@{k} {percent(one['avg'])}{_error(one)}",
            *several,
            percent(one["truncated"]),
            f"{one['length']:.0f}",
        )
    if len(summaries) > 1:
        shown.add_section()
        shown.add_row(MEAN, "", _mean(summaries))
    return shown


def asked_of(settings: dict[str, Any]) -> str:
    """Describe who was asked and how, for people."""
    step, source = settings["step"], settings["source"]
    who = settings["model"] if step is None else f"step {step} of {settings['model']}, begun from {source}"
    stop = f", stop {settings['stop']}" if settings["stop"] else ""
    return f"{who}; template {settings['template']!r}{stop}, {settings['compute_dtype']}"


def add_columns(shown: Table, *names: str) -> None:
    """Add columns to a table. Where it is narrow, names and intervals take two lines; no number is cut."""
    for name in names:
        if name in ("benchmark", "avg@k", "a - b"):
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True)


def percent(share: float) -> str:
    """Write a share in percent, without the sign."""
    return f"{100 * share:.1f}"


def _mean(summaries: Sequence[dict[str, Any]]) -> str:
    """The mean of benchmarks, whose errors are independent, with its error."""
    mean = percent(float(np.mean([one["avg"] for one in summaries])))
    errors = [one["se"] for one in summaries]
    return mean if None in errors else f"{mean} ± {percent(math.hypot(*errors) / len(errors))}"


def _error(one: dict[str, Any]) -> str:
    if one["se"] is None:
        return ""
    return f" ± {percent(one['se'])} ({percent(one['low'])}\N{EN DASH}{percent(one['high'])})"
