"""A model of the library, and what samples from it and updates it."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from fr3e_jax.config import ConfigError, LossConfig, OptimizerConfig, check_options
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.update import Learner
from fr3e_jax.learner.weights import weighed, with_shares
from fr3e_jax.library.results import Answers, Base, Encoded, Restarts
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import make_mesh, row_parts
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.pretrained.model import compute_type
from fr3e_jax.pretrained.text import Text
from fr3e_jax.problems.stream import padded_width
from fr3e_jax.rewards.verify import whole_answer
from fr3e_jax.run.build import Policy, open_policy
from fr3e_jax.step.stages import draws_of
from fr3e_jax.types import Queries, Rollouts, StateGroups


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights on a mesh, its tokenizer, and a template for questions.

    params: in the type and layout for sampling. engines, learners: those that were made, by their settings,
    so that equal settings share compiled programs.
    """

    policy: Policy
    text: Text
    params: Params
    engines: dict[tuple[int, Sampling], Engine] = dataclasses.field(default_factory=dict)
    learners: dict[tuple[LossConfig, OptimizerConfig], Learner] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls,
        name: str,
        template: str = "plain",
        stop: Sequence[str] = (),
        mesh: tuple[int, int, int] = (1, -1, 1),
        compute_dtype: str = "auto",
    ) -> "Model":
        """Read a model.

        Args:
          name: directory, name on the hub, or `quickstart`.
          template: what it sees of a question, as data.template.
          stop: texts that end an answer.
          mesh: (data, fsdp, tensor) over all devices; -1 takes those that are left.
          compute_dtype: `auto` is bfloat16 on accelerators and float32 on CPU.

        Raises:
          ConfigError: it is not found, or template or tokenizer do not fit.
          CheckpointError: its files cannot be read.
          PlacementError: it does not divide by the mesh.
        """
        policy, text = open_policy(name, template, stop, make_mesh(*mesh), compute_type(compute_dtype))
        return cls(policy, text, policy.read())

    def engine(
        self, max_response: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> "Explorer":
        """The engine that samples answers of at most `max_response` tokens with these parameters."""
        sampling = Sampling(temperature, top_k, top_p)
        key = (max_response, sampling)
        if key not in self.engines:
            self.engines[key] = self.policy.engine(max_response)
        return Explorer(self, self.engines[key], sampling)

    def encode(self, questions: Sequence[str]) -> Encoded:
        """Questions as queries, through the template.

        Raises:
          ConfigError: there is none.
        """
        if isinstance(questions, str) or not questions:
            raise ConfigError("encode takes a list of questions, at least one")
        rows = [self.text.query(question) for question in questions]
        parts = row_parts(self.policy.model.sampling.mesh)
        count, width = next_multiple(len(rows), parts), padded_width(max(map(len, rows)))
        padded = [rows[i] if i < len(rows) else rows[0] for i in range(count)]
        token = np.zeros((count, width), np.int32)
        for i, row in enumerate(padded):
            token[i, : len(row)] = row
        length = np.array(list(map(len, padded)), np.int32)
        return Encoded(tuple(questions), Queries(token, length, np.arange(count, dtype=np.int32)))

    def texts(self, states: Restarts, rollouts: Rollouts) -> Answers:
        """The whole answers that partial rollouts complete."""
        arrays, valid = states.arrays, states.valid
        n, j = valid.shape
        m = rollouts.length.shape[1] // j
        answers: list[list[list[str] | None]] = []
        for a in range(n):
            row: list[list[str] | None] = []
            for b in range(j):
                whole = [whole_answer(arrays, rollouts, a, b, c) for c in range(m)]
                ended = [bool(end) for end in rollouts.stopped[a, b * m : (b + 1) * m]]
                row.append(self.text.answers(whole, ended) if valid[a, b] else None)
            answers.append(row)
        questions = states.base.encoded.questions
        asked = [questions[q] if q < len(questions) else questions[0] for q in arrays.query.tolist()]
        return Answers(asked, answers, m)

    def learner(
        self,
        loss: LossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> "PolicyLearner":
        """The learner that updates these parameters; by default with the settings of training.

        Raises:
          ConfigError: a setting does not take its value.
        """
        settings = (loss or LossConfig(), optimizer or OptimizerConfig())
        check_options(settings[0], ("loss",))
        check_options(settings[1], ("optimizer",))
        if settings not in self.learners:
            self.learners[settings] = self.policy.learner(*settings)
        return PolicyLearner(self, settings[1], self.learners[settings])

    def updated(self, state: TrainState) -> "Model":
        """The same model with the parameters of a state; engines and their programs are shared."""
        return dataclasses.replace(self, params=self.policy.sampling_params(state.params))

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.params))
        mesh = dict(self.policy.model.sampling.mesh.shape)
        return f"{self.policy.model.name}: {count:,} parameters, {self.policy.dtype}, mesh {mesh}"


