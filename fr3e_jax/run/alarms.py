"""Alarms: signs in the metrics of a run that it goes wrong, and what to try.

Each alarm is a function of the lines of metrics.jsonl up to a step, of its threshold and of the number of
steps that are looked at together. It gives None, or what its sentence needs. It knows nothing else, and looks
at no seconds, so that a run that was killed has the same alarms when it goes on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fr3e_jax.config import AlarmsConfig

AlarmFacts = dict[str, Any]
"""What a sentence needs: name in its braces -> value."""

MetricLines = Sequence[Mapping[str, Any]]
"""Metrics up to a step, in the order of steps, as metrics.jsonl has them."""

LOW_ENTROPY = 0.1  # nats a token; above it the rollouts of a state differ, however far it has fallen
EVALUATIONS = 3  # whose mean accuracy is compared
NOISE = 4  # standard errors that a change must have
# Metrics of each source, where there are several.
ASKED_OF, ACCEPTED_OF = "sources/asked/", "sources/accepted/"
CLIPPED = 1.0  # gradient norm below which the usual optimizer.max_grad_norm changes nothing


def values_of(lines: MetricLines, name: str) -> list[float]:
    """The values of a metric, in the order of steps, of the lines that have it."""
    return [line[name] for line in lines if name in line]


def having(lines: MetricLines, *names: str) -> MetricLines:
    """The lines that have all of these metrics: a step that samples nothing has none of sampling."""
    return [line for line in lines if all(name in line for name in names)]


def first_and_last(lines: MetricLines, name: str, window: int) -> tuple[list[float], list[float]] | None:
    """The first and the last `window` values of a metric; None while they are not apart."""
    values = values_of(lines, name)
    return None if len(values) < 2 * window else (values[:window], values[-window:])


def entropy_collapse(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find an entropy that has fallen much further than the share of wrong answers."""
    entropies = first_and_last(lines, "entropy/mean", window)
    rewards = first_and_last(lines, "reward/base_mean", window)
    if entropies is None or rewards is None:
        return None
    before, now = map(float, map(np.median, entropies))
    wrong_before, wrong = (1 - float(np.mean(values)) for values in rewards)
    if now >= LOW_ENTROPY or before <= 0 or wrong_before <= 0:
        return None
    if now / before >= threshold * min(wrong / wrong_before, 1):
        return None
    return {"before": before, "now": now, "reward": 1 - wrong}


