"""A run on a mesh without arrays: its engine, its learner, and the shapes and shardings of its state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fr3e_jax.config import Config, ConfigError, updates_of
from fr3e_jax.engine.budget import CacheBudgetError, context_bytes, needed_bytes, page_bytes
from fr3e_jax.engine.pages import ON_TPU
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.schedule import Room
from fr3e_jax.learner.state import TrainState, state_shardings
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import DecoderConfig, abstract_params
from fr3e_jax.parallel.mesh import Placement, row_parts
from fr3e_jax.planning.workload import Assumptions, Workload, workload_of
from fr3e_jax.run.build import Policy, policy_of_shape
from fr3e_jax.run.queries import continued_shapes, round_sizes

END_TOKENS = (0, 1)
"""Any two ids: which ones they are does not change a program."""


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """The shape, dtype and sharding of an array that is never allocated."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def bytes_on_chip(tree: Any) -> int:
    """Bytes that a tree of arrays, abstract or not, takes on one chip."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        local = x.shape if sharding is None else sharding.shard_shape(x.shape)
        size = 16 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += int(np.prod(local, dtype=float)) * size
    return total


@functools.lru_cache(maxsize=16)
def policy_on(model: DecoderConfig, mesh: Mesh, dtype: Any, name: str, update_tensor: int | None) -> Policy:
    """`policy_of_shape`, once for the many plans that a layout of updates is chosen from."""
    return policy_of_shape(model, mesh, END_TOKENS, dtype, name, update_tensor)


@functools.lru_cache(maxsize=4)
def parameter_shapes(model: DecoderConfig) -> Any:
    """`abstract_params`, once for many plans."""
    return abstract_params(model)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run on a mesh, without arrays.

    config: resolved. mesh: of sampling. cache_bytes: as the engine has it (`cache_budget.py`). sizes: numbers
    of queries that rounds of the run may have; none: those of the configuration.
    """

    config: Config
    model: DecoderConfig
    mesh: Mesh
    cache_bytes: int | None = None
    sizes: tuple[int, ...] = ()

    @functools.cached_property
    def policy(self) -> Policy:
        """The model on the mesh, from which a run makes its engine and its learner.

        Raises:
          PlacementError: the model does not divide by the mesh.
        """
        model: Any = self.model
        name, update_tensor = self.config.model.path, self.config.mesh.update_tensor
        return policy_on(model, self.mesh, self.dtype, name, update_tensor)

    @functools.cached_property
    def update(self) -> "Setup":
        """The same run on the mesh of its updates, of which `parts`, `rows` and caches are then."""
        if (mesh := self.placements[0].mesh) == self.mesh:
            return self
        own = dataclasses.replace(self.config.mesh, update_tensor=None)
        return Setup(dataclasses.replace(self.config, mesh=own), self.model, mesh, self.cache_bytes)

    @property
    def axes(self) -> Any:
        """Logical axes of the parameters."""
        return self.policy.model.axes

    @functools.cached_property
    def shapes(self) -> Any:
        """The parameters as ShapeDtypeStructs."""
        model: Any = self.model
        return parameter_shapes(model)

    @property
    def placements(self) -> tuple[Placement, Placement]:
        """The placements (for training, for sampling); errors as of `policy`."""
        return self.policy.model.training, self.policy.model.sampling

    @functools.cached_property
    def dtype(self) -> Any:
        """The dtype of matrix products and KV caches."""
        return jnp.dtype(self.config.model.compute_dtype)

    @functools.cached_property
    def parts(self) -> int:
        """Number of parts that the mesh splits batch rows into."""
        return row_parts(self.mesh)

    @property
    def queries(self) -> int:
        """Number of queries of a round."""
        return round_sizes(self.config.rollout, self.parts)[-1]

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that training makes on a TPU, without stop texts."""
        engine = self.policy.engine(self.config.rollout.max_response)
        return dataclasses.replace(engine, sizes=ON_TPU, cache_bytes=self.cache_bytes)

    @functools.cached_property
    def learner(self) -> Learner:
        """The learner that training makes on a TPU."""
        updates = updates_of(self.config)
        return self.policy.learner(self.config.loss, self.config.optimizer, updates, on_tpu=True)

    @functools.cached_property
    def state(self) -> TrainState:
        """Parameters and optimizer moments, abstract."""
        shardings = state_shardings(self.placements[0], self.learner.optimizer, self.axes, self.shapes)
        moments = jax.eval_shape(self.learner.optimizer.init, self.shapes)
        place = functools.partial(jax.tree.map, lambda x, to: abstract(x.shape, x.dtype, to))
        return TrainState(place(self.shapes, shardings.params), place(moments, shardings.optimizer))

    def work(self, assumptions: Assumptions, worst: bool = False) -> Workload:
        """The work of a step, on the meshes of sampling and of updates; others as for `workload_of`."""
        given = self.config, self.parts, assumptions, worst, self.update.parts, self.room
        sizes = self.sizes or round_sizes(self.config.rollout, self.parts)
        model: Any = self.model
        return workload_of(*given, continued_shapes(self.config, self.engine, model, sizes))

    def room(self, n: int, c: int, slots: int, drawn: int | None = None) -> Room:
        """The blocks and pages of a decoding; the fewest pages where it needs more memory than there is.

        Args:
          n: trajectories of a part. c: branches of each. slots: of what they share. drawn: most branches that
            are drawn; None: all.

        Raises:
          ConfigError: they do not fit `rollout.cache_gb`.
        """
        model: Any = self.model
        try:
            return self.engine.room_for(model, (n * self.parts, c), slots, self.dtype, drawn)
        except CacheBudgetError as error:
            if self.config.rollout.cache_gb != "auto":
                raise ConfigError(str(error)) from None
            room = Room(self.engine.sizes, n, c, self.engine.max_new, 0, drawn)
            return dataclasses.replace(room, pages=room.most)

    def engine_with(self, room: Room, slots: int) -> Engine:
        """The engine whose decoding has so many pages; slots: of what branches share."""
        model: Any = self.model
        needed = needed_bytes(model, self.placements[1], room, slots, self.dtype)
        return dataclasses.replace(self.engine, cache_bytes=needed)

    def page_bytes(self, room: Room) -> int:
        """Bytes of a page on a chip, of a decoding."""
        model: Any = self.model
        return page_bytes(model, self.placements[1], room, self.dtype)

    def context_bytes(self, n: int, slots: int) -> int:
        """Bytes on a chip of what the branches of n trajectories of a part share."""
        model: Any = self.model
        return context_bytes(model, self.placements[1], Room(ON_TPU, n, 1, 1, 0), slots, self.dtype)

    def params(self, dtype: Any, sampling: bool = False) -> Any:
        """The parameters in a dtype, abstract, placed for training or for sampling."""
        shardings = self.placements[sampling].shardings(self.axes, self.shapes)
        return jax.tree.map(lambda x, to: abstract(x.shape, dtype, to), self.shapes, shardings)

    def rows(self, dtype: Any, *sizes: int) -> Any:
        """An abstract array whose first axis is split as batch rows are."""
        return abstract(sizes, dtype, self.placements[1].sharding("batch"))

    @functools.cached_property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of a token on a chip, in all layers."""
        heads, tensor = self.model.num_key_value_heads, self.mesh.shape["tensor"]
        split = tensor if heads >= tensor else 1
        return 2 * self.model.num_hidden_layers * heads // split * self.model.head_dim * self.dtype.itemsize