@dataclasses.dataclass(frozen=True, eq=False)
class Explorer:
    """Samples from a model: base trajectories, and partial rollouts from states of them."""

    model: Model
    engine: Engine
    sampling: Sampling

    def first_return(self, encoded: Encoded, count: int, seed: int = 0, step: int = 0) -> Base:
        """`count` base trajectories of every query.

        What is drawn is a function of (seed, step, query's place, branch, position).

        Raises:
          NotFiniteError: tokens were drawn from logits that are not finite.
        """
        place = self.engine.placement
        placed, draws = place.place_rows(encoded.queries), draws_of(seed, step, place)
        rollouts, _ = self.engine.sample(
            self.model.params, placed, draws.tokens, draws.step, count, self.sampling
        )
        rollouts = gather(rollouts)
        require_finite(rollouts, "first return")
        return Base(encoded, self.model.text.trimmed(rollouts), self, seed, step)

    def explore(self, base: Base, states: Restarts, count: int) -> Rollouts:
        """`count` partial rollouts from every state, leaves [N, J x count, S] on the host, state by state.

        Args:
          base: what the states are of.
          states: where to restart.
          count: M.

        Raises:
          ConfigError: the states are of other base trajectories.
          NotFiniteError: tokens were drawn from logits that are not finite.
        """
        if states.base is not base:
            raise ConfigError("these states are of other base trajectories; make them with states(base, ...)")
        place = self.engine.placement
        placed, draws = place.place_rows(base.encoded.queries), draws_of(base.seed, base.step, place)
        arrays = place.place_rows(states.arrays)
        rollouts, _ = self.engine.explore(
            self.model.params,
            placed,
            arrays,
            seed_key=draws.tokens,
            step=draws.step,
            rollouts=count,
            sampling=self.sampling,
            after=base.rollouts.length.shape[1],
        )
        rollouts = gather(rollouts)
        require_finite(rollouts, "exploration")
        return self.model.text.trimmed(rollouts, states.arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyLearner:
    """Updates a model: clip-higher policy gradients over partial rollouts, each prefix computed once."""

    model: Model
    settings: OptimizerConfig
    learner: Learner

    def init(self) -> TrainState:
        """The model's parameters in float32, and fresh moments."""
        return self.model.policy.fresh_state(self.learner)

    def update(
        self, state: TrainState, batch: StateGroups, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step over a batch; `state` is used up.

        Args:
          state: of `init`, or of the update before; where loss.mismatch is not none, with the parameters that
            sampled.
          batch: states that carry a gradient.
          reference: float32 parameters that the policy is held near, where loss.kl_coefficient is above 0.

        Returns:
          (the new state, metrics as floats).

        Raises:
          ConfigError: no state of the batch carries a gradient, or a reference is missing.
        """
        if self.learner.loss.kl_coefficient > 0 and reference is None:
            raise ConfigError("loss.kl_coefficient is above 0; give reference, such as init().params")
        if len(batch.query) == 0:
            raise ConfigError("no state carries a gradient: all rollouts of each had one reward")
        parts = row_parts(self.model.policy.model.training.mesh)
        budget = self.settings.micro_tokens
        batch, mismatch, _ = weighed(self.learner, state.params, batch, budget)
        bundles = bundles_of(with_shares(batch, self.learner.loss), parts, budget)
        state, metrics = self.learner.update(state, bundles, reference)
        return state, mismatch | {name: float(value) for name, value in jax.device_get(metrics).items()}
