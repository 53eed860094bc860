"""Rollouts: exploration and plain sampling against other ways to do them, and what they cost as they grow."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from fr3e_jax.bench import compiled
from fr3e_jax.bench.table import TINY, Told, hugging_face_model, in_turns, line, run
from fr3e_jax.config import ConfigError
from fr3e_jax.config.values import Count
from fr3e_jax.engine.branches import Branches, Decoding
from fr3e_jax.engine.rollout import Engine, branch_keys, last
from fr3e_jax.engine.sampler import Sampling, draw
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import (
    DecoderConfig,
    Params,
    abstract_params,
    graph_of,
    init_params,
    logical_axes,
)
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import make_mesh, place_model
from fr3e_jax.planning.topology import available
from fr3e_jax.types import Queries

TPU_SHAPES = (
    # v5p: a copy of 7B to a chip; v5e: its memory holds a quarter.
    compiled.Shape("v5p:2x2x1", (1, 4, 1), 8, 80, (1024, 1024), 1024),
    compiled.Shape("v5e:2x2", (1, 1, 4), 4, 80, (1024, 1024), 1024),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Exploration of one trajectory; lengths are tokens."""

    model: DecoderConfig = TINY
    prompt: int = 64
    response: int = 512
    positions: int = 4
    rollouts: int = 16
    new: int = 160

    @property
    def prefix_length(self) -> np.ndarray:
        """Response tokens of each branch's state, int [C]: at equal distances, the last at its end."""
        ends = np.linspace(0, self.response, self.positions + 1).astype(int)
        return np.repeat(ends, self.rollouts)


def rollout(
    only: str = "",
    repeats: Count = 5,
    json: bool = False,
    plot: Path | None = None,
    occupancy_limit: Count = 2048,
) -> list[Told]:
    """Ratios of rollouts, two CPU cores: exploration, plain sampling, occupancy, cost as the work grows.

    explore_vs_copied: exploration against the same engine with every prefix prefilled and cached by itself.
    explore_vs_hf, sample_vs_hf: against Hugging Face generate (needs torch). occupancy: tokens generated per
    row decoded, of 8 x 80 branches of log-normal lengths. sampler_share: drawing, as a share of a decode step
    of a 0.5B-shaped model. bytes_vs_minimum: memory that a decode step of a 7B-shaped model touches on a TPU,
    against the least (needs libtpu). growth: what doubling one size does to the time.

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
    found = run(
        "rollout",
        MEASUREMENTS,
        only,
        lambda name: occupancy_limit if name == "occupancy" else repeats,
        console,
    )
    if plot is not None:
        draw_growth([told for told in found if told["name"].startswith("growth_")], plot)
        console.print(f"plot: {plot}")
    return found if json else []


# --- the sides


def engine_of(model: DecoderConfig, max_new: int) -> Engine:
    """An engine on one device whose branches do not end before their limit."""
    _, placement = place_model(make_mesh(1, 1, 1), logical_axes(model), abstract_params(model))
    return Engine(graph_of(model), placement, max_new, ())


def opening(engine: Engine) -> Callable[[Params, Branches], Decoding]:
    """`Engine.start` as a program."""
    return jax.jit(lambda params, branches: engine.start(nnx.merge(engine.graph, params), branches))


def explore(work: Work, params: Params) -> Callable[[], Any]:
    """Exploration from caches that first return has filled; with other numbers, which cost the same."""
    model, engine = work.model, engine_of(work.model, work.new)
    prefix = work.prefix_length[None]
    branches = branches_of(model, work.prompt, work.response, prefix, np.full_like(prefix, work.new))
    start = opening(engine)

    def side() -> None:
        decoding = last(engine.decode(params, branches, start(params, branches), Sampling()))
        assert int(decoding.rollouts.length.min()) == work.new

    return side


def branches_of(
    model: DecoderConfig, prompt: int, response: int, prefix: np.ndarray, limit: np.ndarray
) -> Branches:
    """Branches from states with `prefix` int [N, C] tokens of a response, with random caches."""
    rng = np.random.default_rng(0)

    def segment(slots: int, length: Any) -> Segment:
        sizes = (model.num_hidden_layers, len(prefix), model.num_key_value_heads, slots, model.head_dim)
        key, value = (jnp.asarray(rng.standard_normal(sizes, np.float32)) for _ in range(2))
        return Segment(key, value, jnp.asarray(np.broadcast_to(length, prefix.shape), jnp.int32))

    number = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
    return Branches(
        token=jnp.zeros(prefix.shape, jnp.int32),
        position=jnp.asarray(prompt - 1 + prefix, jnp.int32),
        context=(segment(prompt, prompt - 1), segment(response, prefix)),
        limit=jnp.asarray(limit, jnp.int32),
        key=branch_keys(jax.random.key(0), 0, jnp.arange(len(prefix)), number),
    )


def sample(model: DecoderConfig, params: Params, length: np.ndarray, new: int) -> Callable[[], Any]:
    """One answer to each of many prompts of `length` int [B] tokens."""
    engine, rng = engine_of(model, new), np.random.default_rng(0)
    token = rng.integers(2, model.vocab_size, (len(length), length.max())).astype(np.int32)
    index = np.arange(len(length), dtype=np.int32)
    queries = engine.placement.place_rows(Queries(token, length.astype(np.int32), index))

    def side() -> None:
        rollouts, _ = engine.sample(params, queries, jax.random.key(0), 0, 1, Sampling())
        assert int(rollouts.length.min()) == new

    return side


def hugging_face(length: np.ndarray, new: int) -> Callable[[], Any]:
    """Hugging Face generate of the shape of `TINY`, on prompts of int [B] tokens, padded on the left.

    Raises:
      ImportError: without torch.
    """
    import torch

    peer = hugging_face_model().eval()
    token = torch.randint(2, TINY.vocab_size, (len(length), int(length.max())))
    mask = torch.arange(token.shape[1])[None] >= token.shape[1] - torch.tensor(length)[:, None]

    def side() -> None:
        with torch.no_grad():
            peer.generate(
                token,
                attention_mask=mask.long(),
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
            )

    return side


# --- the measurements


def against(name: str, repeats: int, tokens: int, of: str, ours: Any, other: Any) -> list[Told]:
    """Tokens a second of two sides."""
    seconds = in_turns(repeats, ours, other)
    rates = [tokens / each for each in seconds]
    return [line(name, rates[0] / rates[1], rates[0], rates[1], "tokens/s", of)]


def explore_vs_copied(repeats: int) -> list[Told]:
    """The same engine with every branch's prefix prefilled and cached for it alone."""
    work, params = Work(), init_params(TINY, 0)
    copied = sample(TINY, params, work.prompt + work.prefix_length, work.new)
    tokens = work.prefix_length.size * work.new
    of = "1 trajectory of 576 tokens, 5 states x 16 branches, 160 new tokens"
    return against("explore_vs_copied", repeats, tokens, of, explore(work, params), copied)


