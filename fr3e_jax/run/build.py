"""Makes the parts of a command from its settings, the same for training, evaluation, plan and notebook.

`Policy` is a model on a mesh; engines, learners and states are made from it. `build` makes all that a run of
training needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fr3e_jax.config import (
    Config,
    ConfigError,
    DevicesConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
    check,
    updates_of,
)
from fr3e_jax.engine.budget import GB
from fr3e_jax.engine.pages import sizes_for
from fr3e_jax.engine.rollout import Engine, Watch
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.make import learner_of
from fr3e_jax.learner.state import TrainState, init_state, sampling_cast
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import DecoderConfig, Params, abstract_params
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.memory import bytes_on_device, device_memory, share_of_host
from fr3e_jax.parallel.mesh import make_mesh, row_parts
from fr3e_jax.pretrained.model import PlacedModel, UnplacedModel, open_model
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.problems.corpus import Corpus, make_corpus
from fr3e_jax.problems.stream import QueryStream, difficulty_of
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.run.queries import ContinuedShape, continued_shapes, fitting_sizes
from fr3e_jax.types import StopTable

FOR_CACHES = 0.9  # of a device's memory, less the weights, where nothing is trained


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model on a mesh, and what ends its answers: what is sampled from, and what is trained.

    model: without its weights. end_tokens: an answer ends with one of these. stops: texts that end one too.
    dtype: of matrix products, and of the parameters that are sampled with.
    """

    model: PlacedModel
    end_tokens: tuple[int, ...]
    stops: StopTable | None
    dtype: Any

    @property
    def described_mesh(self) -> str:
        """The mesh for people, and that of updates where it is another."""
        sampling, training = self.model.sampling.mesh, self.model.training.mesh
        updates = "" if training == sampling else f", in updates {dict(training.shape)}"
        return f"{dict(sampling.shape)}{updates}"

    def engine(
        self,
        max_response: int,
        between: Callable[[], None] = lambda: None,
        watch: Watch = lambda *_: None,
        cache_bytes: int | None = None,
    ) -> Engine:
        """What samples answers of at most `max_response` tokens; the other arguments are the engine's."""
        model, devices = self.model, self.model.sampling.mesh.devices.flat
        if cache_bytes is None and devices[0] in jax.devices():
            cache_bytes = self.memory_left()
        return Engine(
            model.graph,
            model.sampling,
            max_response,
            self.end_tokens,
            between,
            watch,
            self.stops,
            sizes_for(devices[0].platform),
            cache_bytes,
        )

    def memory_left(self) -> int | None:
        """Count the bytes of a device that the weights leave for KV caches; None where that is not known."""
        if jax.local_devices()[0].platform == "cpu":
            return share_of_host()
        if not (limit := device_memory()):
            return None
        shapes = abstract_params(self.model.config)
        placed = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, self.dtype, sharding=at),
            shapes,
            self.model.sampling.shardings(self.model.axes, shapes),
        )
        weights = sum(map(bytes_on_device, jax.tree.leaves(placed)))
        return max(int(FOR_CACHES * limit) - weights, 0)

    def learner(
        self,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        updates: int | None = None,
        on_tpu: bool | None = None,
    ) -> Learner:
        """What updates the parameters; the arguments are those of `learner_of`."""
        model = self.model
        settings = (loss, optimizer, self.dtype, updates, on_tpu)
        return learner_of(model.graph, model.training, model.axes, *settings)

    def fresh_state(self, learner: Learner) -> TrainState:
        """The model's weights in float32, and moments of 0.

        Raises:
          ConfigError: the weights cannot be fetched.
          CheckpointError: they are not there, or not this model's.
        """
        model = self.model
        params = model.read_params(model.training)
        return init_state(model.training, learner.optimizer, model.axes, params)

    def read(self) -> Params:
        """The model's weights as they are sampled with; errors as of `fresh_state`."""
        return self.model.read_params(self.model.sampling, self.dtype)

    @functools.cached_property
    def sampling_params(self) -> Callable[[Params], Params]:
        """Gives parameters as they are sampled with, from those that are trained."""
        model = self.model
        return sampling_cast(model.sampling, model.axes, abstract_params(model.config), self.dtype)


def policy_of(model: PlacedModel, text: Text, dtype: Any) -> Policy:
    """The policy of a model with its tokenizer."""
    return Policy(model, text.end_tokens, text.stops, dtype)


def policy_of_shape(
    config: DecoderConfig,
    mesh: Mesh,
    end_tokens: tuple[int, ...],
    dtype: Any,
    name: str = "",
    update_tensor: int | None = None,
) -> Policy:
    """The policy of a model that has a shape and no files: its weights cannot be read.

    Args:
      mesh, update_tensor: as for `UnplacedModel.place`.

    Raises:
      PlacementError: it does not divide by the mesh.
    """
    shape: Any = config
    model = UnplacedModel(name, Path(), shape).place(mesh, update_tensor)
    return Policy(model, end_tokens, None, dtype)


