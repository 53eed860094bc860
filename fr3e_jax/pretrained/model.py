"""A model as a user names it: its files, its architecture, and its place on a mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fr3e_jax.models.decoder import Decoder, Params, abstract_params, graph_of, logical_axes
from fr3e_jax.models.hf import read_config
from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.parallel.mesh import Placement, place_model
from fr3e_jax.pretrained.hub import find_model, pinned
from fr3e_jax.pretrained.tokenizer import known_ids
from fr3e_jax.pretrained.weights import read_params


@dataclasses.dataclass(frozen=True)
class Model:
    """A model by its configuration and tokenizer, without its weights.

    name: as the user gave it, with the commit of a model on the hub, so that its weights are of the same.
    source: the directory of its configuration and tokenizer.
    """

    name: str
    source: Path
    config: Qwen2Config

    def place(self, mesh: Mesh) -> "PlacedModel":
        """The model on a mesh.

        Raises:
          PlacementError: it does not divide by the mesh.
        """
        axes = logical_axes(self.config)
        training, sampling = place_model(mesh, axes, abstract_params(self.config))
        return PlacedModel(
            self.name, self.source, self.config, graph_of(self.config), axes, training, sampling
        )


@dataclasses.dataclass(frozen=True)
class PlacedModel(Model):
    """A model on a mesh, still without its weights.

    graph: its static half. axes: the logical axes of its parameters. training, sampling: where arrays lie
    while it is trained, and while it is sampled from.
    """

    graph: nnx.GraphDef[Decoder]
    axes: Any
    training: Placement
    sampling: Placement

    def read_params(self, placement: Placement, dtype: Any = jnp.float32) -> Params:
        """The weights, in one of the placements; of a model on the hub, they are fetched only now.

        Raises:
          ConfigError: they cannot be fetched.
          CheckpointError: they are not there, or not this model's.
        """
        shardings = placement.shardings(self.axes, abstract_params(self.config))
        return read_params(find_model(self.name), self.config, shardings, dtype)


def compute_type(setting: str) -> Any:
    """The type of weights and matrix products: `auto` is bfloat16 on accelerators and float32 on CPU."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if setting == "auto" else setting)


def open_model(name: str) -> Model:
    """The model of `model.path`: a directory, a name on the hub, or `quickstart`.

    Only its configuration and tokenizer are fetched, so that what cannot run is refused before the weights
    are.

    Raises:
      ConfigError: it is not found, or its tokenizer or end tokens are not those of its vocabulary.
      CheckpointError: its config.json is not one of a supported model.
    """
    source = find_model(name, weights=False)
    config = read_config(source)
    known = known_ids(source, config.vocab_size)
    return Model(pinned(name, source), source, dataclasses.replace(config, known_ids=known))
