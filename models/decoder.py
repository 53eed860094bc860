"""The protocol of a decoder, which engine and learner use, and the functions that all decoders share.

A model is three classes: a config (`DecoderConfig`), the decoder that it builds (`Decoder`), and its layers
(`Layer`). `qwen2.py` is an example. Another model is a file of its own; engine and learner do not change.
The rules:

- Layers are stacked: every parameter of `decoder.layers` has a leading axis L. Callers split them
  (`nnx.split`), scan over that axis, and merge and call one layer at a time. NNX only holds the parameters:
  callers `nnx.split` once and `nnx.merge` inside plain jitted functions.
- Every parameter is a float32 `nnx.Param` with `axes=`, the logical names of its axes, by which a mesh splits
  it: `layer`, `embed` (hidden), `heads`, `kv_heads`, `head_dim`, `mlp`, `vocab`; and `norm`, the hidden
  dimension of a vector. Every matrix, and nothing else, has an `embed` axis: these have weight decay.
  Parameters that make keys and values have an axis `kv_heads`, even if every query head has its own.
- All methods but `__call__` compute each token by itself. They take the tokens of any number of sequences on
  one axis. Attention alone knows which sequence a token belongs to, and the caller computes it: the model
  makes query, key and value, and goes on from the attention's output.
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
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array
from jaxtyping import Float, Float32, Int

from fr3e_jax.models.attention import Attend, Prefix, Segment, attend_sequence

Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, the layers stacked."""

Shard = Callable[..., Array]
"""`shard(x, *logical_axes) -> x` with a sharding constraint; the caller owns the mesh and the table."""


def unsharded(x: Any, *_: str | None) -> Array:
    """Return x as it is, on a device: the `Shard` of a program without a mesh."""
    return jnp.asarray(x)


def sharded_as_batch(shard: Shard) -> Shard:
    """Name the axis of tokens `batch`: it holds those of a batch of sequences, one after the other."""
    return lambda x, *axes: shard(x, *("batch" if axis == "length" else axis for axis in axes))


def cache_axes(*batch: str | None) -> tuple[str | None, ...]:
    """Name the logical axes of keys or values [L, *B, K, S, D]: those of a batch follow the layers."""
    return ("layer", *batch, "kv_heads", None, "head_dim")


@runtime_checkable
class DecoderConfig(Protocol):
    """An architecture: a frozen dataclass, since jit caches programs by it."""

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
        """Ranges [first, end) of the ids that the tokenizer has; empty where it has all V."""

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        """Make the decoder with fresh parameters."""

    def forward_flops(self, tokens: float, pairs: float, logits: float) -> float:
        """Count FLOPs of a forward pass: of matrix products, 2 for each weight and token.

        Args:
          tokens: that run through the layers.
          pairs: of a token and one that it attends to, itself included.
          logits: tokens whose logits are computed.
        """


@runtime_checkable
class Layer(Protocol):
    """A layer, merged from its slice of the stacked parameters. Attention is between its two halves."""

    def project(
        self, x: Float[Array, "T E"], position: Int[Array, " T"], shard: Shard
    ) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
        """Compute query, key and value of each token by itself.

        Args:
          x: the residual stream.
          position: place of each token in its sequence.
          shard: places activations on the mesh.

        Returns:
          (query, key, value); query and key are rotated by their position, which attention does not get.
        """

    def finish(
        self, x: Float[Array, "T E"], attended: Float[Array, "T H D"], shard: Shard
    ) -> Float[Array, "T E"]:
        """Compute the rest of the layer, of each token by itself.

        Args:
          x: the residual stream that `project` was given.
          attended: the values weighted by attention.
          shard: places activations on the mesh.

        Returns:
          The residual stream for the next layer.
        """


