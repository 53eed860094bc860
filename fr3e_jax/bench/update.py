"""Updates in which every prefix runs once, against the flat form and against torch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fr3e_jax.bench.compiled_update import UpdateShape, compile_update
from fr3e_jax.bench.table import (
    TINY,
    Measurement,
    hugging_face_model,
    in_turns,
    measurement,
    not_measured,
    run_measurements,
)
from fr3e_jax.bench.tunix import updating_with_tunix
from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.config.values import Count
from fr3e_jax.learner.layout import bundles_of, token_counts
from fr3e_jax.learner.state import init_state
from fr3e_jax.models.decoder import DecoderConfig, init_params
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import make_mesh
from fr3e_jax.planning.topology import available
from fr3e_jax.run.build import policy_of_shape
from fr3e_jax.types import Bundle, StateGroups

BUDGET = OptimizerConfig().micro_tokens


@dataclasses.dataclass(frozen=True)
class TreeSizes:
    """Sizes of one kept trajectory with positions at equal distances; lengths are tokens."""

    prompt: int = 256
    response: int = 1024
    positions: int = 4
    rollouts: int = 16

    @property
    def of(self) -> str:
        """Describe the tree of a measurement by its sizes, for the table that is printed."""
        return (
            f"prompt {self.prompt}, response {self.response}, {self.positions + 1} states x {self.rollouts}"
        )


def update(only: str = "", repeats: Count = 3, json: bool = False) -> list[Measurement]:
    """Measure updates on 2 CPU cores, 8.9M parameters, float32.

    token_ratio: tokens of the flat form against those that run when every prefix runs once. update_vs_flat:
    tokens of the flat form a second, against the flat form. update_vs_torch: against the flat form in torch.
    flat_vs_torch: the flat form against torch on 32 rows of 192 tokens. update_vs_tunix: the same rows
    against the update of Tunix (needs google-tunix). padding_waste: tokens computed, padding included, per
    real token, on log-normal lengths. update_memory: temporaries of 1, 4 and 16 chunks of branches,
    7B-shaped, compiled for v5p (needs libtpu). sweep: token_ratio and update_vs_flat over M, K and lengths.

    Args:
      only: names of the measurements to make, with commas; all by default.
      repeats: of each side, in turns; medians are shown.
      json: print an object a line instead of a table.

    Returns:
      What is printed as JSON.
    """
    console = Console(stderr=True) if json else Console()
    measurements = run_measurements("update", UPDATE_MEASUREMENTS, only, lambda _: repeats, console)
    return measurements if json else []


def groups_of_tree(tree: TreeSizes, lengths: np.ndarray | None = None) -> StateGroups:
    """Make the states of one trajectory, with random tokens and log-probabilities.

    Args:
      tree: sizes.
      lengths: int [J, M], of the continuations; by default each goes on to the end of the response.
    """
    rng = np.random.default_rng(0)
    j, m, size = tree.positions + 1, tree.rollouts, tree.response
    prefix = (np.arange(j) * size // j).astype(np.int32)
    if lengths is None:
        lengths = np.broadcast_to((size - prefix)[:, None], (j, m))
    longest = int(lengths.max())

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(2, TINY.vocab_size, shape).astype(np.int32)

    return StateGroups(
        query=np.broadcast_to(tokens(tree.prompt), (j, tree.prompt)),
        query_length=np.full(j, tree.prompt, np.int32),
        prefix=np.broadcast_to(tokens(size), (j, size)),
        prefix_length=prefix,
        token=tokens(j, m, longest),
        logprob=np.full((j, m, longest), -8.3, np.float32),
        length=lengths.astype(np.int32),
        advantage=rng.standard_normal((j, m), np.float32),
        source=np.stack([np.zeros(j), np.zeros(j), np.arange(j)], 1).astype(np.int32),
    )


def forms(tree: TreeSizes) -> tuple[list[Bundle], list[Bundle]]:
    """Lay the states of a tree out in both forms: (every prefix once, flat)."""
    groups = groups_of_tree(tree)
    return bundles_of(groups, 1, BUDGET), bundles_of(groups, 1, BUDGET, shared=False)


# --- the sides


def updating(bundles: list[Bundle], model: DecoderConfig = TINY) -> Callable[[], Any]:
    """Make the side that updates with this project's learner, AdamW included."""
    policy = policy_of_shape(model, make_mesh(1, 1, 1), (), np.dtype(np.float32))
    learner = policy.learner(LossConfig(), OptimizerConfig(logit_chunk=2048, remat=False))
    axes, params = policy.model.axes, init_params(model, 0)
    held = [init_state(policy.model.training, learner.optimizer, axes, params)]

    def side() -> None:
        held[0], metrics = learner.update(held[0], bundles)
        assert np.isfinite(jax.block_until_ready((held[0], metrics))[1]["grad_norm"])

    return side