def open_policy(name: str, template: str, stop: Sequence[str], mesh: Mesh, dtype: Any) -> tuple[Policy, Text]:
    """Find a model, and place it, without its weights.

    Args:
      name: as model.path.
      template: as data.template.
      stop: as rollout.stop.
      mesh: of `mesh_of`.
      dtype: of matrix products.

    Raises:
      ConfigError: it is not found, or template or tokenizer do not fit.
      CheckpointError: its config.json is not one of a supported model.
      PlacementError: it does not divide by the mesh.
    """
    model = open_model(name).place(mesh)
    text = load_text(model.source, template, stop)
    return policy_of(model, text, dtype), text


def mesh_of(config: DevicesConfig) -> Mesh:
    """The mesh of a command over all devices; of training that of its sampling.

    Raises:
      PlacementError: it does not cover them.
    """
    return make_mesh(config.data, config.fsdp, config.tensor)


def sampling_of(config: RolloutConfig, first_temperature: float | None = None) -> Sampling:
    """The distribution that rollouts are drawn from.

    Args:
      config: of rollouts.
      first_temperature: explore.temperature, where rollouts start from states.
    """
    return Sampling(config.temperature, config.top_k, config.top_p, first_temperature)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run of training is made of, without its state.

    text: tokenizer and template. corpus: problems to train on, and held out. stream: those to train on, as
    queries.
    """

    policy: Policy
    text: Text
    engine: Engine
    learner: Learner
    corpus: Corpus
    stream: QueryStream
    verifier: Verifier

    def round_sizes(self, config: Config) -> tuple[int, ...]:
        """List the numbers of queries that a round of this run may have, ascending."""
        return fitting_sizes(config, self.engine, self.policy.model.config)

    def continued_shapes(self, config: Config) -> list[ContinuedShape]:
        """List the shapes that decodings of this run have which do not wait for their last rollouts."""
        return continued_shapes(config, self.engine, self.policy.model.config, self.round_sizes(config))


def given_bytes(config: Config, *_: Any) -> int | None:
    """`rollout.cache_gb` in bytes; None where it is `auto`."""
    given = config.rollout.cache_gb
    return None if given == "auto" else int(given * GB)


def build(
    config: Config,
    hosts: Hosts,
    between: Callable[[], None] = lambda: None,
    watch: Watch = lambda *_: None,
    choose: Callable[[Config, DecoderConfig, Hosts], int | None] = lambda *_: None,
    budget: Callable[[Config, DecoderConfig, Hosts], int | None] = given_bytes,
) -> Parts:
    """Check the configuration, and make the parts of its run.

    Args:
      config: resolved.
      hosts: the processes, with the mesh of `mesh_of`.
      between: called before each program of a decoding and before each update; may raise to end the run.
      watch: told how far a decoding is.
      choose: returns mesh.update_tensor where the configuration leaves it open; None, as by default, is the
        layout of sampling.
      budget: returns the most bytes of KV caches on a device; by default rollout.cache_gb if it is a number.

    Raises:
      ConfigError, PlacementError, CheckpointError: what cannot run.
    """
    dtype = jnp.dtype(config.model.compute_dtype)
    update_tensor = config.mesh.update_tensor
    model = open_model(config.model.path).place(hosts.mesh, update_tensor)
    check(config, row_parts(hosts.mesh), model.config.context)
    if update_tensor is None and (chosen := choose(config, model.config, hosts)) is not None:
        model = model.place(hosts.mesh, chosen)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, update_tensor=chosen))
    text = load_text(model.source, config.data.template, config.rollout.stop)
    if endless := text.endless():
        raise ConfigError(f"data.template {config.data.template}: {endless} (rollout.stop)")
    corpus = make_corpus(config.data, config.seed, text, config.rollout.max_prompt)
    hosts.require_same(corpus.checksum, "the problems of data.source")
    policy = policy_of(model, text, dtype)
    cache_bytes = budget(config, model.config, hosts)
    engine = policy.engine(config.rollout.max_response, between, watch, cache_bytes)
    learner = policy.learner(config.loss, config.optimizer, updates_of(config))
    smallest = fitting_sizes(config, engine, model.config)[0]
    difficulty = difficulty_of(corpus, config.data, config.seed, smallest)
    problems = corpus.stream(config.seed)
    stream = QueryStream(problems, text, config.rollout.max_prompt, hosts, difficulty)
    pool = ScoringPool(corpus.scorers, **asdict(config.scoring))
    verifier = Verifier(text, hosts, pool, config.reward, max_response=config.rollout.max_response)
    return Parts(policy, text, engine, learner, corpus, stream, verifier)