def explore_vs_hf(repeats: int) -> list[Told]:
    """Hugging Face generate on the 80 prefixes."""
    work, params = Work(), init_params(TINY, 0)
    try:
        other = hugging_face(work.prompt + work.prefix_length, work.new)
    except ImportError:
        return [line("explore_vs_hf", None, None, None, "tokens/s", "needs torch")]
    tokens = work.prefix_length.size * work.new
    return against("explore_vs_hf", repeats, tokens, "the same 80 prefixes", explore(work, params), other)


def sample_vs_hf(repeats: int) -> list[Told]:
    """Hugging Face generate on plain prompts."""
    length = np.full(32, 64)
    try:
        other = hugging_face(length, 128)
    except ImportError:
        return [line("sample_vs_hf", None, None, None, "tokens/s", "needs torch")]
    ours = sample(TINY, init_params(TINY, 0), length, 128)
    return against("sample_vs_hf", repeats, 32 * 128, "32 prompts of 64, 128 new tokens", ours, other)


def occupancy(limit: int) -> list[Told]:
    """Share of decoded rows that generate: 8 trajectories x 80 branches, log-normal lengths.

    The median is 200 and the 95th percentile 1,000 at a limit of 2,048 tokens, and in proportion at others.
    """
    model = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    engine, params = engine_of(model, limit), init_params(model, 0)
    rng, scale = np.random.default_rng(0), limit / 2048
    lengths = scale * np.exp(np.log(200) + np.log(5) / 1.645 * rng.standard_normal((8, 80)))
    lengths = np.clip(np.ceil(lengths), 1, limit).astype(int)
    branches = branches_of(model, 16, 16, np.zeros_like(lengths), lengths)
    start = opening(engine)
    opened, peak = start(params, branches), 0
    for decoding in engine.decode(params, branches, opened, Sampling()):
        peak = max(peak, decoding.own.key.shape[3])
    programs = Engine.advance._cache_size() + 1  # type: ignore[attr-defined]  # and one that opens
    assert (np.asarray(decoding.rollouts.length) == lengths).all()
    needed = max(int((lengths > t).sum()) * t for t in range(limit))
    generated, decoded = int(lengths.sum()), int(decoding.row_steps)
    of = f"8 x 80 branches; {programs} programs"
    return [
        line("occupancy", generated / decoded, generated, decoded, "tokens", of),
        line("cache_vs_need", peak / needed, peak, needed, "tokens", "peak of the branch cache"),
    ]


