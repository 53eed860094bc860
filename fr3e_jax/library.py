"""The stages of FR3E for a notebook: load a model, sample, restart, judge, and update, one call each.

    import fr3e_jax as fr3e

    model = fr3e.Model.load("Qwen/Qwen2.5-0.5B-Instruct", template="boxed")
    engine = model.engine(max_response=512)
    queries = model.encode(["What is 12 * 13?", "What is 17 + 5?"])
    base = engine.first_return(queries, count=4)
    states = fr3e.states(base, rule="entropy", count=4)
    rollouts = engine.explore(base, states, count=16)
    reward = fr3e.judge(model.texts(states, rollouts), lambda question, answer: "156" in answer)
    advantage, value, alpha = fr3e.modulated_advantage(reward, states.valid)
    learner = model.learner(fr3e.LossConfig(), fr3e.OptimizerConfig(learning_rate=1e-6))
    state, metrics = learner.update(learner.init(), fr3e.groups(states, rollouts, advantage))
    model = model.updated(state)

These are the programs that training runs. Nothing here sets signal handlers or environment variables. Arrays
are numpy arrays on the host, whose shapes README's words name: B queries, R base trajectories, N kept ones, J
states of each, M partial rollouts of each state, S tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.explore import KeepRule, PositionRule
from fr3e_jax.config import ConfigError, ExploreConfig, LossConfig, OptimizerConfig
from fr3e_jax.engine.caches import Caches
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.groups import collect
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import TrainState
from fr3e_jax.learner.update import Learner, UpdateMetrics
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import make_mesh, row_parts
from fr3e_jax.pretrained.model import compute_type
from fr3e_jax.pretrained.text import Text
from fr3e_jax.problems.stream import padded_width
from fr3e_jax.rewards.verify import whole_answer
from fr3e_jax.run.build import Policy, open_policy
from fr3e_jax.step.rounds import draws_of, find_states, keep
from fr3e_jax.types import Queries, Rollouts, StateGroups, States

__all__ = [
    "Answers",
    "Base",
    "Explorer",
    "Model",
    "PolicyLearner",
    "Restarts",
    "groups",
    "judge",
    "modulated_advantage",
    "states",
]

SHOWN = 3  # rows of what a repr shows


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Questions and their tokens. `queries` is padded with copies of the first to what the mesh divides."""

    questions: tuple[str, ...]
    queries: Queries

    def __repr__(self) -> str:
        tokens = self.queries.length[: len(self.questions)]
        return f"{len(self.questions)} queries of {tokens.min()} to {tokens.max()} tokens"


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """Base trajectories of queries, and the KV caches that exploration restarts from.

    seed, step: what they were drawn with.
    """

    encoded: Encoded
    rollouts: Rollouts
    """Leaves [B, R, S], those of queries that are only padding included."""
    caches: Caches
    engine: "Explorer"
    seed: int
    step: int

    @property
    def texts(self) -> list[list[str]]:
        """The text of every base trajectory, without those of padding: [B][R]."""
        rows, text = self.rollouts, self.engine.model.text
        return [
            text.answers([rows.token[b, r, :n] for r, n in enumerate(rows.length[b])], rows.stopped[b])
            for b in range(len(self.encoded.questions))
        ]

    def __repr__(self) -> str:
        r = self.rollouts.length.shape[1]
        shown = zip(self.encoded.questions[:SHOWN], self.texts, strict=False)
        lines = [f"  {question!r}: {answers[0]!r}" for question, answers in shown]
        return "\n".join([f"{r} base trajectories of each of {self.encoded}; the first of each:", *lines])


@dataclasses.dataclass(frozen=True, eq=False)
class Restarts:
    """States of kept trajectories, N x J, to restart from.

    arrays: laid out for the mesh, so that N has rows of padding, which are not valid. value: once it is known
    (`with_values`).
    """

    base: Base
    arrays: States
    value: Float[np.ndarray, "N J"] | None = None

    @property
    def valid(self) -> Bool[np.ndarray, "N J"]:
        """Which states there are."""
        return np.asarray(self.arrays.valid)

    @property
    def prefixes(self) -> list[list[str | None]]:
        """The text that each state keeps of its base trajectory, [N][J]; None where there is no state."""
        text, arrays = self.base.engine.model.text, self.arrays
        return [
            [
                text.decode([arrays.response[n, : arrays.prefix_length[n, j]]])[0] if valid else None
                for j, valid in enumerate(self.valid[n])
            ]
            for n in range(len(self.valid))
        ]

    def with_values(self, value: Any) -> "Restarts":
        """The same states with V(S_j), float32 [N, J], to be shown."""
        shaped("value", value, self.valid.shape)
        return dataclasses.replace(self, value=np.asarray(value))

    def __repr__(self) -> str:
        kept = np.flatnonzero(self.valid.any(axis=1))
        lines, prefixes = [f"{self.valid.sum()} states of {len(kept)} trajectories"], self.prefixes
        for n in kept[:SHOWN]:
            lines.append(f"  {self.base.encoded.questions[self.arrays.query[n]]!r}")
            for j in np.flatnonzero(self.valid[n]):
                worth = "" if self.value is None else f"V={self.value[n, j]:.2f} "
                lines.append(f"    {worth}{prefixes[n][j]!r}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Whole answers, prefixes included. question: of each trajectory, [N]. text: [N][J][M], None where there
    is no state."""

    question: list[str]
    text: list[list[list[str] | None]]
    rollouts: int

    def __repr__(self) -> str:
        some = next((texts for row in self.text for texts in row if texts), [])
        return f"answers of {self.rollouts} partial rollouts of each state, such as {some[:SHOWN]!r}"


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
        count, width = -(-len(rows) // parts) * parts, padded_width(max(map(len, rows)))
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
        """The learner that updates these parameters; by default with the settings of training."""
        settings = (loss or LossConfig(), optimizer or OptimizerConfig())
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
        rollouts, caches, _ = self.engine.first_return(
            self.model.params, placed, draws.tokens, draws.step, count, self.sampling
        )
        rollouts = gather(rollouts)
        require_finite(rollouts, "first return")
        return Base(encoded, self.model.text.trimmed(rollouts), caches, self, seed, step)

    def explore(self, base: Base, states: Restarts, count: int, keep: bool = True) -> Rollouts:
        """`count` partial rollouts from every state, leaves [N, J x count, S] on the host, state by state.

        Args:
          base: what the states are of.
          states: where to restart.
          count: M.
          keep: whether the KV caches of `base` can be used again; without, their memory is given back.

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
            base.caches,
            arrays,
            seed_key=draws.tokens,
            step=draws.step,
            rollouts=count,
            sampling=self.sampling,
            keep=keep,
        )
        rollouts = gather(rollouts)
        require_finite(rollouts, "exploration")
        return self.model.text.trimmed(rollouts, states.arrays)


