"""What the engine and the learner ask of a model, and what is done for every model alike.

A model is three classes: a config (`DecoderConfig`), the decoder that it builds (`Decoder`), and its layers
(`Layer`). `qwen2.py` is one; another is a file of its own, and nothing else changes. All keep to this:

- Layers are stacked: every parameter of `decoder.layers` has a leading axis L. Callers split them
  (`nnx.split`), scan over that axis, and merge and call one layer at a time. NNX only holds the parameters:
  callers `nnx.split` once and `nnx.merge` inside plain jitted functions.
- Every parameter is a float32 `nnx.Param` with `axes=`, the logical names of its axes, by which a mesh splits
  it: `layer`, `embed` (hidden), `heads`, `kv_heads`, `head_dim`, `mlp`, `vocab`; and `norm`, the hidden
  dimension of what is no matrix. Every matrix, and nothing else, has an `embed` axis: weight decay holds for
  these. What makes keys and values has an axis `kv_heads`, also where they are as many as the query heads.
- What belongs to single tokens (all methods here but `__call__`) takes the tokens of any number of sequences
  on one axis. Only attention knows which sequence a token is of, and it is not the model's: the model makes
  query, key and value, and goes on from what was attended to.
- Query heads are a multiple of the key-value heads, and those that share one are adjacent. Scores are
  divided by sqrt(D).
- All parameters are cast to one type, which activations, keys and values then have; logits are float32.
- Activations are placed by `shard`, with the names `length` (tokens), `activation` (hidden), `heads`,
  `kv_heads`, `head_dim`, `mlp` and `vocab`.

Axis letters: B sequences, T tokens, V vocabulary, E hidden, H heads, K key-value heads, D per head, L layers,
S slots of a segment.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array

from fr3e_jax.models.attention import Attend, Prefix, Segment, attend_sequence

Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, the layers stacked."""

Shard = Callable[..., Array]
"""`shard(x, *logical_axes) -> x` with a sharding constraint; the caller owns the mesh and the table."""


def unsharded(x: Array, *_: str | None) -> Array:
    """The `Shard` of a program without a mesh."""
    return x


def sharded_as_batch(shard: Shard) -> Shard:
    """`shard` where the axis of tokens holds those of a batch of sequences, one after the other."""
    return lambda x, *axes: shard(x, *("batch" if axis == "length" else axis for axis in axes))


def cache_axes(*batch: str | None) -> tuple[str | None, ...]:
    """Logical axes of keys or values [L, *B, K, S, D], where those of a batch follow the layers."""
    return ("layer", *batch, "kv_heads", None, "head_dim")


class DecoderConfig(Protocol):
    """An architecture: a frozen dataclass, since programs are told apart by it."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding."""

    @property
    def num_hidden_layers(self) -> int:
        """L."""

    @property
    def num_key_value_heads(self) -> int:
        """K, heads of a cache."""

    @property
    def head_dim(self) -> int:
        """D, numbers of a head of a cache."""

    @property
    def context(self) -> int:
        """The longest sequence, tokens."""

    @property
    def known_ids(self) -> tuple[tuple[int, int], ...]:
        """Ranges [first, end) of the ids that the tokenizer has, where V is more; empty where it has all."""

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        """The decoder with fresh parameters."""

    def forward_flops(self, tokens: float, pairs: float, logits: float) -> float:
        """FLOPs of a forward pass: multiplications and additions of matrix products, two for each weight.

        Args:
          tokens: that run through the layers.
          pairs: of a token and one that it attends to, itself included.
          logits: tokens whose logits are computed.
        """


class Layer(Protocol):
    """A layer, merged from its slice of the stacked parameters. Between its two halves is the attention."""

    def project(self, x: Array, position: Array, shard: Shard) -> tuple[Array, Array, Array]:
        """What attention needs, of each token by itself.

        Args:
          x: [T, E], the residual stream.
          position: int32 [T], place of each token in its sequence.
          shard: places activations on the mesh.

        Returns:
          (query [T, H, D], key [T, K, D], value [T, K, D]); query and key know their position (rotated),
          since a cache is read without it.
        """

    def finish(self, x: Array, attended: Array, shard: Shard) -> Array:
        """The rest of the layer, of each token by itself.

        Args:
          x: [T, E], the residual stream as `project` was given it.
          attended: [T, H, D], the values weighted by attention.
          shard: places activations on the mesh.

        Returns:
          [T, E], the residual stream for the next layer.
        """