class Decoder(nnx.Module):
    """A decoder with its LM head; a subclass sets the attributes and defines `embed` and `logits`."""

    config: DecoderConfig
    """What it was built from."""
    layers: Layer
    """All layers, stacked."""
    norm: Callable[[Float[Array, "*axes E"]], Float[Array, "*axes E"]]
    """The norm of the residual stream after the last layer; it keeps the dtype."""

    @abc.abstractmethod
    def embed(self, token: Int[Array, " T"], shard: Shard) -> Float[Array, "T E"]:
        """Look tokens up: the residual stream before the first layer."""

    @abc.abstractmethod
    def logits(self, hidden: Float[Array, "T E"], shard: Shard = unsharded) -> Float32[Array, "T V"]:
        """Compute logits of what `norm` returned, the vocabulary sharded; -inf of unknown ids."""

    @property
    def dtype(self) -> Any:
        """The type of the parameters, and so of activations, keys and values."""
        return jnp.result_type(*jax.tree.leaves(nnx.state(self)))

    def known(self, logits: Float32[Array, "T V"]) -> Float32[Array, "T V"]:
        """Set logits to -inf where the tokenizer has no such id."""
        if not self.config.known_ids:
            return logits
        word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        within = ((word >= first) & (word < end) for first, end in self.config.known_ids)
        return jnp.where(functools.reduce(jnp.logical_or, within), logits, -jnp.inf)

    def __call__(
        self,
        token: Int[Array, "*B T"],
        position: Int[Array, "*#B T"],
        length: Int[Array, "*#B"] | int,
        shard: Shard = unsharded,
        remat: bool = False,
        start: Int[Array, "*#B"] | int = 0,
        prefix: Prefix | None = None,
        attend: Attend = attend_sequence,
    ) -> tuple[Float[Array, "*B T E"], Segment]:
        """Run whole sequences causally: one, or a batch with any axes *B that `attend` takes.

        Args:
          token: padded on the right, and before `start` on the left.
          position: places for the rotary embedding.
          length: index of the first padding after the real tokens.
          shard: places activations on the mesh.
          remat: recompute each layer in the backward pass instead of holding it.
          start: index of the first real token. A sequence that others go on from starts at 0, since a segment
            is read from its first slot.
          prefix: the KV cache that they follow, of all layers.
          attend: computes the attention of the whole batch; the default, that of one sequence.

        Returns:
          (hidden states after the final norm, keys and values of the sequences).
        """
        graph, stacked = nnx.split(self.layers)
        index = jnp.broadcast_to(jnp.arange(token.shape[-1]), token.shape)
        first = jnp.broadcast_to(start, token.shape[:-1])
        real = (first[..., None] <= index) & (index < jnp.broadcast_to(length, first.shape)[..., None])
        place = shard if token.ndim == 1 else sharded_as_batch(shard)
        # All tokens on one axis: products with weights, and those of their gradients, are then plain matrix
        # products, which XLA computes best.
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
    """Make the static half of the model: `nnx.merge(graph, params)` is its `Decoder`."""
    return nnx.graphdef(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))


def init_params(config: DecoderConfig, seed: int) -> Params:
    """Draw fresh float32 parameters, a function of `seed`."""
    return nnx.to_pure_dict(nnx.state(config.build(nnx.Rngs(seed))))


def abstract_params(config: DecoderConfig) -> Params:
    """Make the parameters as ShapeDtypeStructs, without memory."""
    return jax.eval_shape(lambda: init_params(config, 0))


def logical_axes(config: DecoderConfig) -> Params:
    """Read the logical axis names of every parameter: a tree of tuples, parallel to the parameters.

    Raises:
      ValueError: a parameter of the decoder has no name for each of its axes.
    """
    state = nnx.state(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata("axes", ())
        if len(names) != variable.ndim:
            name = ".".join(map(str, path))
            raise ValueError(f"{name} has {variable.ndim} axes and the names {names}; give nnx.Param axes=")
        axes[path] = names
    return traverse_util.unflatten_dict(axes)