def states(
    base: Base,
    rule: PositionRule = "entropy",
    count: int = 4,
    min_gap: int = 0,
    reward: Any = None,
    keep_rule: KeepRule = "all",
) -> Restarts:
    """Where to restart: the query, and before each of `count` positions of the base trajectories.

    Args:
      base: what was sampled.
      rule: what makes a position, as explore.rule, or a function.
      count: K, positions of a trajectory.
      min_gap: least distance of two, tokens.
      reward: float32 [B, R] of the base trajectories, where `keep_rule` is not `all`.
      keep_rule: which trajectories are kept, as explore.keep, or a function.

    Raises:
      ConfigError: a rule needs rewards and there are none, or their shape is another.
      RuleError: there is no rule of a name, or its function gives something else than it must.
    """
    rules = ExploreConfig(positions=count, rule=rule, min_gap=min_gap, keep=keep_rule)
    rollouts, asked = base.rollouts, len(base.encoded.questions)
    b, r = rollouts.length.shape
    if reward is None and keep_rule != "all":
        raise ConfigError(f"keep_rule {keep_rule} chooses by reward; give reward, float32 [{asked}, {r}]")
    engine, rewards = base.engine.engine, np.zeros((b, r), np.float32)
    if reward is not None:
        shaped("reward", reward, (asked, r))
        rewards[:asked] = reward
    place = engine.placement
    draws, queries = draws_of(base.seed, base.step, place), base.encoded.queries
    kept = gather(keep(rules, draws, *place.place_rows((queries.index, rewards))))
    kept = kept & (np.arange(b) < asked)[:, None]
    sampled = place.place_rows(rollouts)
    return Restarts(base, find_states(rules, engine, draws, queries, rollouts, kept, sampled)[0])


def judge(answers: Answers, verifier: Callable[[str, str], float]) -> Float32[np.ndarray, "N J M"]:
    """Rewards of whole answers, 0 where there is no state.

    Args:
      answers: as `Model.texts` makes them.
      verifier: of a question and an answer to it; its value is the reward, in [0, 1].
    """
    reward = np.zeros((len(answers.text), len(answers.text[0]), answers.rollouts), np.float32)
    for n, (question, row) in enumerate(zip(answers.question, answers.text, strict=True)):
        for j, texts in enumerate(row):
            if texts is not None:
                reward[n, j] = [float(verifier(question, text)) for text in texts]
    return reward


def groups(states: Restarts, rollouts: Rollouts, advantage: Any) -> StateGroups:
    """The states that carry a gradient, with their rollouts, for the learner.

    Args:
      states: where the rollouts restarted.
      rollouts: leaves [N, J x M, S].
      advantage: float32 [N, J, M]; a state whose advantages are all 0 is left out.
    """
    n, j = states.valid.shape
    shaped("advantage", advantage, (n, j, rollouts.length.shape[1] // j))
    accepted = states.valid & np.any(np.asarray(advantage) != 0, axis=2)
    return collect(accepted, states.base.encoded.queries, states.arrays, rollouts, np.asarray(advantage))


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
    ) -> tuple[TrainState, UpdateMetrics]:
        """One optimizer step over a batch; `state` is used up.

        Args:
          state: of `init`, or of the update before.
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
        bundles = bundles_of(batch, parts, self.settings.micro_tokens)
        state, metrics = self.learner.update(state, bundles, reference)
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}


def shaped(name: str, x: Array | np.ndarray | Any, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape.

    Raises:
      ConfigError: with both.
    """
    if np.shape(x) != shape:
        raise ConfigError(f"{name} has shape {list(np.shape(x))}, must be {list(shape)}")