class Decoder(nnx.Module):
    """A decoder with its LM head; a subclass sets the attributes and says how tokens become numbers and back.

    config: what it was built from. layers: `Layer`, stacked. norm: [..., E] -> [..., E], dtype kept, of the
    residual stream after the last layer.
    """

    config: DecoderConfig
    layers: Layer
    norm: Callable[[Array], Array]

    @abc.abstractmethod
    def embed(self, token: Array, shard: Shard) -> Array:
        """int32 [T] -> [T, E], the residual stream before the first layer."""

    @abc.abstractmethod
    def logits(self, hidden: Array, shard: Shard = unsharded) -> Array:
        """What `norm` returned, [T, E] -> float32 [T, V], the vocabulary sharded; -inf of unknown ids."""

    @property
    def dtype(self) -> Any:
        """The type of the parameters, and so of activations, keys and values."""
        return jnp.result_type(*jax.tree.leaves(nnx.state(self)))

    def known(self, logits: Array) -> Array:
        """Logits float32 [T, V] with -inf where the tokenizer has no such id."""
        if not self.config.known_ids:
            return logits
        word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        within = ((word >= first) & (word < end) for first, end in self.config.known_ids)
        return jnp.where(functools.reduce(jnp.logical_or, within), logits, -jnp.inf)

    def __call__(
        self,
        token: Array,
        position: Array,
        length: Array,
        shard: Shard = unsharded,
        remat: bool = False,
        start: Array | int = 0,
        prefix: Prefix | None = None,
        attend: Attend = attend_sequence,
    ) -> tuple[Array, Segment]:
        """Run whole sequences causally: one, or a batch with any axes *B that `attend` takes.

        Args:
          token: int32 [*B, T], padded on the right, and before `start` on the left.
          position: int32 [*B, T], places for the rotary embedding.
          length: int32 [*B], index behind the last real token.
          shard: places activations on the mesh.
          remat: recompute each layer in the backward pass instead of holding it.
          start: int32 [*B], index of the first real token. A sequence that others go on from starts at 0,
            since a segment is read from its first slot.
          prefix: what they follow, of all layers.
          attend: computes the attention of the whole batch; the default, that of one sequence.

        Returns:
          (hidden [*B, T, E] after the final norm, their keys and values: [L, *B, K, T, D] with length [*B]).
        """
        graph, stacked = nnx.split(self.layers)
        index = jnp.broadcast_to(jnp.arange(token.shape[-1]), token.shape)
        first = jnp.broadcast_to(start, token.shape[:-1])
        real = (first[..., None] <= index) & (index < jnp.broadcast_to(length, first.shape)[..., None])
        place = shard if token.ndim == 1 else sharded_as_batch(shard)
        # All tokens on one axis: the products with the weights, and those of their gradients, are then plain
        # ones, which XLA is best at.
        flat_position = position.reshape(-1)

        def layer(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
            params, *shared = inputs
            before = prefix._replace(key=shared[0], value=shared[1]) if prefix is not None else None
            block = nnx.merge(graph, params)
            query, key, value = (
                y.reshape(*token.shape, *y.shape[1:]) for y in block.project(x, flat_position, place)
            )
            key, value = jnp.swapaxes(key, -3, -2), jnp.swapaxes(value, -3, -2)
            attended = attend(query, key, value, real, before)
            return block.finish(x, attended.reshape(-1, *query.shape[-2:]), place), (key, value)

        body: Any = jax.checkpoint(layer) if remat else layer
        inputs = (stacked,) if prefix is None else (stacked, prefix.key, prefix.value)
        x, (key, value) = jax.lax.scan(body, self.embed(token.reshape(-1), place), inputs)
        return self.norm(x).reshape(*token.shape, -1), Segment(key, value, length)


def graph_of(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    """The static half of the model: `nnx.merge(graph, params)` is its `Decoder`."""
    return nnx.graphdef(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))


def init_params(config: DecoderConfig, seed: int) -> Params:
    """Fresh float32 parameters, a function of `seed`."""
    return nnx.to_pure_dict(nnx.state(config.build(nnx.Rngs(seed))))


def abstract_params(config: DecoderConfig) -> Params:
    """The parameters as ShapeDtypeStructs, without memory."""
    return jax.eval_shape(lambda: init_params(config, 0))


def logical_axes(config: DecoderConfig) -> Params:
    """The logical axis names of every parameter, a tree of tuples parallel to the parameters.

    Raises:
      ValueError: a parameter of the decoder has no name for each of its axes.
    """
    state = nnx.state(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    found = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata("axes", ())
        if len(names) != variable.ndim:
            name = ".".join(map(str, path))
            raise ValueError(f"{name} has {variable.ndim} axes and the names {names}; give nnx.Param axes=")
        found[path] = names
    return traverse_util.unflatten_dict(found)
