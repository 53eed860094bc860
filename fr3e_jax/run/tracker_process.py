"""The process of a tracker: `python -m fr3e_jax.run.tracker_process NAME`, with one JSON object a line.

The first line has the settings, each other one a step: its metrics, and a state with two continuations. The
process ends with its standard input. Whatever is raised ends it alone.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SAMPLE_COLUMNS: dict[str, type] = {
    "step": int,
    "question": str,
    "answer": str,
    "prefix": str,
    "position": int,
    "entropy": float,
    "continuation": str,
    "reward": float,
    "value": float,
}
"""The columns of a table of sampled rollouts, a row a continuation, and the one type that each has."""

SampleRows = list[list[Any]]


class Opened(NamedTuple):
    """A tracker that takes steps.

    log: takes a step, name -> number, and the rows of a table of rollouts, of which there may be none. close:
    sends what is left.
    """

    log: Callable[[int, Mapping[str, float], SampleRows], None]
    close: Callable[[], None]


def open_tensorboard(settings: Mapping[str, Any]) -> Opened:
    """Write event files. Steps that a killed run had made, and that it makes again, are taken out."""
    from tensorboardX import SummaryWriter

    place = f"{settings['directory'].rstrip('/')}/tensorboard"
    writer = SummaryWriter(place, purge_step=settings["first_step"])

    def log(step: int, numbers: Mapping[str, float], rows: SampleRows) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        if rows:
            writer.add_text("rollouts", markdown_table(list(SAMPLE_COLUMNS), rows), step)
        writer.flush()

    return Opened(log, writer.close)


def open_wandb(settings: Mapping[str, Any]) -> Opened:
    """Go on under the run's id, or begin it. What is sent again of a step that is there is dropped."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(
        project=settings["project"],
        name=settings["name"],
        id=settings["id"],
        resume="allow",
        dir=settings["scratch"],
        config=settings["config"],
    )

    def log(step: int, numbers: Mapping[str, float], rows: SampleRows) -> None:
        table = {"rollouts": wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)} if rows else {}
        run.log({**numbers, **table}, step=step)

    return Opened(log, run.finish)


def open_trackio(settings: Mapping[str, Any]) -> Opened:
    """Go on under the run's name, which has its id in it, or begin it."""
    import trackio

    trackio.init(
        project=settings["project"],
        name=f"{settings['name']}-{settings['id']}",
        resume="allow",
        config=settings["config"],
        embed=False,
    )

    def log(step: int, numbers: Mapping[str, float], rows: SampleRows) -> None:
        table = {"rollouts": trackio.Table(columns=list(SAMPLE_COLUMNS), data=rows)} if rows else {}
        trackio.log({**numbers, **table}, step=step)

    return Opened(log, trackio.finish)


OPENERS: dict[str, Callable[[Mapping[str, Any]], Opened]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers, under their names; others cannot be drawn."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "step" and math.isfinite(value)
    }


def rows_of(step: int, sample: Mapping[str, Any] | None) -> SampleRows:
    """A row for each continuation of a state, of the types of `SAMPLE_COLUMNS`."""
    if sample is None:
        return []
    rows = []
    for continuation, reward in zip(sample["continuations"], sample["rewards"], strict=True):
        known = {**sample, "step": step, "continuation": continuation, "reward": reward}
        rows.append([as_column(kind, known.get(name, kind())) for name, kind in SAMPLE_COLUMNS.items()])
    return rows


def as_column(kind: type, value: Any) -> Any:
    """A value in the type of its column; of a text, what UTF-8 has no bytes for becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else kind(value)


def markdown_table(columns: Sequence[str], rows: SampleRows) -> str:
    """A table in Markdown, of which texts stay text: as code, in one line."""

    def cell(value: Any) -> str:
        if not isinstance(value, str):
            return f"{value:g}"
        return "`` " + value.replace("`", "'").replace("|", "\N{BROKEN BAR}").replace("\n", "\\n") + " ``"

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pass_to(name: str, lines: Iterator[str]) -> None:
    """Pass what the lines say to a tracker, until there are no more."""
    tracker = OPENERS[name](json.loads(next(lines)))
    for line in lines:
        message = json.loads(line)
        metrics, sample = message["metrics"], message["sample"]
        tracker.log(metrics["step"], numbers_of(metrics), rows_of(metrics["step"], sample))
    tracker.close()


if __name__ == "__main__":
    pass_to(sys.argv[1], iter(sys.stdin))
