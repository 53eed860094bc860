"""Why sampling finds no states that carry a gradient: what was seen, and what to change for each cause."""

from collections.abc import Mapping, Sequence
from typing import Any

from fr3e_jax.config import Config

MUCH = 0.5  # share of answers or states from which a cause is told


def no_signal(config: Config, rounds: Sequence[Mapping[str, Any]], timed_out: int) -> str:
    """What the rounds of a step had in common that gave too few states, as sentences for the user.

    The causes that were seen come first, each with what helps against it. Where none stands out, the task is
    too hard or too easy.

    Args:
      config: of the run.
      rounds: their metrics, as `step.close_round` makes them.
      timed_out: answers on which the scorer ran out of time.
    """
    rounds = [one for one in rounds if "states/accepted" in one]  # in the others no query was complete

    def total(name: str) -> int:
        return sum(one[name] for one in rounds)

    states = max(total("states/accepted") + total("states/rejected"), 1)
    wrong, right, same = (
        total(f"states/{what}") / states for what in ("all_wrong", "all_right", "identical")
    )
    cut = sum(one["response/cut"] for one in rounds) / len(rounds)
    late = timed_out / (states * config.explore.rollouts)
    seen = [
        f"Of {states} states, the rollouts of {wrong:.1%} were all wrong and those of {right:.1%} all right."
    ]
    if cut >= MUCH:
        seen.append(
            f"{cut:.1%} of the answers reached rollout.max_response {config.rollout.max_response} without an "
            "end token: raise it; or, if the model never ends its answers, use another data.template or name "
            "in rollout.stop what ends them."
        )
    if same >= MUCH:
        seen.append(
            f"The rollouts of {same:.1%} of the states were the same, token by token: raise "
            f"rollout.temperature ({config.rollout.temperature}) or rollout.top_p ({config.rollout.top_p}), "
            f"or widen rollout.top_k ({config.rollout.top_k})."
        )
    if late >= 0.1:
        seen.append(
            f"The scorer ran out of time on {timed_out} answers, which count as wrong: raise "
            "scoring.time_limit or scoring.workers."
        )
    if len(seen) == 1 and wrong >= MUCH:
        seen.append(
            "No reward where there should be some: choose an easier task or a stronger model; or look at the "
            "answers, whether data.template asks for the form that the scorer reads."
        )
    if len(seen) == 1 and right >= MUCH:
        seen.append("Choose a harder task.")
    seen.append(
        "More sampling helps where some states are mixed: raise explore.rollouts, rollout.queries or "
        "credit.max_rounds, or lower optimizer.batch_states."
    )
    if config.credit.short_batch == "error":
        seen.append("With credit.short_batch use a step goes on with what there is.")
    return " ".join(seen)
