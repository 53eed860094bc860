"""The options of training: a frozen dataclass for each section.

Every field says its unit and, where a number has one, its source: (paper) arXiv 2507.07017,
(release) the authors' released code, (ours) a choice of this project.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from fr3e_jax.config.alarms import AlarmsConfig
from fr3e_jax.config.report import ReportConfig
from fr3e_jax.config.stages import CreditConfig, ExploreConfig, LossConfig, OptimizerConfig, RolloutConfig
from fr3e_jax.config.values import (
    Bounds,
    Count,
    Expression,
    MeshAxis,
    Name,
    NonNegativeInt,
    NonNegativeNumber,
    PositiveNumber,
    RowCount,
    Seed,
    Share,
    Size,
)

Algorithm = Literal["fr3e", "grpo", "grpo++"]
BadRows = Literal["refuse", "drop"]
PACKAGE = Path(__file__).parent.parent
QUICKSTART_MODEL = PACKAGE / "assets" / "quickstart"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that is trained: where it is read from, and its number types."""

    path: Name = "quickstart"
    """Hugging Face directory of a Qwen2, Qwen3 or Llama model, directory of a run that has ended, name on the
    hub (`Org/Name`, or `Org/Name@revision`), or `quickstart` for the small one that is shipped."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; parameters, statistics and reductions stay float32. Use bfloat16 on
    accelerators."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights of the model that a run writes at its end."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where problems come from: a file, a data set, a task, and how its columns are read and judged."""

    name: Name
    """`carry_addition`, `word_addition`; `gym:NAME`, a data set of reasoning-gym; a named data set
    (fr3e_jax/problems/README.md); a file `*.jsonl`, `*.csv`, `*.tsv` or `*.parquet`; a data set of the hub,
    `Org/Name` or `Org/Name@revision`; or a task of your own, `FILE.py` or the name of an entry point."""
    weight: PositiveNumber = 1.0
    """Share of the queries, relative to the other sources'."""
    split: Name | None = None
    """Split of a data set of the hub. Default: the named data set's, or `train`."""
    subset: Name | None = None
    """Subset (configuration) of a data set of the hub."""
    prompt: Name | None = None
    """Column of the question; dots and numbers go into nested ones. Default: the named data set's, or the
    first of `question`, `problem`, `prompt`, `messages`, `conversations` that exists. It holds text, or
    chats, whose last turn of the user is the question."""
    answer: Name | None = None
    """Column of the answer. Default: the named data set's, or the first of `answer`, `final_answer`,
    `solution` that exists. Of a chat it is what the assistant says behind the question."""
    answer_is: Literal["plain", "last_box", "after_hashes"] | None = None
    """What that column holds: the answer; a solution whose last \\boxed{} it is; a solution with the answer
    behind ####. Default: the named data set's, or `plain`."""
    solution: Name | None = None
    """Column of a worked solution, which `sft` teaches. Default: `solution`."""
    scorer: Name | None = None
    """What judges answers: `math`, `exact`, `numeric`, `choice`, or a file `*.py` of your own with a function
    `score`. Default: the named data set's, or `math`."""
    where: dict[str, list[str | int]] = dataclasses.field(default_factory=dict)
    """Column -> the values that a row may have there; other rows are left out."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of a reasoning-gym data set, or of `problems` of a task of your own."""
    file: Name | None = None
    """A copy of a named data set here, read instead of the hub's."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The problems and what the model sees of them."""

    source: Name | list[SourceConfig] = "carry_addition"
    """Where problems come from: a name as in SourceConfig.name, a named mixture such as `fr3e_paper`, or a
    list of sources with their settings and weights. `carry_addition`: column by column with written carries.
    `word_addition`: asked in words, scored by the final number."""
    min_digits: Count = 3
    """Fewest digits of an operand of the two additions."""
    max_digits: Count = 3
    """Most digits of an operand of the two additions."""
    template: Name = "plain"
    """What the model sees: `plain`, the question as it is; `chat`, through the tokenizer's chat template;
    `boxed`, the question with "Please reason step by step, and put your final answer within \\boxed{}."
    (paper); `boxed_chat`, that through the chat template; or a text of your own with `{question}` in it."""
    held_out: Size | None = None
    """Problems kept for evaluation; training never draws them. Default: 256, but of data sets no more than a
    tenth of the different questions, and of a task of your own no more than it has."""
    held_out_source: Name | None = None
    """Evaluate on the first `held_out` (by default 256) problems of this source, such as `math500`, and train
    on all of `source`."""
    retire_above: Share | None = None
    """Ask a question no more once its remembered success rate is at least this: that of the answers from the
    bare query, over the rounds that asked it, the newest with half of the weight. The run ends when fewer
    than rollout.queries questions are left, or with `auto` than its smallest round has. For data sets, files
    and tasks of your own; off by default (paper)."""
    sample_by: Literal["uniform", "difficulty"] = "uniform"
    """`uniform`: every question once in an epoch (paper). `difficulty`: one whose remembered success rate is
    p with probability 4 p (1 - p), at least 0.1, relative to one that was never asked (ours)."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Queries of more than rollout.max_prompt tokens: end with an error, or leave them out and say how many
    (of data sets; of generated problems they are always refused)."""
    bad_rows: BadRows = "refuse"
    """RowCount of data sets that hold no problem (empty, null, NaN, no box where answer_is asks for one), and
    rows whose answer no response can ever be right for (a list written as text, `Answer: 70`; `seventy` for
    the scorer numeric; no letter for choice). `refuse`: the first of the former ends the run with an error;
    the latter are told, and are an error where they are more than a tenth. `drop`: all are left out and
    counted. Nothing is left out of held_out_source."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Rewards of answers: their parts, and how much each counts."""

    answer: NonNegativeNumber = 1.0
    """Weight of the answer being right. Rewards are weighted means of the parts, in [0, 1]; values of states
    are success rates where this is the only part (paper)."""
    format: NonNegativeNumber = 0.0
    """Weight of the response having the form of reward.pattern."""
    pattern: Annotated[str, Expression()] = r"\\boxed\{"
    """Regular expression of Python that a response with the right form contains somewhere. `.` is any
    character but a new line; behind (?s) at the beginning of the pattern it is any. It is searched for within
    scoring.time_limit; a response that takes longer has not the form, and reward/timed_out counts it."""
    success_at: Share = 1.0
    """Least reward of an answer that counts as right: explore.keep, states/all_right and the accuracy of
    evaluations go by it. Only scorers that give numbers, and reward.format, need less than 1."""
    cut: Literal["wrong", "judged", "masked", "shaped"] = "wrong"
    """Answers that the length limit cut off: `wrong` whatever they say (ours); `judged` like others;
    `masked`, counted neither in values nor in the gradient, and not explored (DAPO's overlong filtering,
    arXiv 2503.14476); or `shaped`, wrong, with rewards that fall to 0 over the last tokens before the limit
    (DAPO's soft overlong punishment). Evaluations count them as wrong in any case."""
    cut_slope: Share = 0.2
    """Share of rollout.max_response over which `shaped` rewards fall: that of an answer of L tokens is
    multiplied by min(1, (max_response - L) / (cut_slope max_response)) (DAPO: 4,096 of 20,480 tokens)."""


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """The worker processes that judge answers."""

    workers: NonNegativeInt = 0
    """Processes that judge; 0: one for each core of the host but one, up to 16. They start when a scorer
    needs one."""
    time_limit: PositiveNumber = 5.0
    """Seconds that judging an answer may take; then it is wrong."""
    memory_gb: Annotated[float, Bounds(least=1, why="of which a worker needs 1 GiB")] = 4.0
    """Most memory of a worker, GiB; an answer that takes more is wrong."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy on the held-out problems."""

    every: NonNegativeInt = 10
    """Steps between evaluations; 0 evaluates before and after only."""
    rows: RowCount = 256
    """Answers decoded at a time; bounds memory."""
    samples: Annotated[int, Bounds(least=1, most=4096)] = 1
    """Answers to each problem; the accuracy is the share of all that are right."""
    temperature: Annotated[float, Bounds(least=0)] = 0.0
    """0: greedy answers. 1: answers drawn as those that are trained on. Their accuracy is the mean success
    rate of the policy, V(S_0), on the held-out problems; it moves where greedy answers do not change yet."""


