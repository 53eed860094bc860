"""How the time of an exploration grows with its sizes, and a plot of it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fr3e_jax.bench.rollout_sides import Exploration, exploring
from fr3e_jax.bench.table import TINY, Measurement, in_turns, measurement
from fr3e_jax.config import ConfigError
from fr3e_jax.models.decoder import Params, init_params

GROWTH = {
    "rollouts": [8, 16, 32, 64],
    "positions": [2, 4, 8, 16],
    "response": [256, 512, 1024, 2048],
    "depth": [4, 8, 16, 32],
}


def growth(repeats: int) -> list[Measurement]:
    """Time explorations as one size doubles, each against the size before; all sizes of a kind in turns."""
    measurements = []
    for what, sizes in GROWTH.items():
        sides = [exploring(*grown(what, size)) for size in sizes]
        seconds = in_turns(max(repeats // 2, 1), *sides)
        for i, size in enumerate(sizes):
            before = seconds[i - 1] if i else None
            measurements.append(measurement(f"growth_{what}", seconds[i], before, "s", f"{what} {size}"))
    return measurements


def grown(what: str, size: int) -> tuple[Exploration, Params]:
    """Change one size of an exploration that draws 80 tokens: (exploration, parameters)."""
    exploration = Exploration(new=80)
    if what == "depth":
        exploration = dataclasses.replace(
            exploration, model=dataclasses.replace(TINY, num_hidden_layers=size)
        )
    else:
        exploration = dataclasses.replace(exploration, **{what: size})  # type: ignore[arg-type]
    return exploration, init_params(exploration.model, 0)


def draw_growth(measurements: list[Measurement], file: Path) -> None:
    """Plot times relative to the smallest size's over sizes relative to the smallest.

    Raises:
      ConfigError: matplotlib is not installed, or nothing was measured.
    """
    if not measurements:
        raise ConfigError("nothing to plot: --plot needs the measurement growth")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what, points in curves(measurements):
        sizes, seconds = np.array(points).T
        axes.plot(sizes / sizes[0], seconds / seconds[0], marker="o", label=f"{what} from {sizes[0]:.0f}")
    reach = [1, 8]
    axes.plot(reach, reach, color="gray", linestyle=":", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="size, times the smallest", ylabel="time, times the shortest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=120)


def curves(measurements: list[Measurement]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Collect what was measured: (what grows, its sizes with their seconds)."""
    for what in GROWTH:
        points = [one for one in measurements if one["name"] == f"growth_{what}"]
        if points:
            yield what, [(float(one["of"].split()[-1]), one["ours"]) for one in points]
