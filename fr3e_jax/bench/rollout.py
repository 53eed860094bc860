"""Rollouts: exploration and plain sampling against other ways to do them, and what they cost as they grow."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from fr3e_jax.bench.compiled import DecodingShape, compile_decoding
from fr3e_jax.bench.growth import draw_growth, growth
from fr3e_jax.bench.process import compilations
from fr3e_jax.bench.rollout_sides import (
    Exploration,
    branches_of,
    engine_of,
    exploring,
    generating_with_hugging_face,
    opening,
    sampling,
    with_pages,
)
from fr3e_jax.bench.table import TINY, Measurement, in_turns, measurement, not_measured, run_measurements
from fr3e_jax.config.values import Count
from fr3e_jax.engine.rollout import last
from fr3e_jax.engine.sampler import Sampling, draw
from fr3e_jax.models.decoder import abstract_params, init_params
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.planning.topology import available

TPU_SHAPES = (
    # v5p: a copy of 7B to a chip; v5e: its memory holds a quarter.
    DecodingShape("v5p:2x2x1", (1, 4, 1), trajectories=8, branches=80, shared=2048, slots=1024),
    DecodingShape("v5e:2x2", (1, 1, 4), trajectories=4, branches=80, shared=2048, slots=1024),
)


def rollout(
    only: str = "",
    repeats: Count = 5,
    json: bool = False,
    plot: Path | None = None,
    occupancy_limit: Count = 2048,
) -> list[Measurement]:
    """Measure rollouts on 2 CPU cores: exploration, plain sampling, occupancy, cost as the work grows.

    explore_vs_copied: exploration against the same engine with every prefix prefilled and cached by itself.
    explore_vs_hf, sample_vs_hf: against Hugging Face generate (needs torch). occupancy: tokens generated per
    row decoded, of 8 x 80 branches of log-normal lengths. sampler_share: drawing, as a share of a decode step
    of a 0.5B-shaped model. bytes_vs_minimum: main memory that a decode step of a 7B-shaped model touches on a
    TPU, against the least (needs libtpu). growth: the time as one size doubles.

    Args:
      only: names of the measurements to make, with commas; all by default.
      repeats: of each side, in turns; medians are shown.
      json: print an object a line instead of a table.
      plot: file to draw the growth into.
      occupancy_limit: longest branch of the occupancy measurement, tokens.

    Returns:
      What is printed as JSON.
    """
    console = Console(stderr=True) if json else Console()
    measurements = run_measurements(
        "rollout",
        ROLLOUT_MEASUREMENTS,
        only,
        lambda name: occupancy_limit if name == "occupancy" else repeats,
        console,
    )
    if plot is not None:
        draw_growth([one for one in measurements if one["name"].startswith("growth_")], plot)
        console.print(f"plot: {plot}")
    return measurements if json else []


def against(name: str, repeats: int, *, tokens: int, of: str, ours: Any, other: Any) -> list[Measurement]:
    """Compare the tokens a second of two sides that generate as many."""
    seconds = in_turns(repeats, ours, other)
    rates = [tokens / each for each in seconds]
    return [measurement(name, rates[0], rates[1], "tokens/s", of)]


CACHE_TO_NEED = 1.5
"""Slots of the pages in `occupancy`, to the most tokens that are alive if all branches begin at once."""


def explore_vs_copied(repeats: int) -> list[Measurement]:
    """Compare with the same engine where every branch's prefix is prefilled and cached for it alone."""
    work, params = Exploration(), init_params(TINY, 0)
    copied = sampling(TINY, params, work.prompt + work.prefix_length, work.new)
    return against(
        "explore_vs_copied",
        repeats,
        tokens=work.prefix_length.size * work.new,
        of="1 trajectory of 576 tokens, 5 states x 16 branches, 160 new tokens",
        ours=exploring(work, params),
        other=copied,
    )


def explore_vs_hf(repeats: int) -> list[Measurement]:
    """Compare with Hugging Face generate on the 80 prefixes."""
    work, params = Exploration(), init_params(TINY, 0)
    try:
        other = generating_with_hugging_face(work.prompt + work.prefix_length, work.new)
    except ImportError:
        return [not_measured("explore_vs_hf", "tokens/s", "needs torch")]
    return against(
        "explore_vs_hf",
        repeats,
        tokens=work.prefix_length.size * work.new,
        of="the same 80 prefixes",
        ours=exploring(work, params),
        other=other,
    )