@dataclasses.dataclass(frozen=True)
class EndConfig:
    """When a run ends before its last step. It is evaluated and exported as after the last one."""

    accuracy: Share | None = None
    """Held-out accuracy at which the run ends, once as many evaluations in a row as end.evaluations are at
    least this."""
    evaluations: Count = 2
    """Evaluations in a row that must reach end.accuracy; that before the first step counts too."""
    tokens: Count | None = None
    """Tokens drawn, after which the run ends with the step that passes them."""
    flops: PositiveNumber | None = None
    """FLOPs of rollouts, updates and all other passes of the model (`flops/` in metrics.jsonl), after which
    the run ends likewise."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a run that was killed goes on."""

    every: Count = 10
    """How many steps lie between two checkpoints."""
    keep: Count = 2
    """How many of the last checkpoints stay; older ones are deleted."""
    keep_every: NonNegativeInt = 0
    """Steps between checkpoints that are kept for good, beside the last ones; 0: none are."""


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """The rollouts that a run keeps in its folder rollouts, a file a step (fr3e_jax/run/README.md)."""

    every: NonNegativeInt = 1
    """Steps between those whose rollouts are kept, all of them; 0 keeps none."""
    max_gb: PositiveNumber = 20.0
    """Most that these files may take, GiB. When they take more, some are deleted until they take nine tenths:
    of older steps more than of newer ones, and the last one stays. The log says which."""


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
    """The device mesh; the product is the number of devices, and -1 means all that are left."""

    data: MeshAxis = 1
    """Copies of the parameters, each with its own rows."""
    fsdp: MeshAxis = -1
    """Parts that parameters, optimizer state and rows are split into."""
    tensor: MeshAxis = 1
    """Parts that heads, MLP and vocabulary are split into."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(DevicesConfig):
    """The device mesh; data x fsdp x tensor is the number of devices, and -1 means all that are left."""

    update_tensor: Count | None = None
    """Parts that heads, MLP and vocabulary are split into in updates, on the same devices: mesh.fsdp x
    mesh.tensor / this is then the fsdp of updates. mesh.tensor is that of sampling. It changes no results.
    Default: on TPUs the fastest that fits by the plan's estimate, elsewhere mesh.tensor; the log says which
    it is."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that run one program, one on each host of a slice."""

    initialize: bool = False
    """Join the other processes (also by FR3E_DISTRIBUTED=1 in the environment). jax finds them on Cloud TPU,
    GKE and Slurm; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    timeout: Count = 300
    """Seconds that a process waits for another that is gone or late, before it ends with an error."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a model by FR3E, or by one of its baselines, GRPO and GRPO++."""

    algorithm: Algorithm = "fr3e"
    """`fr3e`; `grpo`; `grpo++`, which is grpo with rejection sampling and clip-higher."""
    steps: Count = 100
    """Training steps."""
    seed: Seed = 0
    """Seed of all random numbers of the run."""
    run_dir: Name | None = None
    """Where checkpoints, metrics, log and the final model go, a directory or `gs://BUCKET/PATH`; default
    runs/NAME-TIME. Several processes need one that all of them see."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on where the run directory holds a checkpoint; `never` refuses such a directory."""
    compilation_cache: Name = "auto"
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
    end: EndConfig = dataclasses.field(default_factory=EndConfig)
    alarms: AlarmsConfig = dataclasses.field(default_factory=AlarmsConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
