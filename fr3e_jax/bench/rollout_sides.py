"""The sides that the benchmarks of rollouts compare, as functions to be timed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fr3e_jax.bench.table import TINY, hugging_face_model
from fr3e_jax.engine.branches import Branches, Decoding
from fr3e_jax.engine.budget import needed_bytes
from fr3e_jax.engine.rollout import Engine, last
from fr3e_jax.engine.sampler import Sampling, branch_keys
from fr3e_jax.engine.schedule import Room
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import DecoderConfig, Params
from fr3e_jax.parallel.mesh import make_mesh
from fr3e_jax.run.build import policy_of_shape
from fr3e_jax.types import Queries, States


@dataclasses.dataclass(frozen=True)
class Exploration:
    """The sizes of an exploration of one trajectory; lengths are tokens."""

    model: DecoderConfig = TINY
    prompt: int = 64
    response: int = 512
    positions: int = 4
    rollouts: int = 16
    new: int = 160

    @property
    def prefix_length(self) -> np.ndarray:
        """Response tokens of each branch's state, int [C]: from none to all, at equal distances."""
        ends = np.linspace(0, self.response, self.positions + 1).astype(int)
        return np.repeat(ends, self.rollouts)


def engine_of(model: DecoderConfig, max_new: int) -> Engine:
    """Make an engine on one device whose branches do not end before their limit."""
    return policy_of_shape(model, make_mesh(1, 1, 1), (), jnp.dtype(jnp.float32)).engine(max_new)


def opening(engine: Engine) -> Callable[[Params, Branches], Decoding]:
    """Compile `Engine.start` as a program of its own."""

    @jax.jit
    def start(params: Params, branches: Branches) -> Decoding:
        return engine.start(nnx.merge(engine.graph, params), branches, branches.context.key.shape[3])

    return start


def with_pages(engine: Engine, model: DecoderConfig, branches: Branches, tokens: float) -> Engine:
    """Let an engine have pages for so many tokens, beside what branches share."""
    (n, c), slots = branches.token.shape, branches.context.key.shape[3]
    room = Room(engine.sizes, n, c, engine.max_new, 0)
    pages = int(tokens / (room.sizes.rows * room.sizes.slots))
    room = dataclasses.replace(room, pages=max(pages, room.most))
    needed = needed_bytes(model, engine.placement, room, slots, branches.context.key.dtype)
    return dataclasses.replace(engine, cache_bytes=needed)


def exploring(exploration: Exploration, params: Params) -> Callable[[], Any]:
    """Make the side that explores: it prefills the trajectory, and decodes from its states."""
    model, engine = exploration.model, engine_of(exploration.model, exploration.new)
    prefix = exploration.prefix_length[None]
    branches = branches_of(
        model, exploration.prompt, exploration.response, prefix, np.full_like(prefix, exploration.new)
    )
    start, rng = opening(engine), np.random.default_rng(0)
    token = rng.integers(2, model.vocab_size, (1, exploration.prompt + exploration.response)).astype(np.int32)
    query, response = token[:, : exploration.prompt], token[:, exploration.prompt :]
    none = np.zeros((1, 1), np.int32)
    trajectory = engine.placement.place_rows(
        (
            Queries(query, np.full(1, exploration.prompt, np.int32), none[0]),
            States(none[0], none[0], response, none, none == 0),
        )
    )

    def side() -> None:
        caches = engine.prefill_trajectories(params, *trajectory)
        opened = dataclasses.replace(branches, context=caches._replace(length=branches.position))
        decoding = last(engine.decode(params, opened, start(params, opened), Sampling()))
        assert int(decoding.rollouts.length.min()) == exploration.new

    return side


def branches_of(
    model: DecoderConfig, prompt: int, response: int, prefix: np.ndarray, limit: np.ndarray
) -> Branches:
    """Make branches from states, with random caches.

    Args:
      model: the architecture.
      prompt, response: tokens of every query, and slots of every base response.
      prefix: int [N, C], response tokens of each branch's state.
      limit: int [N, C], tokens that each branch draws.
    """
    rng = np.random.default_rng(0)

    slots = prompt + response
    sizes = (model.num_hidden_layers, len(prefix), model.num_key_value_heads, slots, model.head_dim)
    key, value = (jnp.asarray(rng.standard_normal(sizes, np.float32)) for _ in range(2))
    position = jnp.asarray(prompt - 1 + prefix, jnp.int32)
    number = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
    return Branches(
        token=jnp.zeros(prefix.shape, jnp.int32),
        position=position,
        context=Segment(key, value, position),
        limit=jnp.asarray(limit, jnp.int32),
        key=branch_keys(jax.random.key(0), 0, jnp.arange(len(prefix)), number),
    )


def sampling(model: DecoderConfig, params: Params, length: np.ndarray, new: int) -> Callable[[], Any]:
    """Make the side that samples `new` tokens to each of B prompts of `length` int [B] tokens."""
    engine, rng = engine_of(model, new), np.random.default_rng(0)
    token = rng.integers(2, model.vocab_size, (len(length), length.max())).astype(np.int32)
    index = np.arange(len(length), dtype=np.int32)
    queries = engine.placement.place_rows(Queries(token, length.astype(np.int32), index))

    def side() -> None:
        rollouts, _ = engine.sample(params, queries, jax.random.key(0), 0, 1, Sampling())
        assert int(rollouts.length.min()) == new

    return side


def generating_with_hugging_face(length: np.ndarray, new: int) -> Callable[[], Any]:
    """Make the side that generates with Hugging Face and a model of the shape of `TINY`.

    Prompts have `length` int [B] tokens, padded on the left.

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
