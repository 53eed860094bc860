"""What every number in metrics.jsonl says: `python -m fr3e_jax.step.meanings` prints the table."""

from collections.abc import Iterator
from typing import NamedTuple

from fr3e_jax.step.metrics import METRICS

UPDATES, STEP, RUN, HELD_OUT = "updates that were taken", "the step", "the run so far", "held-out problems"
TRAINED = "trained tokens"


class Meaning(NamedTuple):
    """A metric for people.

    help: what the number is. unit: of it. over: what it is an average or a count of. watch: which values are
    a good or a bad sign.
    """

    help: str
    unit: str
    over: str
    watch: str = ""


OTHERS: dict[str, Meaning] = {
    "alarms": Meaning(
        "alarms that are on: name -> what it means and what to try, a sentence; left out without any",
        "text",
        "the last alarms.window steps",
    ),
    "step": Meaning("number of the step; 0 is the model before training", "count", RUN),
    "rounds": Meaning("rounds of queries that were sampled", "count", STEP),
    "queries/asked": Meaning("queries of all rounds, where rollout.queries is auto", "count", STEP),
    "queries/first_round": Meaning(
        "queries of the first round, where rollout.queries is auto", "count", STEP
    ),
    "queries/states_per_query": Meaning(
        "accepted states of a query, by which the next step asks, where rollout.queries is auto",
        "count",
        "the last steps, older ones with less weight",
    ),
    "reward/timed_out": Meaning(
        "answers on which the scorer ran out of time, which count as wrong",
        "count",
        STEP,
        "should be 0, or nearly",
    ),
    "reward/part/NAME": Meaning(
        "a named part of what a score() of one's own returns",
        "",
        "answers of the step that the first process judged",
    ),
    "questions/asked": Meaning(
        "different questions that were asked, where difficulty is remembered", "count", RUN
    ),
    "questions/retired": Meaning("questions that data.retire_above asks no more", "count", RUN),
    "questions/rate": Meaning("remembered success rate", "share", "questions that were asked"),
    "sources/asked/NAME": Meaning("queries of a source, where there are several sources", "count", STEP),
    "sources/accepted/NAME": Meaning("states of it that are trained on", "count", STEP),
    "states/missing": Meaning(
        "states that the batch lacks, where credit.short_batch is use",
        "count",
        STEP,
        "often: the problems are too easy or too hard, or credit.max_rounds is too low",
    ),
    "states/carried": Meaning("accepted states that wait for the next step", "count", STEP),
    "queries/unfinished": Meaning(
        "queries that go on in the next step, where rollout.wait_for is below 1", "count", STEP
    ),
    "rollouts/drawn": Meaning(
        "rollouts that were begun or went on, where rollout.wait_for is below 1", "count", STEP
    ),
    "rollouts/unfinished": Meaning(
        "rollouts that have begun and go on in the next step, where rollout.wait_for is below 1",
        "count",
        STEP,
    ),
    "rollouts/unfinished_share": Meaning(
        "share that goes on in the next step, where rollout.wait_for is below 1", "share", "rollouts/drawn"
    ),
    "tokens/staleness": Meaning(
        "steps between the one that drew a token and the one that trains on it",
        "steps",
        TRAINED,
        "much above 1: too many queries are begun for the batch, or rollout.wait_for is too low",
    ),
    "tokens/generated": Meaning("tokens that were drawn", "tokens", STEP),
    "tokens/prefilled": Meaning("query tokens that ran through the model", "tokens", STEP),
    "tokens/reused": Meaning(
        "prefix tokens read from a KV cache, where each branch alone would have prefilled them",
        "tokens",
        STEP,
    ),
    "tokens/trained": Meaning("tokens that carry loss, over all epochs", "tokens", STEP),
    "tokens/per_accepted": Meaning(
        "tokens that were drawn for each accepted state",
        "tokens",
        STEP,
        "a rise: few states carry a gradient",
    ),
    "tokens/total": Meaning("tokens that were drawn", "tokens", RUN),
    "rows/decoded": Meaning("batch rows that were decoded, one a token, idle ones too", "tokens", STEP),
    "rows/occupancy": Meaning(
        "share of these rows that drew a token",
        "share",
        STEP,
        "low: a few long answers hold up the others",
    ),
    "flops/first_return": Meaning("of the base trajectories, without padding", "FLOPs", STEP),
    "flops/positions": Meaning(
        "of the forward pass over kept trajectories, where explore.rule needs one", "FLOPs", STEP
    ),
    "flops/pilots": Meaning(
        "of the pilot rollouts of explore.rule mutual_information, without padding", "FLOPs", STEP
    ),
    "flops/explore": Meaning("of the partial rollouts, without padding", "FLOPs", STEP),
    "flops/update": Meaning("of the updates, without padding and recomputation", "FLOPs", STEP),
    "flops/mismatch": Meaning(
        "of the learner's forward pass before the update, where loss.mismatch is not none, without padding",
        "FLOPs",
        STEP,
    ),
    "flops/utilisation_STAGE": Meaning(
        "share of the devices' bfloat16 peak that the FLOPs of a stage are; on devices whose peak is known, "
        "and compilation counts as time",
        "share",
        STEP,
    ),
    "time/STAGE": Meaning(
        "of a stage: tokenize, first_return, verify, positions (where explore.rule measures something), "
        "pilots (of mutual_information), explore, record (what the step spends on keeping its rollouts), "
        "mismatch, update, and step for all",
        "seconds",
        STEP,
    ),
    "time/share_verify": Meaning(
        "share of the step's time that waited for verdicts, beyond what was judged beside sampling",
        "share",
        STEP,
        "much: raise scoring.workers, or lower scoring.time_limit",
    ),
    "time/share_idle": Meaning(
        "share of the step's time in no stage of the devices, which waited for the host",
        "share",
        STEP,
        "much above time/share_verify: tokenizing, copies, or what else the host does",
    ),
    "memory/host": Meaning(
        "memory that the first process holds at the end of the step", "GiB", "the process", "should not grow"
    ),
    "memory/device": Meaning(
        "most memory that a device of the first process has held, where the device tells",
        "GiB",
        RUN,
        "near what the device has: lower optimizer.micro_tokens or rollout.queries",
    ),
    "time/evaluate": Meaning("of the evaluation after the step", "seconds", STEP),
    "update/loss": Meaning("the loss", "", UPDATES),
    "update/skipped": Meaning(
        "updates without effect, since their loss or gradient was not finite",
        "count",
        STEP,
        "should be 0; optimizer.max_skipped in a row end the run",
    ),
    "update/grad_norm": Meaning(
        "global norm of the gradient before it is clipped",
        "",
        UPDATES,
        "spikes come before a policy that falls apart",
    ),
    "update/learning_rate": Meaning("learning rate", "", UPDATES),
    "update/ratio_mean": Meaning(
        "probability of a trained token, now to when it was drawn", "ratio", TRAINED, "stays near 1"
    ),
    "update/ratio_max": Meaning("largest such ratio", "ratio", TRAINED),
    "update/ratio_min": Meaning("least such ratio", "ratio", TRAINED),
    "update/abs_log_ratio": Meaning(
        "absolute log of that ratio",
        "nats",
        TRAINED,
        "with one update a step: how far sampler and learner differ by rounding",
    ),
    "update/abs_log_ratio_max": Meaning("largest absolute log of that ratio", "nats", TRAINED),
    "update/clip_low": Meaning(
        "share whose ratio met the lower clip", "share", TRAINED, "much above 0.1: lower the learning rate"
    ),
    "update/clip_high": Meaning(
        "share whose ratio met the upper clip", "share", TRAINED, "much above 0.1: lower the learning rate"
    ),
    "update/clip_dual": Meaning("share that loss.dual_clip bounded", "share", TRAINED),
    "update/approx_kl": Meaning(
        "KL divergence from the policy that sampled to this one, the mean of -log ratio",
        "nats",
        TRAINED,
        "a rise over steps: updates are too large",
    ),
    "update/reference_kl": Meaning(
        "KL divergence from the reference policy (k3), where loss.kl_coefficient is above 0", "nats", TRAINED
    ),
    "update/entropy": Meaning(
        "entropy of the policy, where loss.entropy_coefficient is not 0 or adapted", "nats", TRAINED
    ),
    "update/entropy_coefficient": Meaning(
        "weight of the entropy, where loss.entropy_target adapts it",
        "",
        STEP,
        "stays at loss.entropy_limit: the limit is too low for the target",
    ),
    "update/left_out": Meaning(
        "share whose weight is 0, by loss.top_entropy_share, loss.covariance_share or loss.mismatch; other "
        "shares and means count these tokens too",
        "share",
        TRAINED,
    ),
    "mismatch/outside": Meaning(
        "share whose probability before the update, learner's to sampler's, is outside [0.9, 1.1]; where "
        "loss.mismatch is not none",
        "share",
        TRAINED,
        "well above 0 at temperature 1 without filters: rounding differs between sampler and learner",
    ),
    "mismatch/ratio_max": Meaning("largest such ratio", "ratio", TRAINED),
    "mismatch/bounded": Meaning(
        "share whose such ratio loss.mismatch truncated or masked",
        "share",
        TRAINED,
        "much above 0: what is trained is another policy's",
    ),
    "decisions/hit": Meaning(
        "share that decide the answer, where the task has `decisions(row, response)`",
        "share",
        "positions",
        "at decisions/chance: explore.rule finds no more of them than random positions would",
    ),
    "decisions/chance": Meaning("share that decide the answer", "share", "tokens of kept trajectories"),
    "decisions/found": Meaning(
        "share that a position is at", "share", "tokens of kept trajectories that decide the answer"
    ),
    "update/padding": Meaning("tokens computed for each that is there", "ratio", STEP),
    "eval/accuracy": Meaning(
        "answers that are right, greedy or at evaluate.temperature",
        "share",
        HELD_OUT,
        "what training is for; look at it, not at rewards",
    ),
    "eval/cut": Meaning("such answers that rollout.max_response cut off", "share", HELD_OUT),
    "eval/length": Meaning("length of such an answer", "tokens", HELD_OUT),
    "eval/problems": Meaning("problems that were judged", "count", HELD_OUT),
    "eval/samples": Meaning("answers to each, evaluate.samples", "count", HELD_OUT),
    "eval/accuracy_se": Meaning(
        "standard error of eval/accuracy, from the problems' means, since answers to one problem depend on "
        "each other; left out with one problem",
        "share",
        HELD_OUT,
        "the accuracy is known to about two of them; a larger data.held_out makes it smaller",
    ),
}
"""Metrics that are not in `METRICS`. STAGE stands for the name of a stage, NAME for one of the user's."""


def meanings() -> dict[str, Meaning]:
    """All of them, those of rounds first."""
    rounds = {name: Meaning(m.help, m.unit, m.over, m.watch) for name, m in METRICS.items()}
    return rounds | OTHERS


def meaning_of(name: str) -> Meaning | None:
    """What a name in metrics.jsonl says, or None where it is not known."""
    known = meanings()
    general = {
        "time/": "time/STAGE",
        "flops/utilisation_": "flops/utilisation_STAGE",
        "reward/part/": "reward/part/NAME",
        "sources/asked/": "sources/asked/NAME",
        "sources/accepted/": "sources/accepted/NAME",
    }
    for prefix, entry in general.items():
        if name.startswith(prefix) and name not in known:
            return known[entry]
    return known.get(name)


def page() -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield "| name | what it is | unit | over | look for |"
    yield "| --- | --- | --- | --- | --- |"
    for name, (text, unit, over, watch) in meanings().items():
        yield f"| `{name}` | {text} | {unit} | {over} | {watch} |"


if __name__ == "__main__":
    print("\n".join(page()))