def updating_with_torch(rows: int, prompt: int, new: int, chunk: int) -> Callable[[], Any]:
    """Make the side that updates in the flat form with torch, `chunk` rows at a time, AdamW included.

    Raises:
      ImportError: without torch.
    """
    import torch

    model = hugging_face_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    token = torch.randint(2, TINY.vocab_size, (rows, prompt + new))
    old, advantage = torch.full((rows, new), -8.3), torch.randn(rows, 1)

    def side() -> None:
        for piece, old_piece, a in zip(
            token.split(chunk), old.split(chunk), advantage.split(chunk), strict=True
        ):
            logits = model(piece, logits_to_keep=new + 1).logits[:, :-1].float()
            logprob = logits.log_softmax(-1).gather(-1, piece[:, -new:, None])[..., 0]
            ratio = (logprob - old_piece).exp()
            loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).sum() / (rows * new)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return side


# --- the measurements


def token_ratio(_: int = 1, tree: TreeSizes | None = None) -> list[Measurement]:
    """Count the tokens of the flat form against those that run when every prefix runs once."""
    tree = tree or TreeSizes()
    shared, flat = (token_counts(form)[0] for form in forms(tree))
    return [measurement("token_ratio", shared, flat, "tokens", tree.of, ratio=flat / shared)]


def update_vs_flat(
    repeats: int, tree: TreeSizes | None = None, name: str = "update_vs_flat"
) -> list[Measurement]:
    """Compare with the same update in the flat form."""
    tree = tree or TreeSizes()
    shared, flat = forms(tree)
    tokens = token_counts(flat)[0]
    seconds = in_turns(repeats, updating(shared), updating(flat))
    return [rates(name, tokens, seconds, tree.of)]


def rates(name: str, tokens: int, seconds: list[float], of: str) -> Measurement:
    """Make a row from the seconds of two sides: tokens of the flat form a second."""
    return measurement(name, tokens / seconds[0], tokens / seconds[1], "flat tokens/s", of)


def update_vs_torch(repeats: int) -> list[Measurement]:
    """Compare with torch, each rollout with its own prefix: as many tokens, padded to the longest."""
    tree = TreeSizes()
    shared, flat = forms(tree)
    rows = (tree.positions + 1) * tree.rollouts
    # Every row has prompt + response tokens. Torch computes fewer logits, which is to its advantage.
    new = int(np.mean([tree.response - p for p in groups_of_tree(tree).prefix_length]))
    try:
        other = updating_with_torch(rows, tree.prompt + tree.response - new, new, 8)
    except ImportError:
        return [not_measured("update_vs_torch", "flat tokens/s", "needs torch")]
    seconds = in_turns(repeats, updating(shared), other)
    return [rates("update_vs_torch", token_counts(flat)[0], seconds, tree.of)]


def flat_vs_torch(repeats: int) -> list[Measurement]:
    """Compare the flat form with torch: the other comparisons are only fair if it is as fast."""
    return flat_against("flat_vs_torch", repeats, lambda: updating_with_torch(32, 64, 128, 32), "torch")


def update_vs_tunix(repeats: int) -> list[Measurement]:
    """Compare the flat form with Tunix, which has no other."""
    return flat_against("update_vs_tunix", repeats, lambda: updating_with_tunix(32, 64, 128), "google-tunix")


def flat_against(
    name: str, repeats: int, other: Callable[[], Callable[[], Any]], package: str
) -> list[Measurement]:
    """Compare the flat form on 32 rows of 192 tokens with the side that `other` makes of a package."""
    _, flat = forms(TreeSizes(prompt=64, response=128, positions=0, rollouts=32))
    try:
        side = other()
    except ImportError:
        return [not_measured(name, "flat tokens/s", f"needs {package}")]
    seconds = in_turns(repeats, updating(flat), side)
    return [rates(name, token_counts(flat)[0], seconds, "32 rows of 192 tokens")]


