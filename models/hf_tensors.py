"""The tensors of Hugging Face checkpoints: their names and shapes, and how each lies in our parameters.

`fr3e_jax.pretrained` moves the numbers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from fr3e_jax.models.decoder import Params


class Layout(NamedTuple):
    """The form of a parameter in a checkpoint.

    name: of its tensor, with `{}` in the place of the layer's number. groups: for each axis of the tensor,
    the axes of our array (without the layer axis) that it merges. Hugging Face has a matrix as [out, in] with
    all heads in one axis; we have it as [in, out] with heads and head_dim apart.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> list[int]:
        """The axes of our array in the order of the tensor."""
        return [axis for group in self.groups for axis in group]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, from the shape of our array."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

    def tensor_slices(self, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slices of the tensor that hold a part of our array.

        Args:
          shape: of our whole array.
          index: of the part, a slice with start and stop for each axis; of axes that are merged, only the
            first may be cut, so that the part is one piece.
        """
        slices = []
        for first, *others in self.groups:
            inner = math.prod(shape[axis] for axis in others)
            assert all(index[axis] == slice(0, shape[axis]) for axis in others), (self.name, index)
            slices.append(slice(index[first].start * inner, index[first].stop * inner))
        return tuple(slices)

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array, or a part of it with shape `shape`, from the tensor or the same part of it."""
        split = tensor.reshape([shape[axis] for axis in self.order])
        return split.transpose(np.argsort(self.order))

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """The tensor from our array: the inverse of `to_ours`."""
        return array.transpose(self.order).reshape(self.tensor_shape(array.shape))


VECTOR, BIAS, TABLE, MATRIX = ((0,),), ((0, 1),), ((0,), (1,)), ((1,), (0,))
FROM_HEADS, TO_HEADS = ((2,), (0, 1)), ((1, 2), (0,))

# Path of a parameter -> its layout, in the order in which checkpoints are written.
LAYOUTS = {
    "embedding": Layout("model.embed_tokens.weight", TABLE),
    "layers.attention_norm.scale": Layout("model.layers.{}.input_layernorm.weight", VECTOR),
    "layers.q": Layout("model.layers.{}.self_attn.q_proj.weight", TO_HEADS),
    "layers.q_bias": Layout("model.layers.{}.self_attn.q_proj.bias", BIAS),
    "layers.q_norm.scale": Layout("model.layers.{}.self_attn.q_norm.weight", VECTOR),
    "layers.k": Layout("model.layers.{}.self_attn.k_proj.weight", TO_HEADS),
    "layers.k_bias": Layout("model.layers.{}.self_attn.k_proj.bias", BIAS),
    "layers.k_norm.scale": Layout("model.layers.{}.self_attn.k_norm.weight", VECTOR),
    "layers.v": Layout("model.layers.{}.self_attn.v_proj.weight", TO_HEADS),
    "layers.v_bias": Layout("model.layers.{}.self_attn.v_proj.bias", BIAS),
    "layers.o": Layout("model.layers.{}.self_attn.o_proj.weight", FROM_HEADS),
    "layers.mlp_norm.scale": Layout("model.layers.{}.post_attention_layernorm.weight", VECTOR),
    "layers.gate": Layout("model.layers.{}.mlp.gate_proj.weight", MATRIX),
    "layers.up": Layout("model.layers.{}.mlp.up_proj.weight", MATRIX),
    "layers.down": Layout("model.layers.{}.mlp.down_proj.weight", MATRIX),
    "norm.scale": Layout("model.norm.weight", VECTOR),
    "lm_head": Layout("lm_head.weight", TABLE),
}


class Tensor(NamedTuple):
    """A tensor of a checkpoint and its place in our parameters.

    name, shape: in the checkpoint. path: of the parameter, as in `LAYOUTS`. layer: index on the parameter's
    first axis, or None if the parameter has no layers.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None


def tensors_of(params: Params) -> Iterator[Tensor]:
    """Iterate over the tensors of a checkpoint of these parameters, or of their shapes, in its order.

    It is lazy, since a config.json can claim more layers than could be listed.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    ordered = [(path, layout) for path, layout in LAYOUTS.items() if path in flat]
    assert len(ordered) == len(flat), set(flat) - set(LAYOUTS)
    stacked = [(path, layout) for path, layout in ordered if path.startswith("layers.")]
    layers = flat[stacked[0][0]].shape[0]

    def whole(path: str) -> Tensor:
        layout = LAYOUTS[path]
        return Tensor(layout.name, layout.tensor_shape(flat[path].shape), path, None)

    yield whole("embedding")
    for layer in range(layers):
        for path, layout in stacked:
            shape = layout.tensor_shape(flat[path].shape[1:])
            yield Tensor(layout.name.format(layer), shape, path, layer)
    yield whole("norm.scale")
    if "lm_head" in flat:
        yield whole("lm_head")