def wasted_sampling(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find steps most of whose states have answers that are all right, or all wrong."""
    names = [f"states/{what}" for what in ("accepted", "rejected", "all_right", "all_wrong")]
    last = having(lines, *names, "tokens/generated")[-window:]
    if len(last) < window:
        return None
    accepted, rejected, right, wrong = (np.array(values_of(last, name)) for name in names)
    states = accepted + rejected
    # With partial rewards a state without a right answer may teach something; then it is not rejected.
    wasted = np.where(rejected > 0, rejected, right + wrong) / np.maximum(states, 1)
    if np.median(wasted) <= threshold:
        return None
    tokens = np.array(values_of(last, "tokens/generated"))
    return {
        "wasted": float(np.median(wasted)),
        "right": right.sum() / max(states.sum(), 1),
        "wrong": wrong.sum() / max(states.sum(), 1),
        "tokens": int((wasted * tokens).sum()),
        "all_tokens": int(tokens.sum()),
        "advice": "questions are too easy: take harder ones, or set data.retire_above"
        if right.sum() > wrong.sum()
        else "questions are too hard: take easier ones, a stronger model, or data.sample_by difficulty, and "
        "read in rollouts/ whether right answers are scored as such",
    }


def drifted_advantages(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find advantages whose mean is away from 0."""
    last = having(lines, "advantage/accepted_mean", "advantage/accepted_std")[-window:]
    if len(last) < window:
        return None
    means = np.array(values_of(last, "advantage/accepted_mean"))
    mean, deviation = float(means.mean()), float(np.mean(values_of(last, "advantage/accepted_std")))
    error = float(means.std(ddof=1)) / window**0.5
    if abs(mean) <= threshold * deviation or abs(mean) <= NOISE * error:
        return None
    return {"mean": mean, "deviation": deviation}


def shrunken_advantages(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find advantages whose spread has shrunk since the first steps."""
    ends = first_and_last(lines, "advantage/accepted_std", window)
    if ends is None:
        return None
    before, now = map(float, map(np.median, ends))
    return {"before": before, "now": now} if now < threshold * before else None


def cut_answers(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find answers of which many are cut off by the length limit."""
    lines = having(lines, "response/cut", "response/length")
    cut, lengths = values_of(lines, "response/cut"), values_of(lines, "response/length")
    if len(cut) < window or np.mean(cut[-window:]) <= threshold:
        return None
    before, now = (float(np.mean(part)) for part in (lengths[:window], lengths[-window:]))
    grown = now > 1.2 * before
    return {
        "cut": float(np.mean(cut[-window:])),
        "cut_before": float(np.mean(cut[:window])),
        "before": before,
        "now": now,
        "advice": "answers grow longer: raise rollout.max_response if they grow better too, and try "
        "reward.cut shaped otherwise"
        if grown
        else "raise rollout.max_response; or, if the model never ends its answers, use another data.template "
        "or name in rollout.stop what ends them",
    }


def sampler_apart(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find probabilities that differ between sampling and update."""
    ends = first_and_last(lines, "mismatch/outside", window)
    if ends is not None:
        before, now = map(float, map(np.median, ends))
        if now - before > threshold:
            what = f"the share of tokens outside [0.9, 1.1] has grown from {before:.1%} to {now:.1%}"
            return {"what": what}
    ratios = values_of(lines, "update/abs_log_ratio")[-window:]
    if len(ratios) < window or np.median(ratios) <= threshold:
        return None
    return {"what": f"the mean absolute log-ratio of a token is {np.median(ratios):.3g} nats"}


def update_spikes(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find two updates within the window whose gradient or loss is far above those before, or not finite."""
    spikes: list[str] = []
    steps = having(lines, "update/skipped")
    for n in range(max(len(steps) - window, 0), len(steps)):
        line, before = steps[n], having(steps[:n], "update/loss", "update/grad_norm")[-window:]
        if line["update/skipped"]:
            spikes.append(f"step {line['step']}: {line['update/skipped']} updates not finite")
            continue
        if len(before) < window or not having([line], "update/loss", "update/grad_norm"):
            continue
        usual = float(np.median(values_of(before, "update/grad_norm")))
        if line["update/grad_norm"] > max(threshold * usual, CLIPPED):
            spikes.append(f"step {line['step']}: gradient norm {line['update/grad_norm']:.3g} ({usual:.3g})")
            continue
        # A loss is a difference that is near 0 in most steps; it is large when it passes the advantages.
        large = max(values_of(steps[: n + 1], "advantage/accepted_std")[-window:], default=1.0)
        usual = float(np.median(np.abs(values_of(before, "update/loss"))))
        if abs(line["update/loss"]) > max(threshold * usual, large):
            spikes.append(f"step {line['step']}: loss {line['update/loss']:.3g} ({usual:.3g})")
    return {"spikes": "; ".join(spikes[-2:])} if len(spikes) >= 2 else None


def scorer_timeouts(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find answers on which the scorer runs out of time."""
    last = having(lines, "reward/timed_out", "states/accepted", "states/rejected")[-window:]
    late = sum(values_of(last, "reward/timed_out"))
    states = sum(values_of(last, "states/accepted") + values_of(last, "states/rejected"))
    if len(last) < window or late <= threshold * states:
        return None
    return {"late": late, "states": states}


def dominating_source(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find a source that nearly all accepted states are of, though others are asked too."""
    last = [line for line in lines if any(name.startswith(ASKED_OF) for name in line)][-window:]
    if len(last) < window:
        return None
    names = sorted(
        {name.removeprefix(ASKED_OF) for line in last for name in line if name.startswith(ASKED_OF)}
    )
    asked, accepted = (
        {name: sum(values_of(last, prefix + name)) for name in names} for prefix in (ASKED_OF, ACCEPTED_OF)
    )
    name = max(names, key=accepted.__getitem__)
    others_asked, others = (1 - counts[name] / max(sum(counts.values()), 1) for counts in (asked, accepted))
    if 1 - others <= threshold or others_asked <= 2 * others:
        return None
    return {"name": name, "accepted": 1 - others, "asked": 1 - others_asked}


def gamed_scorer(lines: MetricLines, threshold: float, window: int) -> AlarmFacts | None:
    """Find a held-out accuracy that has fallen since its best, while the reward rose."""
    evaluated = [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
    if len(evaluated) < 2 * EVALUATIONS:
        return None
    steps, accuracies = (np.array(column) for column in zip(*evaluated, strict=True))
    means = np.convolve(accuracies, np.full(EVALUATIONS, 1 / EVALUATIONS), "valid")
    best = int(np.argmax(means[:-EVALUATIONS]))
    # A steady rise or fall is no noise: it is not in second differences, whose median is sqrt(6) x 0.6745
    # deviations of an evaluation.
    noise = float(np.median(np.abs(np.diff(accuracies, 2)))) / 1.652 * (2 / EVALUATIONS) ** 0.5
    if means[best] - means[-1] <= max(threshold, NOISE * noise):
        return None

    def rewards(first: int, last: int) -> list[float]:
        return values_of([line for line in lines if first <= line["step"] <= last], "reward/base_mean")

    parts = (
        rewards(steps[best], steps[best + EVALUATIONS - 1]),
        rewards(steps[-EVALUATIONS], steps[-1]),
    )
    if min(map(len, parts)) < 2:
        return None
    before, now = (float(np.mean(part)) for part in parts)
    error = sum(float(np.var(part, ddof=1)) / len(part) for part in parts) ** 0.5
    if now - before <= 2 * error:
        return None
    return {
        "best": float(means[best]),
        "accuracy": float(means[-1]),
        "reward_before": before,
        "reward": now,
        "first": int(steps[-EVALUATIONS]),
        "last": int(steps[-1]),
        "of": f"{steps[best]} to {steps[best + EVALUATIONS - 1]}",
    }


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What finds a sign that a run goes wrong, and says it.

    function: takes the metrics up to a step, the threshold and the number of steps to look at; gives None, or
    what the sentence needs. sentence: what it means and what to try; in braces is what the function gives.
    """

    function: Callable[[MetricLines, float, int], AlarmFacts | None]
    sentence: str


ALARM_TABLE: dict[str, Alarm] = {
    "entropy": Alarm(
        entropy_collapse,
        "the entropy has collapsed from {before:.3g} to {now:.3g} nats a token at a reward of {reward:.2f}, "
        "so that little is left to explore; lower optimizer.learning_rate, raise loss.clip_high, or set "
        "loss.entropy_target or loss.covariance_share",
    ),
    "no_signal": Alarm(
        wasted_sampling,
        "{wasted:.0%} of the states of a step teach nothing (all right {right:.0%}, all wrong {wrong:.0%}); "
        "about {tokens:,} of the last {all_tokens:,} tokens were drawn for them; {advice}",
    ),
    "advantage_mean": Alarm(
        drifted_advantages,
        "the mean advantage is {mean:.3g}, away from 0, at a standard deviation of {deviation:.3g}, so that "
        "what is sampled is made likelier or unlikelier as a whole; look at credit.advantage and "
        "credit.baseline, whose baseline should be the mean of a state's rewards",
    ),
    "advantage_spread": Alarm(
        shrunken_advantages,
        "the standard deviation of the advantages has shrunk from {before:.3g} to {now:.3g}, so that the "
        "gradient fades; reject states without signal (credit.reject), take harder questions, or look for "
        "rewards that have come to be nearly equal",
    ),
    "cut": Alarm(
        cut_answers,
        "{cut:.0%} of the answers reach rollout.max_response without an end ({cut_before:.0%} at first; the "
        "mean length went from {before:.0f} to {now:.0f} tokens); {advice}",
    ),
    "mismatch": Alarm(
        sampler_apart,
        "the policy that is updated is not the one that was sampled from: {what}; lower "
        "optimizer.learning_rate, optimizer.epochs or optimizer.minibatches, or, with one update a step, use "
        "model.compute_dtype float32 or loss.mismatch truncate",
    ),
    "spike": Alarm(
        update_spikes,
        "updates are far from what is usual ({spikes}; in brackets the median before); lower "
        "optimizer.learning_rate or optimizer.max_grad_norm, set loss.dual_clip, and read what was "
        "trained on in rollouts/",
    ),
    "timeouts": Alarm(
        scorer_timeouts,
        "the scorer ran out of time on {late:,} answers to {states:,} states, and they count as wrong; raise "
        "scoring.time_limit or scoring.workers, or look for answers that are made to be slow to judge",
    ),
    "source": Alarm(
        dominating_source,
        "{accepted:.0%} of the states that are trained on are of the source {name}, and {asked:.0%} of the "
        "questions, so that the others teach next to nothing; see whether theirs are too easy or too hard, "
        "or change the weights in data.source",
    ),
    "held_out": Alarm(
        gamed_scorer,
        "the held-out accuracy fell from {best:.1%} (evaluations of steps {of}) to {accuracy:.1%} while the "
        "reward rose from {reward_before:.2f} to {reward:.2f}, so that answers may please the scorer and be "
        "wrong; read those with reward 1 of steps {first} to {last} in rollouts/, and go on from an "
        "earlier checkpoint with a stricter scorer, more questions or loss.kl_coefficient",
    ),
}
"""All alarms: name, which is that of its threshold in `AlarmsConfig`, -> what finds and says it."""


def alarms_on(config: AlarmsConfig, lines: MetricLines) -> dict[str, str]:
    """The alarms that are on behind the last of the lines: name -> its sentence."""
    sentences = {}
    for name, alarm in ALARM_TABLE.items():
        threshold = getattr(config, name)
        facts = None if threshold is None else alarm.function(lines, threshold, config.window)
        if facts is not None:
            sentences[name] = alarm.sentence.format(**facts)
    return sentences


def alarm_to_end(config: AlarmsConfig, lines: MetricLines) -> str:
    """Say which alarms of `alarms.stop` are on behind the last of the lines; empty where none is."""
    on = [name for name in alarms_on(config, lines) if name in config.stop]
    return f"the alarm {' and '.join(on)} (alarms.stop) went off" if on else ""


def alarm_news(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a step's line says of alarms: those that went off in it, and those that are over.

    Args:
      before, now: metrics of the step before and of the step.
    """
    was, is_on = before.get("alarms", {}), now.get("alarms", {})
    begun, over = [name for name in is_on if name not in was], [name for name in was if name not in is_on]
    said = [f"ALARM {', '.join(begun)}"] if begun else []
    return said + ([f"alarm over: {', '.join(over)}"] if over else [])
