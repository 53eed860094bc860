"""A tiny model, the timing of sides in turns and the table of results: what the benchmarks share."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fr3e_jax.bench.process import in_fresh_process
from fr3e_jax.config import ConfigError
from fr3e_jax.models.presets import qwen25

Measurement = dict[str, Any]
"""name, ratio (ours / other, or as the name says), ours, other, unit, of (what was measured)."""

TINY = dataclasses.replace(
    qwen25(hidden=256, layers=8, heads=4, kv_heads=2, intermediate=1_024, vocab=4_096, tied=True),
    max_position_embeddings=4_096,
)
"""8.92 million parameters."""

COLUMNS = ("ratio", "ours", "other")


def measurement(
    name: str, ours: float, other: float | None, unit: str, of: str, ratio: float | None = None
) -> Measurement:
    """Make a row of the table.

    Args:
      name: of the measurement.
      ours, other: numbers of the two sides; `other` None where there is nothing to compare with.
      unit: of the numbers.
      of: what was measured.
      ratio: by default ours / other.
    """
    if ratio is None and other is not None:
        ratio = ours / other
    return {"name": name, "ratio": ratio, "ours": ours, "other": other, "unit": unit, "of": of}


def not_measured(name: str, unit: str, why: str) -> Measurement:
    """Make a row of the table without numbers, that says why there are none."""
    return {"name": name, "ratio": None, "ours": None, "other": None, "unit": unit, "of": why}


def in_turns(repeats: int, *sides: Callable[[], Any]) -> list[float]:
    """Time each side `repeats` times, in turns, after one run of each that compiles: median seconds."""
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
    """Make a random model of the shape of `TINY` in torch.

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


def run_measurements(
    title: str,
    functions: Mapping[str, Callable[[int], list[Measurement]]],
    only: str,
    argument: Callable[[str], int],
    console: Console,
) -> list[Measurement]:
    """Make measurements, each in a process of its own, and print the table.

    Args:
      title: name of the benchmark.
      functions: name -> the function that measures.
      only: names of those to call, with commas; empty for all.
      argument: name -> what its function is called with.
      console: to print on.

    Raises:
      ConfigError: an unknown name.
    """
    chosen = [name for name in only.split(",") if name] or list(functions)
    if unknown := [name for name in chosen if name not in functions]:
        raise ConfigError(f"no measurement {', '.join(unknown)}; there are {', '.join(functions)}")
    measurements: list[Measurement] = []
    for name in track(chosen, "measuring", console=Console(stderr=True), transient=True):
        measurements += in_fresh_process(functions[name], argument(name), devices=1)
    table = Table(title=f"python -m fr3e_jax.bench {title}")
    for column in ("name", "ratio", "ours", "other", "unit", "of"):
        table.add_column(column)
    for row in measurements:
        cells = [f"{row[column]:.3g}" if row[column] is not None else "-" for column in COLUMNS]
        table.add_row(row["name"], *cells, row["unit"], row["of"])
    console.print(table)
    return measurements
