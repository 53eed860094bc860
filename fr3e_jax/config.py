"""The configuration of a run: frozen dataclasses, and what cannot run.

Every field says its unit and, where a number has one, its source: (paper) arXiv 2507.07017,
(release) the authors' released code, (ours) a choice of this project.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fr3e_jax.algorithm.credit import (
    ADVANTAGES,
    MODULATIONS,
    REJECT_RULES,
    AdvantageRule,
    FirstState,
    Modulation,
    RejectRule,
)
from fr3e_jax.algorithm.explore import KEEP_RULES, POSITION_RULES, KeepRule, PositionRule
from fr3e_jax.algorithm.loss import POLICY_LOSSES, PolicyLoss
from fr3e_jax.algorithm.rules import Rule, function_of, name_of

Algorithm = Literal["fr3e", "grpo", "grpo++"]
BadRows = Literal["refuse", "drop"]
PACKAGE = Path(__file__).parent
SectionT = TypeVar("SectionT")
QUICKSTART_MODEL = PACKAGE / "assets" / "quickstart"


class ConfigError(ValueError):
    """An impossible combination of settings; the message says what to change."""


def tables_of(section: Any) -> dict[str, Mapping[str, Rule]]:
    """Field name -> table, of the fields of a dataclass whose values are the names in one.

    `--help` shows each name with its line. In a library call a function may stand there as well.
    """
    found = {field.name: field.metadata.get("table") for field in dataclasses.fields(section)}
    return {name: table for name, table in found.items() if table is not None}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "quickstart"
    """Hugging Face directory of a Qwen2, Qwen3 or Llama model, name on the hub (`Org/Name`, or
    `Org/Name@revision`), or `quickstart` for the small one that is shipped."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; parameters, statistics and reductions stay float32. Use bfloat16 on
    accelerators."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights of the model that a run writes at its end."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of problems."""

    name: str
    """`carry_addition`, `word_addition`; `gym:NAME`, a data set of reasoning-gym; a named data set
    (fr3e_jax/problems/README.md); a file `*.jsonl`, `*.csv`, `*.tsv` or `*.parquet`; a data set of the hub,
    `Org/Name` or `Org/Name@revision`; or a task of your own, `FILE.py` or the name of an entry point."""
    weight: float = 1.0
    """Share of the queries, relative to the other sources'."""
    split: str | None = None
    """Split of a data set of the hub. Default: the named data set's, or `train`."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub."""
    prompt: str | None = None
    """Column of the question; dots and numbers go into nested ones. Default: the named data set's, or the
    first of `question`, `problem`, `prompt`, `messages`, `conversations` that exists. It holds text, or
    chats, whose last turn of the user is the question."""
    answer: str | None = None
    """Column of the answer. Default: the named data set's, or the first of `answer`, `final_answer`,
    `solution` that exists. Of a chat it is what the assistant says behind the question."""
    answer_is: Literal["plain", "last_box", "after_hashes"] | None = None
    """What that column holds: the answer; a solution whose last \\boxed{} it is; a solution with the answer
    behind ####. Default: the named data set's, or `plain`."""
    solution: str | None = None
    """Column of a worked solution, which `sft` teaches. Default: `solution`."""
    scorer: str | None = None
    """What judges answers: `math`, `exact`, `numeric`, `choice`. Default: the named data set's, or `math`."""
    where: dict[str, list[str | int]] = dataclasses.field(default_factory=dict)
    """Column -> the values that a row may have there; other rows are left out."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of a reasoning-gym data set, or of a task of your own."""
    file: str | None = None
    """A copy of a named data set here, read instead of the hub's."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The problems and what the model sees of them."""

    source: str | list[SourceConfig] = "carry_addition"
    """Where problems come from: a name as in SourceConfig.name, a named mixture such as `fr3e_paper`, or a
    list of sources with their settings and weights. `carry_addition`: column by column with written carries.
    `word_addition`: asked in words, scored by the final number."""
    min_digits: int = 3
    """Fewest digits of an operand of the two additions."""
    max_digits: int = 3
    """Most digits of an operand of the two additions."""
    template: str = "plain"
    """What the model sees: `plain`, the question as it is; `chat`, through the tokenizer's chat template;
    `boxed`, the question with "Please reason step by step, and put your final answer within \\boxed{}."
    (paper); `boxed_chat`, that through the chat template; or a text of your own with `{question}` in it."""
    held_out: int | None = None
    """Problems kept for evaluation; training never draws them. Default: 256, but of data sets no more than a
    tenth of the different questions, and of a task of your own no more than it has."""
    held_out_source: str | None = None
    """Evaluate on the first `held_out` (by default 256) problems of this source, such as `math500`, and train
    on all of `source`."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Queries of more than rollout.max_prompt tokens: end with an error, or leave them out and say how many
    (of data sets; of generated problems they are always refused)."""
    bad_rows: BadRows = "refuse"
    """Rows of data sets that hold no problem (empty, null, NaN, no box where answer_is asks for one), and
    rows whose answer no response can ever be right for (a list written as text, `Answer: 70`; `seventy` for
    the scorer numeric; no letter for choice). `refuse`: the first of the former ends the run with an error;
    the latter are told, and are an error where they are more than a tenth. `drop`: all are left out and
    counted. Nothing is left out of held_out_source."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """First return: whole answers sampled from the policy."""

    queries: int = 32
    """B, queries per sampling round (release: 32)."""
    base_trajectories: int = 4
    """R, whole answers per query that positions are sought in (release: 4). Not sampled by grpo and
    grpo++, which have no positions."""
    max_prompt: int = 1024
    """Longest query, tokens (release: 1024)."""
    max_response: int = 3072
    """Longest response, prefix included, tokens (release: 3072)."""
    temperature: float = 1.0
    """Sampling temperature (release: 1). Log-probabilities and entropies that are learned from and explored
    by are those of temperature 1, unfiltered."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 from all (ours)."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all (ours)."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Texts that end an answer, as the model's end tokens do. The answer is cut before such a text; the
    tokens up to there are judged and trained on (ours: none)."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What an answer earns."""

    answer: float = 1.0
    """Weight of the answer being right. Rewards are weighted means of the parts, in [0, 1]; values of states
    are success rates where this is the only part (paper)."""
    format: float = 0.0
    """Weight of the response having the form of reward.pattern."""
    pattern: str = r"\\boxed\{"
    """Regular expression of Python that a response with the right form contains somewhere. `.` is any
    character but a new line; behind (?s) at the beginning of the pattern it is any. It is searched for within
    scoring.time_limit; a response that takes longer has not the form, and reward/timed_out counts it."""
    success_at: float = 1.0
    """Least reward of an answer that counts as right, in (0, 1]: explore.keep, states/all_right and the
    accuracy of evaluations go by it. Only scorers that give numbers, and reward.format, need less than 1."""
    cut: Literal["wrong", "judged"] = "wrong"
    """Answers that the length limit cut off: `wrong` whatever they say, or `judged` like others."""


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """The worker processes that judge answers."""

    workers: int = 0
    """Processes that judge; 0: one for each core of the host but one, up to 16. They start when a scorer
    needs one."""
    time_limit: float = 5.0
    """Seconds that judging an answer may take; then it is wrong."""
    memory_gb: float = 4.0
    """Most memory of a worker, GiB; an answer that takes more is wrong."""


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """Entropy-eliciting explore: where to restart, and how often."""

    positions: int = 4
    """K, positions per kept trajectory (release: 4). grpo and grpo++ set it to 0."""
    rollouts: int = 16
    """M, rollouts per state (release: 16); the group size of grpo and grpo++."""
    rule: PositionRule = dataclasses.field(default="entropy", metadata={"table": POSITION_RULES})
    """What makes a position:"""
    min_gap: int = 0
    """Least distance of two positions, tokens (paper: 0)."""
    keep: KeepRule = dataclasses.field(default="first_of_each", metadata={"table": KEEP_RULES})
    """Base trajectories to explore:"""


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """Values, advantages, rejection."""

    advantage: AdvantageRule = dataclasses.field(default="group", metadata={"table": ADVANTAGES})
    """Advantage of a rollout, before it is modulated:"""
    modulation: Modulation = dataclasses.field(default="paper", metadata={"table": MODULATIONS})
    """alpha_j, by which the advantages of a state are multiplied:"""
    first_state: FirstState = "neutral"
    """Value change at the root: `neutral`, 0 (ours), or `released`, 1 - V(S_0) (release)."""
    sharpen: bool = False
    """Raise value changes to the power 1.5 and normalise them over the trajectory (release: an
    option)."""
    normalize_std: bool = False
    """Divide advantages by the group's standard deviation. grpo and grpo++ set it."""
    reject: RejectRule = dataclasses.field(default="state", metadata={"table": REJECT_RULES})
    """States without signal:"""
    max_rounds: int = 16
    """Most sampling rounds per step to fill the batch; then the run ends with an error (ours)."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective."""

    policy: PolicyLoss = dataclasses.field(default="clip", metadata={"table": POLICY_LOSSES})
    """What is minimised, before the two coefficients:"""
    clip_low: float = 0.22
    """The ratio's lower bound is 1 - clip_low (paper: 0.22; release: 0.2)."""
    clip_high: float = 0.28
    """The ratio's upper bound is 1 + clip_high (paper: 0.28; release: 0.3). grpo sets it to
    clip_low."""
    dual_clip: float | None = None
    """Bound of the loss of tokens with negative advantage, in multiples of it (release: 10); off by
    default (paper)."""
    kl_coefficient: float = 0.0
    """Weight of KL(policy, starting model), k3 estimate. At 0 (paper) no reference model is held."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's mean entropy, nats, as a bonus. At 0 (paper) it is not computed."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update."""

    batch_states: int = 64
    """Accepted states per step, each with M rollouts; what is left over is carried to the next step
    (ours)."""
    minibatches: int = 2
    """Optimizer steps per pass over the batch. With 1 (and 1 epoch) the ratio is 1 and clipping does
    nothing (ours: 2)."""
    epochs: int = 1
    """Passes over the batch (release: 1)."""
    micro_tokens: int = 8192
    """Tokens that run through the model at a time in each of the mesh's data x fsdp parts, padding included;
    bounds memory, does not change the gradient. One whole rollout there always is."""
    logit_chunk: int = 1024
    """Tokens whose logits exist at a time in each of the mesh's data x fsdp parts; bounds memory."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of holding it: less memory, a third more
    work."""
    learning_rate: float = 2e-6
    """AdamW's rate after warm-up (release: 2e-6)."""
    warmup_updates: int = 10
    """Optimizer steps of linear warm-up (ours)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after warm-up: `constant` (ours), or `linear` or `cosine` decay to final_rate_share over the
    rest of the run's optimizer steps, which are steps x epochs x minibatches."""
    final_rate_share: float = 0.0
    """Share of learning_rate that `linear` and `cosine` end at, in [0, 1]."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices; norms and biases are not decayed (ours)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm (release: 1)."""
    b1: float = 0.9
    """AdamW's decay of the first moment (release: 0.9)."""
    b2: float = 0.95
    """AdamW's decay of the second moment (ours)."""
    eps: float = 1e-8
    """AdamW's epsilon (its usual value)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that AdamW's two moments are held in between updates. `bfloat16` takes half their memory; they are
    computed in float32 and rounded up or down at random, so that small changes are right on average."""
    max_skipped: int = 5
    """Updates in a row whose loss or gradient is not finite, after which the run ends with an error. Each is
    skipped: parameters, moments and rate stay as they were (ours)."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Greedy accuracy on the held-out problems."""

    every: int = 10
    """Steps between evaluations; 0 evaluates before and after only."""
    rows: int = 256
    """Problems decoded at a time; bounds memory."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What survives a kill."""

    every: int = 10
    """Steps between checkpoints."""
    keep: int = 2
    """Last checkpoints to keep."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good, beside the last ones; 0: none are."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh; the product is the number of devices, and -1 means all that are left."""

    data: int = 1
    """Copies of the parameters, each with its own rows."""
    fsdp: int = -1
    """Parts that parameters, optimizer state and rows are split into."""
    tensor: int = 1
    """Parts that heads, MLP and vocabulary are split into."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that run one program, one on each host of a slice."""

    initialize: bool = False
    """Join the other processes (also by FR3E_DISTRIBUTED=1 in the environment). jax finds them on Cloud TPU,
    GKE and Slurm; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    timeout: int = 300
    """Seconds that a process waits for another that is gone or late, before it ends with an error."""


@dataclasses.dataclass(frozen=True)
class Config:
    """FR3E and its baselines."""

    algorithm: Algorithm = "fr3e"
    """`fr3e`; `grpo`; `grpo++`, which is grpo with rejection sampling and clip-higher."""
    steps: int = 100
    """Training steps."""
    seed: int = 0
    """All randomness is a function of it."""
    run_dir: str | None = None
    """Where checkpoints, metrics, log and the final model go, a directory or `gs://BUCKET/PATH`; default
    runs/NAME-TIME. Several processes need one that all of them see."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on where the run directory holds a checkpoint; `never` refuses such a directory."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept for the next start: a directory, `gs://BUCKET/PATH`, `off`, or `auto`:
    JAX_COMPILATION_CACHE_DIR, or beside a run directory in a bucket, or ~/.cache/fr3e_jax."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    explore: ExploreConfig = dataclasses.field(default_factory=ExploreConfig)
    credit: CreditConfig = dataclasses.field(default_factory=CreditConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised warm-up on the task's worked solutions."""

    out: str = "runs/sft"
    """Directory for the model, in the Hugging Face format."""
    seed: int = 0
    """All randomness is a function of it."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 128
    """Solutions per step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule of AdamW."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    init_path: str | None = None
    """Hugging Face directory or name on the hub to start from; by default a new model of the shape below is
    drawn."""
    hidden_size: int = 128
    """Width of a new model."""
    intermediate_size: int = 512
    """Width of its MLP."""
    num_hidden_layers: int = 4
    """Its layers."""
    num_attention_heads: int = 4
    """Its query heads."""
    num_key_value_heads: int = 2
    """Its key-value heads."""
    max_position_embeddings: int = 256
    """Its context, tokens; also the longest solution with its question."""
    dropped_carry: float = 0.6
    """carry_addition: probability that a solution forgets a carry between columns, the bad habit that
    reinforcement is to undo."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def resolve(config: Config) -> Config:
    """Write out what the algorithm implies: the baselines are settings of the same code."""
    if config.algorithm == "fr3e":
        return config
    explore = dataclasses.replace(config.explore, positions=0)
    credit = dataclasses.replace(config.credit, modulation="none", normalize_std=True)
    loss = config.loss
    if config.algorithm == "grpo":
        credit = dataclasses.replace(credit, reject="none")
        loss = dataclasses.replace(loss, clip_high=loss.clip_low)
    return dataclasses.replace(config, explore=explore, credit=credit, loss=loss)


def updates_of(config: Config) -> int:
    """Optimizer steps of the whole run."""
    return config.steps * config.optimizer.epochs * config.optimizer.minibatches


def check(config: Config, row_parts: int, context: int) -> None:
    """Refuse what cannot run.

    Args:
      config: resolved.
      row_parts: in how many parts the mesh splits rows (data x fsdp).
      context: the model's longest sequence, tokens.

    Raises:
      ConfigError: with one line that says what to change.
    """
    rollout, explore, optimizer = config.rollout, config.explore, config.optimizer
    at_least = {
        "steps": (config.steps, 1),
        "seed": (config.seed, 0),
        "rollout.queries": (rollout.queries, 1),
        "rollout.base_trajectories": (rollout.base_trajectories, 1),
        "rollout.max_prompt": (rollout.max_prompt, 1),
        "rollout.max_response": (rollout.max_response, 1),
        "explore.positions": (explore.positions, 0),
        "explore.rollouts": (explore.rollouts, 2),
        "explore.min_gap": (explore.min_gap, 0),
        "credit.max_rounds": (config.credit.max_rounds, 1),
        "optimizer.batch_states": (optimizer.batch_states, 1),
        "optimizer.minibatches": (optimizer.minibatches, 1),
        "optimizer.epochs": (optimizer.epochs, 1),
        "optimizer.micro_tokens": (optimizer.micro_tokens, 1),
        "optimizer.logit_chunk": (optimizer.logit_chunk, 1),
        "optimizer.warmup_updates": (optimizer.warmup_updates, 0),
        "optimizer.max_skipped": (optimizer.max_skipped, 1),
        "evaluate.every": (config.evaluate.every, 0),
        "evaluate.rows": (config.evaluate.rows, 1),
        "checkpoint.every": (config.checkpoint.every, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "checkpoint.keep_every": (config.checkpoint.keep_every, 0),
        "distributed.timeout": (config.distributed.timeout, 1),
        "data.held_out": (1 if config.data.held_out is None else config.data.held_out, 1),
    }
    check_names(config)
    check_at_least(at_least)
    check_seed(config.seed)
    if not rollout.temperature > 0:
        raise ConfigError(
            f"rollout.temperature is {rollout.temperature}; it must be above 0, since greedy rollouts "
            "of a state are all the same"
        )
    check_filters(rollout.top_k, rollout.top_p, "rollout.")
    if rollout.top_k == 1:
        raise ConfigError(
            "rollout.top_k is 1, which leaves one token to draw: all rollouts of a state would be the same; "
            "raise it, or use 0 to draw from all tokens"
        )
    if rollout.max_response == 1 and config.reward.cut == "wrong":
        raise ConfigError(
            "rollout.max_response is 1, which leaves no room for an answer and its end token, and answers "
            "that are cut count as wrong; raise it, or use --reward.cut judged"
        )
    check_reward(config.reward)
    check_scoring(config.scoring)
    if not (optimizer.learning_rate > 0 and optimizer.max_grad_norm > 0 and optimizer.eps > 0):
        raise ConfigError(
            "optimizer.learning_rate, optimizer.max_grad_norm and optimizer.eps must be above 0"
        )
    if not (0 <= optimizer.b1 < 1 and 0 <= optimizer.b2 < 1 and optimizer.weight_decay >= 0):
        raise ConfigError(
            "optimizer.b1 and optimizer.b2 must lie in [0, 1), optimizer.weight_decay must be at least 0"
        )
    if not 0 <= optimizer.final_rate_share <= 1:
        raise ConfigError(
            f"optimizer.final_rate_share is {optimizer.final_rate_share}; it must lie in [0, 1], since it is "
            "the share of optimizer.learning_rate that a run ends at"
        )
    if optimizer.schedule != "constant" and optimizer.warmup_updates >= updates_of(config):
        raise ConfigError(
            f"optimizer.warmup_updates {optimizer.warmup_updates} leaves optimizer.schedule "
            f"{optimizer.schedule} none of the run's {updates_of(config)} updates (steps x optimizer.epochs "
            "x optimizer.minibatches) to decay over; lower it, raise steps, or use --optimizer.schedule "
            "constant"
        )
    if not (0 <= config.loss.clip_low < 1 and config.loss.clip_high >= 0):
        raise ConfigError("loss.clip_low must lie in [0, 1) and loss.clip_high must be at least 0")
    if config.loss.dual_clip is not None and not config.loss.dual_clip > 1:
        raise ConfigError(f"loss.dual_clip is {config.loss.dual_clip}; it must be above 1, or null")
    if not config.loss.kl_coefficient >= 0:
        raise ConfigError("loss.kl_coefficient must be at least 0")
    if not config.loss.entropy_coefficient >= 0:
        raise ConfigError("loss.entropy_coefficient must be at least 0")
    if config.algorithm == "fr3e" and explore.positions == 0:
        raise ConfigError(
            "explore.positions is 0, which leaves fr3e nothing to return to; set it to 1 or more, or "
            "use --algorithm grpo++"
        )
    if rollout.max_prompt + rollout.max_response > context:
        raise ConfigError(
            f"rollout.max_prompt {rollout.max_prompt} + rollout.max_response {rollout.max_response} is "
            f"more than the model's context of {context}; lower one of them"
        )
    if optimizer.batch_states % optimizer.minibatches:
        raise ConfigError(
            f"optimizer.batch_states {optimizer.batch_states} does not divide by "
            f"optimizer.minibatches {optimizer.minibatches}"
        )
    for name, value in {
        "rollout.queries": rollout.queries,
        "evaluate.rows": config.evaluate.rows,
    }.items():
        if value % row_parts:
            raise ConfigError(
                f"{name} is {value}, which does not divide by the mesh's data x fsdp = {row_parts}"
            )


def without_effect(config: Config) -> list[str]:
    """Settings that the user has set and that change nothing, as sentences.

    Args:
      config: as given, not resolved.
    """
    default = Config()
    told: list[str] = []

    def tell(section: str, names: str, why: str) -> None:
        given, usual = getattr(config, section), getattr(default, section)
        named = [n for n in names.split() if getattr(given, n) != getattr(usual, n)]
        told.extend(f"{section}.{name} has no effect: {why}" for name in named)

    explores = config.algorithm == "fr3e"
    if not explores:
        why = f"{config.algorithm} restarts from no positions"
        tell("explore", "positions rule min_gap keep", why)
        tell("rollout", "base_trajectories", why)
        tell("credit", "modulation first_state sharpen", why)
    elif config.credit.modulation == "none":
        tell("credit", "first_state sharpen", "credit.modulation is none")
    if config.algorithm == "grpo":
        tell("credit", "reject", "grpo rejects no states")
        tell("loss", "clip_high", "grpo clips at loss.clip_low on both sides")
    if config.reward.format == 0:
        tell("reward", "pattern", "reward.format is 0")
    if config.optimizer.schedule == "constant":
        tell("optimizer", "final_rate_share", "optimizer.schedule is constant")
    if updates_of(config) == config.steps and config.loss.policy == default.loss.policy:
        why = "with one update a step the ratio is 1"
        tell("loss", "clip_low clip_high dual_clip", why)
    return told


def check_names(section: Any, prefix: str = "") -> None:
    """Refuse names that are in no table.

    Args:
      section: a configuration, or a part of it.
      prefix: what stands before its fields' names.

    Raises:
      ConfigError: with one line that says what to choose from.
    """
    tables = tables_of(section)
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_names(value, f"{name}.")
        elif field.name in tables and not callable(value) and value not in tables[field.name]:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(tables[field.name])}")


def with_functions(section: SectionT) -> SectionT:
    """A section with the functions of its rules in place of their names.

    What is compiled for it is compiled for the functions: a name may get another one.

    Raises:
      RuleError: there is no rule of a name.
    """
    functions = {
        name: function_of(table, getattr(section, name)) for name, table in tables_of(section).items()
    }
    return dataclasses.replace(section, **functions)  # type: ignore[type-var]


def check_at_least(settings: Mapping[str, tuple[float, int]]) -> None:
    """Refuse settings, name -> (value, least), that are below their least value.

    Raises:
      ConfigError: with one line that says what to change.
    """
    for name, (value, least) in settings.items():
        if not value >= least:
            raise ConfigError(f"{name} is {value}, must be at least {least}")


def check_seed(seed: int) -> None:
    """Refuse seeds that random keys cannot have.

    Raises:
      ConfigError: with one line that says what to change.
    """
    if seed >= 2**32:
        raise ConfigError(f"seed is {seed}, must be below 2^32")


def check_reward(reward: RewardConfig) -> None:
    """Refuse rewards that say nothing.

    Raises:
      ConfigError: with one line that says what to change.
    """
    if not (reward.answer >= 0 and reward.format >= 0 and 0 < reward.answer + reward.format < math.inf):
        raise ConfigError("reward.answer and reward.format must be at least 0, and one of them above 0")
    if not 0 < reward.success_at <= 1:
        raise ConfigError(f"reward.success_at is {reward.success_at}, must be above 0 and at most 1")
    try:
        re.compile(reward.pattern)
    except re.error as error:
        raise ConfigError(f"reward.pattern {reward.pattern!r} is no regular expression: {error}") from None


def check_scoring(scoring: ScoringConfig) -> None:
    """Refuse limits that no answer keeps.

    Raises:
      ConfigError: with one line that says what to change.
    """
    check_at_least({"scoring.workers": (scoring.workers, 0)})
    if not scoring.time_limit > 0:
        raise ConfigError(f"scoring.time_limit is {scoring.time_limit}, must be above 0 seconds")
    if not scoring.memory_gb >= 1:
        raise ConfigError(f"scoring.memory_gb is {scoring.memory_gb}; a worker needs 1 or more")


def check_filters(top_k: int, top_p: float, prefix: str = "") -> None:
    """Refuse top-k and top-p that leave nothing to draw from.

    Raises:
      ConfigError: with one line that says what to change.
    """
    if top_k < 0:
        raise ConfigError(f"{prefix}top_k is {top_k}; it must be at least 1, or 0 to draw from all tokens")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{prefix}top_p is {top_p}; it must lie in (0, 1], and 1 draws from all tokens")


def as_written(section: Any) -> dict[str, Any]:
    """A configuration as dicts, with the names of its rules in place of functions."""
    tables, written = tables_of(section), dataclasses.asdict(section)
    for name in written:
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            written[name] = as_written(value)
        elif name in tables:
            written[name] = name_of(tables[name], value)
    return written


def dump(config: Config) -> str:
    """The configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(as_written(config), sort_keys=False)