def sampler_share(repeats: int) -> list[Told]:
    """Drawing 80 tokens, against decoding them, 0.5B shape, float32."""
    model = PRESETS["qwen2.5-0.5b"].config
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, jnp.float32), abstract_params(model))
    work = Work(model=model, prompt=64, response=64, new=4)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((80, model.vocab_size), np.float32))
    uniform = jnp.linspace(0, 0.999, 80)
    found = []
    decode = explore(work, params)
    for label, sampling in (("", Sampling()), ("_filtered", Sampling(0.7, 50, 0.95))):
        drawn = jax.jit(lambda logits, u, s=sampling: jax.vmap(lambda x, v: draw(x, v, s))(logits, u))
        many = [jax.block_until_ready, drawn]

        def draws(many: Any = many) -> None:
            for _ in range(work.new):
                many[0](many[1](logits, uniform))

        ours, step = in_turns(repeats, draws, decode)
        per_token = [1e3 * seconds / work.new for seconds in (ours, step)]
        of = "80 rows, vocabulary 151,936" + (", top-k 50 and top-p 0.95" if label else "")
        found.append(line(f"sampler_share{label}", ours / step, per_token[0], per_token[1], "ms", of))
    return found


def bytes_vs_minimum(_: int) -> list[Told]:
    """Main memory that a decode step touches on TPUs, against weights, shared and own rows once."""
    if not available():
        return [line("bytes_vs_minimum", None, None, None, "GB", "needs libtpu: pip install 'fr3e_jax[tpu]'")]
    found = []
    for shape in TPU_SHAPES:
        told = compiled.compile_decoding(PRESETS["qwen2.5-7b"].config, shape)
        accessed, necessary = told.accessed / 1e9, told.necessary / 1e9
        of = (
            f"7B on {shape.topology}, {shape.trajectories} x {shape.branches} branches; temporaries "
            f"{told.temporary / told.cache:.1%} of the branch cache; copies of it: {len(told.moves)}"
        )
        found.append(line("bytes_vs_minimum", accessed / necessary, accessed, necessary, "GB", of))
    return found


GROWTH = {
    "rollouts": [8, 16, 32, 64],
    "positions": [2, 4, 8, 16],
    "response": [256, 512, 1024, 2048],
    "depth": [4, 8, 16, 32],
}


def growth(repeats: int) -> list[Told]:
    """Seconds of exploration as one size doubles, against the size before; all sizes of a kind in turns."""
    found = []
    for what, sizes in GROWTH.items():
        sides = [explore(*grown(what, size)) for size in sizes]
        seconds = in_turns(max(repeats // 2, 1), *sides)
        for i, size in enumerate(sizes):
            before = seconds[i - 1] if i else None
            ratio = seconds[i] / before if before else None
            found.append(line(f"growth_{what}", ratio, seconds[i], before, "s", f"{what} {size}"))
    return found


def grown(what: str, size: int) -> tuple[Work, Params]:
    """Work with one size changed; half the tokens of the standard one."""
    work = Work(new=80)
    if what == "depth":
        work = dataclasses.replace(work, model=dataclasses.replace(TINY, num_hidden_layers=size))
    else:
        work = dataclasses.replace(work, **{what: size})  # type: ignore[arg-type]
    return work, init_params(work.model, 0)


MEASUREMENTS: dict[str, Callable[[int], list[Told]]] = {
    "explore_vs_copied": explore_vs_copied,
    "explore_vs_hf": explore_vs_hf,
    "sample_vs_hf": sample_vs_hf,
    "occupancy": occupancy,
    "sampler_share": sampler_share,
    "bytes_vs_minimum": bytes_vs_minimum,
    "growth": growth,
}


def draw_growth(found: list[Told], file: Path) -> None:
    """Time relative to the smallest size, over the size relative to the smallest.

    Raises:
      ConfigError: matplotlib is not installed, or nothing was measured.
    """
    if not found:
        raise ConfigError("nothing to plot: --plot needs the measurement growth")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what, points in curves(found):
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


def curves(found: list[Told]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(what grows, its sizes with their seconds)."""
    for what in GROWTH:
        points = [told for told in found if told["name"] == f"growth_{what}"]
        if points:
            yield what, [(float(told["of"].split()[-1]), told["ours"]) for told in points]