def padding_waste(_: int) -> list[Measurement]:
    """Count the padding of 8 trajectories x 80 branches of log-normal lengths.

    The median is 200, the 95th percentile 1,000, the limit 2,048.
    """
    rng, trees = np.random.default_rng(0), []
    lengths = np.clip(np.exp(np.log(200) + np.log(5) / 1.645 * rng.standard_normal((8, 5, 16))), 1, 2048)
    for i in range(8):
        groups = groups_of_tree(TreeSizes(), np.ceil(lengths[i]).astype(int))
        wider = np.pad(groups.token, ((0, 0), (0, 0), (0, 2048 - groups.token.shape[2])))
        old = np.pad(groups.logprob, ((0, 0), (0, 0), (0, 2048 - groups.logprob.shape[2])))
        source = groups.source + np.array([i, 0, 0], np.int32)
        trees.append(dataclasses.replace(groups, token=wider, logprob=old, source=source))
    together = jax.tree.map(lambda *x: np.concatenate(x), *trees)
    measurements = []
    for parts in (1, 4):
        bundles = bundles_of(together, parts, BUDGET)
        real, padded = token_counts(bundles)
        shapes = {
            (chunk.token.shape, window, bundle.trunks.token.shape if bundle.trunks else None)
            for bundle in bundles
            for chunk, window in zip(bundle.chunks, bundle.window, strict=True)
        }
        of = f"8 x 80 branches over {parts} part(s) of a mesh; {len(shapes)} shapes of chunks"
        measurements.append(measurement("padding_waste", padded, real, "tokens", of))
    return measurements


def update_memory(_: int) -> list[Measurement]:
    """Compare the temporaries of the largest program for branches that fill 1, 4 and 16 chunks."""
    mesh, model = (1, 4, 1), PRESETS["qwen2.5-7b"].config
    if not available():
        return [not_measured("update_memory", "GiB", "needs libtpu: pip install 'fr3e_jax[tpu]'")]
    counts, largest = [], []
    for rollouts in (8, 32, 128):
        groups = groups_of_tree(TreeSizes(prompt=1024, response=4096, positions=0, rollouts=rollouts))
        (bundle,) = bundles_of(groups, 4, BUDGET)
        assert bundle.trunks is not None
        _, trunks, trunk = bundle.trunks.token.shape
        shapes = {
            UpdateShape(
                "v5p:2x2x1", mesh, trunks=trunks, trunk=trunk, rows=rows // 4, length=width - 1, window=window
            )
            for (rows, width), window in zip(
                (c.token.shape for c in bundle.chunks), bundle.window, strict=True
            )
        }
        programs = [program for shape in shapes for program in compile_update(model, shape).values()]
        counts.append(len(bundle.chunks))
        largest.append(max(program.memory_analysis().temp_size_in_bytes for program in programs) / 2**30)
    of = "7B on v5p:2x2x1, fsdp 4, responses of 4,096"
    return [
        measurement("update_memory", each, largest[0], "GiB", f"{count} chunk(s) a part; {of}")
        for count, each in zip(counts, largest, strict=True)
    ]


SWEEP_FROM = TreeSizes(prompt=128, response=256, rollouts=4)
SWEEP = {"rollouts": [2, 4, 16], "positions": [1, 4, 8], "response": [128, 256, 1024], "prompt": [32, 512]}


def sweep(repeats: int) -> list[Measurement]:
    """Compare both forms as one size of a small tree changes at a time."""
    measurements = []
    for what, sizes in SWEEP.items():
        for size in sizes:
            tree = dataclasses.replace(SWEEP_FROM, **{what: size})
            (tokens,) = token_ratio(tree=tree)
            measurements.append(tokens | {"name": f"sweep_{what}_token_ratio"})
            measurements += update_vs_flat(repeats, tree, f"sweep_{what}")
    return measurements


UPDATE_MEASUREMENTS: dict[str, Callable[[int], list[Measurement]]] = {
    "token_ratio": token_ratio,
    "update_vs_flat": update_vs_flat,
    "update_vs_torch": update_vs_torch,
    "flat_vs_torch": flat_vs_torch,
    "update_vs_tunix": update_vs_tunix,
    "padding_waste": padding_waste,
    "update_memory": update_memory,
    "sweep": sweep,
}