def sample_vs_hf(repeats: int) -> list[Measurement]:
    """Compare with Hugging Face generate on plain prompts."""
    length = np.full(32, 64)
    try:
        other = generating_with_hugging_face(length, 128)
    except ImportError:
        return [not_measured("sample_vs_hf", "tokens/s", "needs torch")]
    return against(
        "sample_vs_hf",
        repeats,
        tokens=32 * 128,
        of="32 prompts of 64, 128 new tokens",
        ours=sampling(TINY, init_params(TINY, 0), length, 128),
        other=other,
    )


def occupancy(limit: int) -> list[Measurement]:
    """Measure the share of decoded rows that generate: 8 trajectories x 80 branches, log-normal lengths.

    The median is 200 and the 95th percentile 1,000 at a limit of 2,048 tokens, and in proportion at others.
    """
    model = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    engine, params = engine_of(model, limit), init_params(model, 0)
    rng, scale = np.random.default_rng(0), limit / 2048
    lengths = scale * np.exp(np.log(200) + np.log(5) / 1.645 * rng.standard_normal((8, 80)))
    lengths = np.clip(np.ceil(lengths), 1, limit).astype(int)
    branches = branches_of(model, 16, 16, np.zeros_like(lengths), lengths)
    needed = max(int((lengths > t).sum()) * t for t in range(limit))
    engine = with_pages(engine, model, branches, CACHE_TO_NEED * needed)
    with compilations("start", "advance", "copy") as compiled:
        opened = opening(engine)(params, branches)
        decoding = last(engine.decode(params, branches, opened, Sampling()))
    assert (np.asarray(decoding.rollouts.length) == lengths).all()
    held = decoding.pages.key.shape[1] * engine.sizes.rows * engine.sizes.slots
    generated, decoded = int(lengths.sum()), int(decoding.row_steps)
    of = f"8 x 80 branches; {len(compiled)} programs"
    return [
        measurement("occupancy", generated, decoded, "tokens", of),
        measurement("cache_vs_need", held, needed, "tokens", "slots of all pages"),
    ]


def sampler_share(repeats: int) -> list[Measurement]:
    """Time the drawing of 80 tokens against the decoding of them, 0.5B shape, float32."""
    model = PRESETS["qwen2.5-0.5b"].config
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, jnp.float32), abstract_params(model))
    work = Exploration(model=model, prompt=64, response=64, new=4)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((80, model.vocab_size), np.float32))
    uniform = jnp.linspace(0, 0.999, 80)
    measurements = []
    decode = exploring(work, params)
    for label, chosen in (("", Sampling()), ("_filtered", Sampling(0.7, 50, 0.95))):
        drawn = jax.jit(lambda logits, u, s=chosen: jax.vmap(lambda x, v: draw(x, v, s))(logits, u))
        many = [jax.block_until_ready, drawn]

        def draws(many: Any = many) -> None:
            for _ in range(work.new):
                many[0](many[1](logits, uniform))

        ours, step = in_turns(repeats, draws, decode)
        per_token = [1e3 * seconds / work.new for seconds in (ours, step)]
        of = "80 rows, vocabulary 151,936" + (", top-k 50 and top-p 0.95" if label else "")
        name = f"sampler_share{label}"
        measurements.append(measurement(name, per_token[0], per_token[1], "ms", of))
    return measurements


def bytes_vs_minimum(_: int) -> list[Measurement]:
    """Count the main memory that a decode step touches on TPUs, against weights, shared and own rows once."""
    name, measurements = "bytes_vs_minimum", []
    if not available():
        return [not_measured(name, "GB", "needs libtpu: pip install 'fr3e_jax[tpu]'")]
    for shape in TPU_SHAPES:
        compiled = compile_decoding(PRESETS["qwen2.5-7b"].config, shape)
        accessed, necessary = compiled.accessed / 1e9, compiled.necessary / 1e9
        of = (
            f"7B on {shape.topology}, {shape.trajectories} x {shape.branches} branches; temporaries "
            f"{compiled.temporary / compiled.pages:.1%} of the pages; copies of caches: "
            f"{len(compiled.moves)}"
        )
        measurements.append(measurement(name, accessed, necessary, "GB", of))
    return measurements


ROLLOUT_MEASUREMENTS: dict[str, Callable[[int], list[Measurement]]] = {
    "explore_vs_copied": explore_vs_copied,
    "explore_vs_hf": explore_vs_hf,
    "sample_vs_hf": sample_vs_hf,
    "occupancy": occupancy,
    "sampler_share": sampler_share,
    "bytes_vs_minimum": bytes_vs_minimum,
    "growth": growth,
}
