"""A model by the name that a user gives: its files, its architecture, and its placement on a mesh."""

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
class UnplacedModel:
    """A model's configuration and tokenizer, without its weights.

    name: as the user gave it; a model on the hub has its commit in it, so that its weights come from the same
    commit. source: the directory of configuration and tokenizer. config: the architecture.
    """

    name: str
    source: Path
    config: Qwen2Config

    def place(self, mesh: Mesh, update_tensor: int | None = None) -> "PlacedModel":
        """The model with its placements on a mesh.

        Args:
          mesh: of sampling, and of training where nothing else is said.
          update_tensor: as `mesh.update_tensor`.

        Raises:
          PlacementError: it does not divide by the mesh.
        """
        axes = logical_axes(self.config)
        training, sampling = place_model(mesh, axes, abstract_params(self.config), update_tensor)
        return PlacedModel(
            name=self.name,
            source=self.source,
            config=self.config,
            graph=graph_of(self.config),
            axes=axes,
            training=training,
            sampling=sampling,
        )


@dataclasses.dataclass(frozen=True)
class PlacedModel(UnplacedModel):
    """A model with its placements on a mesh, still without its weights.

    graph: static half of the decoder. axes: logical axes of its parameters. training, sampling: placements of
    arrays for training and for sampling.
    """

    graph: nnx.GraphDef[Decoder]
    axes: Any
    training: Placement
    sampling: Placement

    def read_params(self, placement: Placement, dtype: Any = jnp.float32) -> Params:
        """The weights in one of the placements. Those of a model on the hub are fetched only now.

        Raises:
          ConfigError: they cannot be fetched.
          CheckpointError: they are absent, or of another model.
        """
        shardings = placement.shardings(self.axes, abstract_params(self.config))
        return read_params(find_model(self.name), self.config, shardings, dtype)


def compute_type(setting: str) -> Any:
    """The dtype of weights and matrix products: `auto` is bfloat16 on accelerators and float32 on CPU."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if setting == "auto" else setting)


def open_model(name: str) -> UnplacedModel:
    """The model that `model.path` names: a directory, a name on the hub, or `quickstart`.

    Only configuration and tokenizer are fetched, so that a model that cannot run is refused before its
    weights are fetched.

    Raises:
      ConfigError: there is no such model, or its tokenizer or end tokens do not fit its vocabulary.
      CheckpointError: its config.json is not one of a supported model.
    """
    source = find_model(name, weights=False)
    config = read_config(source)
    known = known_ids(source, config.vocab_size)
    return UnplacedModel(pinned(name, source), source, dataclasses.replace(config, known_ids=known))
