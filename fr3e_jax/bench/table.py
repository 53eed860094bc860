"""What the benchmarks share: the tiny model, timing sides in turns, and the table."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fr3e_jax.bench.process import measure
from fr3e_jax.config import ConfigError
from fr3e_jax.models.presets import qwen25

Told = dict[str, Any]

TINY = dataclasses.replace(qwen25(256, 8, 4, 2, 1_024, 4_096, tied=True), max_position_embeddings=4_096)
"""8.92 million parameters."""

COLUMNS = ("ratio", "ours", "other")


def line(name: str, ratio: float | None, ours: float | None, other: float | None, unit: str, of: str) -> Told:
    """A measurement; `of` says what was measured, or why it was not."""
    return {"name": name, "ratio": ratio, "ours": ours, "other": other, "unit": unit, "of": of}


def in_turns(repeats: int, *sides: Callable[[], Any]) -> list[float]:
    """Median seconds of each side, after one run of each that compiles."""
    times: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for _ in range(repeats):
        for seconds, side in zip(times, sides, strict=True):
            start = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def hugging_face_model() -> Any:
    """A random model of the shape of `TINY` in torch.

    Raises:
      ImportError: without torch.
    """
    import torch
    import transformers

    config = transformers.Qwen2Config(
        **{
            field.name: getattr(TINY, field.name)
            for field in dataclasses.fields(TINY)
            if field.name not in ("qkv_bias", "qk_norm", "yarn", "rope_theta", "head_dim")
        },
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config)


def run(
    title: str,
    measurements: Mapping[str, Callable[[int], list[Told]]],
    only: str,
    argument: Callable[[str], int],
    console: Console,
) -> list[Told]:
    """Make measurements, each in a process of its own, and print the table.

    Args:
      only: names of those to make, with commas; empty for all.
      argument: what a measurement is called with.

    Raises:
      ConfigError: an unknown name.
    """
    chosen = [name for name in only.split(",") if name] or list(measurements)
    if unknown := [name for name in chosen if name not in measurements]:
        raise ConfigError(f"no measurement {', '.join(unknown)}; there are {', '.join(measurements)}")
    found: list[Told] = []
    for name in track(chosen, "measuring", console=Console(stderr=True), transient=True):
        found += measure(measurements[name], argument(name), devices=1)
    table = Table(title=f"python -m fr3e_jax.bench {title}")
    for column in ("name", "ratio", "ours", "other", "unit", "of"):
        table.add_column(column)
    for told in found:
        cells = [f"{told[column]:.3g}" if told[column] is not None else "-" for column in COLUMNS]
        table.add_row(told["name"], *cells, told["unit"], told["of"])
    console.print(table)
    return found
