"""The options of the algorithm's stages: a frozen dataclass for each section.

Every field says its unit and, where a number has one, its source: (paper) arXiv 2507.07017,
(release) the authors' released code, (ours) a choice of this project.
"""

import dataclasses
from typing import Annotated, Literal

from fr3e_jax.algorithm.advantage import ADVANTAGES, AdvantageRule, Baseline
from fr3e_jax.algorithm.aggregates import AGGREGATES, Aggregate
from fr3e_jax.algorithm.credit import Estimator
from fr3e_jax.algorithm.keep import KEEP_RULES, KeepRule
from fr3e_jax.algorithm.modulation import MODULATIONS, Modulation
from fr3e_jax.algorithm.objectives import OBJECTIVES, Objective
from fr3e_jax.algorithm.positions import POSITION_RULES, PositionRule
from fr3e_jax.algorithm.reject import REJECT_RULES, RejectRule
from fr3e_jax.algorithm.segments import StateWeight
from fr3e_jax.algorithm.token_weights import Mismatch
from fr3e_jax.algorithm.values import FirstState
from fr3e_jax.config.values import (
    Bounds,
    CacheSize,
    Count,
    Decay,
    NonNegativeInt,
    NonNegativeNumber,
    PositiveNumber,
    QueryCount,
    RowCount,
    Samples,
    Share,
    Size,
    TopK,
    TopP,
    UnitInterval,
)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """First return: whole answers sampled from the policy."""

    queries: QueryCount = 32
    """B, queries per sampling round (release: 32); or `auto`, as many as fill the batch, by the states that
    queries have given so far (ours). A step then seldom needs a second round."""
    max_queries: RowCount = 64
    """Most queries of a round where rollout.queries is `auto`; fewer where KV caches of so many do not fit
    (ours: twice the release's)."""
    cache_gb: CacheSize = "auto"
    """Memory of the KV caches on each device, 10^9 bytes. Branches that find no room wait; in float32 they
    draw the same tokens. With rollout.queries `auto` it bounds rounds too. `auto`: what the state of training
    and programs leave; on CPU a quarter of the machine's memory (ours)."""
    wait_for: Annotated[float, Bounds(least=0.5, most=1, why="it is a share; 1 waits for all")] = 1.0
    """Share of a round's rollouts that the update waits for; the others go on in the next step, under its
    parameters, and a query is judged when all its rollouts are there. Below 1 the base trajectories of new
    queries are sampled beside the partial rollouts of those before (ours; at 1 everybody waits: paper)."""
    base_trajectories: Samples = 4
    """R, whole answers per query that positions are sought in (release: 4). Not sampled by grpo and
    grpo++, which have no positions."""
    max_prompt: Size = 1024
    """Longest query, tokens (release: 1024)."""
    max_response: Size = 3072
    """Longest response, prefix included, tokens (release: 3072)."""
    temperature: Annotated[float, Bounds(above=0, why="at 0 all rollouts of a state are the same")] = 1.0
    """Sampling temperature (release: 1). The position rules and the loss use log-probabilities and entropies
    of temperature 1, unfiltered."""
    top_k: TopK = 0
    """Draw from this many of the most likely tokens; 0 from all (ours)."""
    top_p: TopP = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all (ours)."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Texts that end an answer, as the model's end tokens do. The answer is cut before such a text; the
    tokens up to there are judged and trained on (ours: none)."""


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """Entropy-eliciting explore: where to restart, and how often."""

    positions: NonNegativeInt = 4
    """K, positions per kept trajectory (release: 4). grpo and grpo++ set it to 0."""
    rollouts: Annotated[int, Bounds(least=2, most=2**12)] = 16
    """M, rollouts per state (release: 16); the group size of grpo and grpo++."""
    rule: PositionRule = dataclasses.field(default="entropy", metadata={"table": POSITION_RULES})
    """What makes a position:"""
    min_gap: NonNegativeInt = 0
    """Least distance of two positions, tokens (paper: 0)."""
    keep: KeepRule = dataclasses.field(default="first_of_each", metadata={"table": KEEP_RULES})
    """Base trajectories to explore:"""
    adaptive: bool = False
    """Fewer positions and rollouts where a query is often solved: ceil(K (1 - V(root))) and
    ceil(M (1 - V(root))), at least 1 and 2; V(root) is the mean reward of its base trajectories (ours)."""
    temperature: Annotated[float, Bounds(above=0, why="or null")] | None = None
    """Sampling temperature of the first token after a state, the uncertain one, where it is drawn again; from
    the bare query it is rollout.temperature, as of all other tokens. null: rollout.temperature (ours)."""
    pilots: Count = 2
    """Rollouts of each of the two likeliest tokens at a candidate, by which the rule mutual_information
    ranks it; there are 4 K candidates (ours)."""


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """Credit: values and advantages of states, and which states are rejected."""

    advantage: AdvantageRule = dataclasses.field(default="group", metadata={"table": ADVANTAGES})
    """Advantage of a rollout, before it is modulated:"""
    estimator: Estimator = "paper"
    """What is trained on, and with which advantage. `paper`: rollouts, alpha_j (r - V(S_j)). `value`:
    rollouts, r - V(S_j). `edge`: these, and every segment of the base trajectory, V(S_{j+1}) - V(S_j), the
    last r - V(S_K) (SPO, arXiv 2505.23564; VinePPO, 2410.01679)."""
    baseline: Baseline = "mean"
    """What a rollout's reward is compared with: `mean` of all M of its state (paper), or `leave_one_out`, of
    the others (RLOO, arXiv 2402.14740). With it grpo and grpo++ do not divide by the standard deviation."""
    state_weight: StateWeight = "rollout"
    """What counts the same: every `rollout` (paper), so that tokens behind more states count more; or every
    `trajectory`, by weights that are fixed before rollouts are sampled (ours)."""
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
    max_rounds: Count = 16
    """Most sampling rounds per step to fill the batch; credit.short_batch says what happens then (ours)."""
    short_batch: Literal["error", "use"] = "error"
    """A step whose credit.max_rounds rounds do not fill the batch: `error` ends the run and says what to
    change; `use` takes the states that there are, in fewer minibatches of at most the usual size. A step
    without any state changes nothing; optimizer.max_skipped such steps in a row end the run (ours)."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss that an update minimises."""

    objective: Objective = dataclasses.field(default="clip", metadata={"table": OBJECTIVES})
    """What is minimised, before the two coefficients:"""
    aggregate: Aggregate = dataclasses.field(default="token", metadata={"table": AGGREGATES})
    """How tokens become one number:"""
    clip_low: UnitInterval = 0.22
    """The ratio's lower bound is 1 - clip_low (paper: 0.22; release: 0.2); 1 is none, as in CISPO."""
    clip_high: NonNegativeNumber = 0.28
    """The ratio's upper bound is 1 + clip_high (paper: 0.28; release: 0.3). grpo sets it to
    clip_low."""
    dual_clip: Annotated[float, Bounds(above=1, why="or null")] | None = None
    """Bound of the loss of tokens with negative advantage, in multiples of it (release: 10); off by
    default (paper)."""
    sequence_clip_low: Decay = 3e-4
    """clip_low of the ratio of a sequence, which gspo clips (its authors': 3e-4)."""
    sequence_clip_high: NonNegativeNumber = 4e-4
    """clip_high of the ratio of a sequence, which gspo clips (its authors': 4e-4)."""
    top_entropy_share: Share = 1.0
    """Share of a batch's tokens that are trained, those of highest entropy while sampling (Beyond the 80/20
    Rule, 2506.01939: 0.2). At 1 all (paper)."""
    covariance_share: Decay = 0.0
    """Share of a batch's tokens that are not trained, those of highest covariance of log-probability and
    advantage, against a fall of the entropy (Clip-Cov, 2505.22617: 2e-4). At 0 none (paper)."""
    mismatch: Mismatch = "none"
    """Weight of a token by the ratio of the learner's to the sampler's probability before the update, for
    which the batch runs through the model once more: `none`, 1 (paper); `truncate`, the ratio, at most
    mismatch_high (TIS); `mask`, the ratio, and 0 outside the two bounds (IcePop, 2510.18855)."""
    mismatch_low: Decay = 0.5
    """Least ratio that mask lets pass (IcePop: 0.5)."""
    mismatch_high: Annotated[float, Bounds(least=1)] = 2.0
    """Largest weight of truncate, and largest ratio that mask lets pass (TIS: 2; IcePop: 5)."""
    kl_coefficient: NonNegativeNumber = 0.0
    """Weight of KL(policy, starting model), k3 estimate. At 0 (paper) no reference model is held."""
    entropy_coefficient: NonNegativeNumber = 0.0
    """Weight of the policy's mean entropy, nats, as a bonus. At 0 (paper) it is not computed. With
    loss.entropy_target it is where the weight begins."""
    entropy_target: PositiveNumber | None = None
    """Adapt that weight so that the mean entropy of the trained tokens nears this, nats (Skywork-OR1,
    arXiv 2505.22312: 0.2): after each step it grows by loss.entropy_step where the entropy was below, and
    shrinks by it where it was above, down to 0. Off by default (paper)."""
    entropy_step: PositiveNumber = 1e-4
    """Change of the weight after a step (Skywork-OR1: 1e-4)."""
    entropy_limit: PositiveNumber = 5e-3
    """Largest weight that it grows to (Skywork-OR1: 5e-3)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Updates of the parameters: batches, AdamW, and bounds of memory."""

    batch_states: Size = 64
    """Accepted states per step, each with M rollouts; what is left over is carried to the next step
    (ours)."""
    minibatches: Count = 2
    """Optimizer steps per pass over the batch. With 1 (and 1 epoch) the ratio is 1 and clipping does
    nothing (ours: 2)."""
    epochs: Count = 1
    """Passes over the batch (release: 1)."""
    micro_tokens: Count = 8192
    """Tokens that run through the model at a time in each of the mesh's data x fsdp parts, padding included;
    bounds memory, does not change the gradient. One whole rollout there always is."""
    logit_chunk: Count = 1024
    """Tokens whose logits exist at a time in each of the mesh's data x fsdp parts; bounds memory."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of holding it: less memory, a third more
    work."""
    learning_rate: PositiveNumber = 2e-6
    """AdamW's rate after warm-up (release: 2e-6)."""
    warmup_updates: NonNegativeInt = 10
    """Optimizer steps of linear warm-up (ours)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after warm-up: `constant` (ours), or `linear` or `cosine` decay to final_rate_share over the
    rest of the run's optimizer steps, which are steps x epochs x minibatches."""
    final_rate_share: UnitInterval = 0.0
    """Share of learning_rate that `linear` and `cosine` end at, in [0, 1]."""
    weight_decay: NonNegativeNumber = 0.01
    """AdamW's decay of matrices; norms and biases are not decayed (ours)."""
    max_grad_norm: PositiveNumber = 1.0
    """Gradients are scaled down to this global norm (release: 1)."""
    b1: Decay = 0.9
    """AdamW's decay of the first moment (release: 0.9)."""
    b2: Decay = 0.95
    """AdamW's decay of the second moment (ours)."""
    eps: PositiveNumber = 1e-8
    """AdamW's epsilon (its usual value)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that AdamW's two moments are held in between updates. `bfloat16` takes half their memory; they are
    computed in float32 and rounded up or down at random, so that small changes are right on average."""
    max_skipped: Count = 5
    """Updates in a row whose loss or gradient is not finite, after which the run ends with an error. Each is
    skipped: parameters, moments and rate stay as they were (ours)."""
