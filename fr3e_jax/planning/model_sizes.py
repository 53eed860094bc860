"""Sizes of a model, its copies, caches and activations on one chip, by arithmetic."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fr3e_jax.parallel.mesh import logical_sizes
from fr3e_jax.planning.setup import Setup, bytes_on_chip

ROLLOUT_BYTES = 16  # of a token: its id, two log-probabilities, and the entropy


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model on one chip of a mesh; bytes where nothing else is said."""

    setup: Setup

    @functools.cached_property
    def logical(self) -> dict[str, int]:
        """Size of every logical axis."""
        return logical_sizes(self.setup.axes, self.setup.shapes)

    @property
    def tensor(self) -> int:
        """Number of chips that heads, MLP and vocabulary are split over."""
        return self.setup.mesh.shape["tensor"]

    @functools.cached_property
    def sampling_copy(self) -> int:
        """Weights in the compute dtype, placed for sampling."""
        return bytes_on_chip(self.setup.params(self.setup.dtype, sampling=True))

    @functools.cached_property
    def largest_weight(self) -> int:
        """The largest parameter of the sampling copy, all its layers."""
        copy = self.setup.params(self.setup.dtype, sampling=True)
        return max(bytes_on_chip(leaf) for leaf in jax.tree.leaves(copy))

    @functools.cached_property
    def compute_copy(self) -> int:
        """Weights in the compute dtype, placed for training."""
        return bytes_on_chip(self.setup.params(self.setup.dtype))

    @functools.cached_property
    def gradient(self) -> int:
        """Gradient of the parameters, float32."""
        return bytes_on_chip(self.setup.params(jnp.float32))

    @property
    def gathered_layer(self) -> float:
        """Weights of one layer, gathered over fsdp."""
        return self.compute_copy * self.setup.mesh.shape["fsdp"] / self.setup.model.num_hidden_layers

    @property
    def slot(self) -> int:
        """Keys and values of one token, all layers."""
        return self.setup.slot_bytes

    @property
    def queries(self) -> int:
        """Number of queries of a part."""
        return self.setup.queries // self.setup.parts

    @property
    def query_cache(self) -> int:
        """KV cache of the queries of a part."""
        return self.setup.context_bytes(self.queries, self.setup.config.rollout.max_prompt)

    def rollouts(self, branches: int) -> int:
        """Tokens of a number of branches, and their statistics."""
        return ROLLOUT_BYTES * branches * self.setup.config.rollout.max_response

    def activations(self, tokens: int) -> float:
        """Arrays of one layer that exist at a time for a number of tokens, in the compute dtype."""
        size, item = self.logical, self.setup.dtype.itemsize
        heads = (size["heads"] + 2 * size["kv_heads"]) * size["head_dim"] / self.tensor
        return item * tokens * (4.0 * size["embed"] + 2 * heads + 3 * size["mlp"] / self.tensor)

    def logits(self, tokens: int) -> float:
        """Logits of a number of tokens, float32."""
        return 4.0 * tokens * self.setup.model.vocab_size / self.tensor

    def flops(self, tokens: float, pairs: float, logits: float) -> float:
        """FLOPs of a forward pass of the tokens of a part on one chip."""
        return self.setup.model.forward_flops(tokens, pairs, logits) / self.tensor

    def gathers(self, times: float) -> dict[tuple[str, tuple[str, ...]], float]:
        """Bytes that gathering all weights over fsdp `times` times receives."""
        fsdp = self.setup.mesh.shape["fsdp"]
        return {("all-gather", ("fsdp",)): times * self.compute_copy * (fsdp - 1.0)} if fsdp > 1 else {}

    def reductions(self, tokens: float, times: float) -> dict[tuple[str, tuple[str, ...]], float]:
        """Bytes that adding activations over tensor receives, after attention and MLP of every layer."""
        if self.tensor == 1:
            return {}
        size = self.setup.dtype.itemsize * tokens * self.logical["embed"]
        received = 2.0 * (self.tensor - 1) / self.tensor * size
        return {("all-reduce", ("tensor",)): times * 2 * self.setup.model.num_hidden_layers * received}

    def calls(self, times: float) -> float:
        """Number of collectives of `times` passes through the layers."""
        axes = sum(self.setup.mesh.shape[name] > 1 for name in ("fsdp", "tensor"))
        return times * axes * 2 * self.setup.model.num_hidden_layers
