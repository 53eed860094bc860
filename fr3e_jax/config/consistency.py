"""What settings imply, and which of them cannot stand together."""

import dataclasses
from collections.abc import Callable

from fr3e_jax.algorithm.advantage import ADVANTAGES
from fr3e_jax.algorithm.keep import KEEP_RULES
from fr3e_jax.algorithm.positions import POSITION_RULES
from fr3e_jax.algorithm.rules import RuleError, name_of, needs_of
from fr3e_jax.algorithm.trajectories import NEEDS
from fr3e_jax.config.checks import check_options
from fr3e_jax.config.sections import Config
from fr3e_jax.config.stages import ExploreConfig
from fr3e_jax.config.values import ConfigError, with_functions


def resolve(config: Config) -> Config:
    """Write out what the algorithm implies: the baselines are settings of the same code."""
    if config.algorithm == "fr3e":
        return config
    explore = dataclasses.replace(config.explore, positions=0)
    # With the baseline that leaves each rollout out, without a deviation, they are RLOO.
    normalize = config.credit.baseline == "mean"
    credit = dataclasses.replace(config.credit, modulation="none", normalize_std=normalize)
    loss = config.loss
    if config.algorithm == "grpo":
        credit = dataclasses.replace(credit, reject="none")
        loss = dataclasses.replace(loss, clip_high=loss.clip_low)
    return dataclasses.replace(config, explore=explore, credit=credit, loss=loss)


def rows_of_state(config: Config) -> int:
    """Rows that a state has in an update: its rollouts, and with credit.estimator edge its segment."""
    return config.explore.rollouts + (config.credit.estimator == "edge")


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
    check_options(config)
    check_rollouts(config, context)
    check_credit(config)
    check_updates(config)
    check_alarms(config)
    if not config.reward.answer + config.reward.format > 0:
        raise ConfigError("reward.answer and reward.format are 0; one of them must be above 0")
    if config.evaluate.samples > 1 and not config.evaluate.temperature:
        raise ConfigError(
            f"evaluate.samples is {config.evaluate.samples}, and with evaluate.temperature 0 all answers to "
            "a problem are the same; set one of them to 1"
        )
    rows = {"evaluate.rows": config.evaluate.rows}
    if config.rollout.queries != "auto":
        rows = {"rollout.queries": config.rollout.queries, **rows}
    elif config.rollout.max_queries < row_parts:
        raise ConfigError(
            f"rollout.max_queries is {config.rollout.max_queries}, less than the mesh's data x fsdp = "
            f"{row_parts}, each of which needs a query; raise it, or use a larger mesh.tensor"
        )
    for name, value in rows.items():
        if value % row_parts:
            raise ConfigError(
                f"{name} is {value}, which does not divide by the mesh's data x fsdp = {row_parts}"
            )


def check_rollouts(config: Config, context: int) -> None:
    """Refuse lengths, positions and filters of rollouts that leave nothing to learn from.

    Args:
      config: resolved.
      context: the model's longest sequence, tokens.

    Raises:
      ConfigError: with one line that says what to change.
    """
    rollout, explore = config.rollout, config.explore
    if rollout.top_k == 1:
        raise ConfigError(
            "rollout.top_k is 1, which leaves one token to draw: all rollouts of a state would be the same; "
            "raise it, or use 0 to draw from all tokens"
        )
    if rollout.max_response == 1 and config.reward.cut != "judged":
        why = "do not count" if config.reward.cut == "masked" else "count as wrong"
        raise ConfigError(
            "rollout.max_response is 1, which leaves no room for an answer and its end token, and answers "
            f"that are cut {why}; raise it, or use --reward.cut judged"
        )
    if rollout.max_prompt + rollout.max_response > context:
        raise ConfigError(
            f"rollout.max_prompt {rollout.max_prompt} + rollout.max_response {rollout.max_response} is "
            f"more than the model's context of {context}; lower one of them"
        )
    if config.algorithm == "fr3e" and explore.positions == 0:
        raise ConfigError(
            "explore.positions is 0, which leaves fr3e nothing to return to; set it to 1 or more, or "
            "use --algorithm grpo++"
        )
    if rollout.wait_for < 1 and explore.positions and name_of(KEEP_RULES, explore.keep) == "hardest":
        raise ConfigError(
            "explore.keep hardest compares the queries of a round, which are not judged together with "
            f"rollout.wait_for {rollout.wait_for}; use --rollout.wait_for 1, or another explore.keep"
        )
    try:
        rule_needs(explore)
    except RuleError as error:
        raise ConfigError(f"explore.rule: {error}") from None
    most = most_positions(rollout.max_response, explore.min_gap)
    if explore.positions > most:
        apart = f" that are explore.min_gap {explore.min_gap} apart" if explore.min_gap > 1 else ""
        raise ConfigError(
            f"explore.positions is {explore.positions}, but responses of at most rollout.max_response "
            f"{rollout.max_response} tokens have room for {most} positions{apart}; lower it"
            + (" or explore.min_gap" if apart else "")
            + ", or raise rollout.max_response"
        )


def most_positions(response: int, min_gap: int) -> int:
    """The most positions that a response of so many tokens has; its first token is never one."""
    return 0 if response < 2 else 1 + (response - 2) // max(min_gap, 1)


def rule_needs(explore: ExploreConfig) -> tuple[str, ...]:
    """List what the position rule needs beyond what sampling records, of `NEEDS`.

    Raises:
      RuleError: there is no such rule, or it needs something else.
    """
    return needs_of(POSITION_RULES, with_functions(explore).rule, NEEDS)


def check_credit(config: Config) -> None:
    """Refuse estimators of credit that have nothing to work on, or that undo each other.

    Args:
      config: resolved.

    Raises:
      ConfigError: with one line that says what to change.
    """
    credit = config.credit
    if credit.estimator == "edge" and config.explore.positions == 0:
        raise ConfigError(
            f"credit.estimator edge cuts base trajectories at positions, and {config.algorithm} has none; "
            "use --credit.estimator value, or --algorithm fr3e"
        )
    if credit.estimator == "edge" and credit.normalize_std:
        raise ConfigError(
            "credit.normalize_std divides by the spread of a state's rollouts, which the segments of "
            "credit.estimator edge do not have; use only one of the two"
        )
    if credit.baseline == "leave_one_out" and credit.normalize_std:
        raise ConfigError(
            "credit.baseline leave_one_out makes the gradient unbiased, and credit.normalize_std makes it "
            "biased again; use only one of the two"
        )
    if credit.baseline == "leave_one_out" and name_of(ADVANTAGES, credit.advantage) != "group":
        raise ConfigError(
            f"credit.baseline leave_one_out is for credit.advantage group, not "
            f"{name_of(ADVANTAGES, credit.advantage)}, whose baseline is its own; use --credit.baseline mean"
        )


def check_updates(config: Config) -> None:
    """Refuse batches that do not divide, schedules without an update to decay over, and bonuses over a limit.

    Raises:
      ConfigError: with one line that says what to change.
    """
    optimizer, loss = config.optimizer, config.loss
    if loss.entropy_target is not None and loss.entropy_coefficient > loss.entropy_limit:
        raise ConfigError(
            f"loss.entropy_coefficient {loss.entropy_coefficient} is above loss.entropy_limit "
            f"{loss.entropy_limit}, which loss.entropy_target keeps it below; lower it, or raise the limit"
        )
    if optimizer.batch_states % optimizer.minibatches:
        raise ConfigError(
            f"optimizer.batch_states {optimizer.batch_states} does not divide by "
            f"optimizer.minibatches {optimizer.minibatches}"
        )
    if optimizer.schedule != "constant" and optimizer.warmup_updates >= updates_of(config):
        raise ConfigError(
            f"optimizer.warmup_updates {optimizer.warmup_updates} leaves optimizer.schedule "
            f"{optimizer.schedule} none of the run's {updates_of(config)} updates (steps x optimizer.epochs "
            "x optimizer.minibatches) to decay over; lower it, raise steps, or use --optimizer.schedule "
            "constant"
        )


def check_alarms(config: Config) -> None:
    """Refuse to end a run by an alarm that is off.

    Raises:
      ConfigError: with one line that says what to change.
    """
    for name in config.alarms.stop:
        if getattr(config.alarms, name) is None:
            raise ConfigError(
                f"alarms.stop names {name}, and alarms.{name} is null, so that it never goes off; set it, or "
                f"take {name} out of alarms.stop"
            )


def without_effect(config: Config) -> list[str]:
    """Settings that the user has set and that change nothing, as sentences.

    Args:
      config: as given, not resolved.
    """
    default = Config()
    sentences: list[str] = []

    def note(section: str, names: str, why: str) -> None:
        given, usual = getattr(config, section), getattr(default, section)
        changed = [name for name in names.split() if getattr(given, name) != getattr(usual, name)]
        sentences.extend(f"{section}.{name} has no effect: {why}" for name in changed)

    explores = config.algorithm == "fr3e"
    if not explores:
        why = f"{config.algorithm} restarts from no positions"
        note("explore", "positions rule min_gap keep adaptive temperature", why)
        note("rollout", "base_trajectories", why)
        note("credit", "modulation first_state sharpen state_weight", why)
    elif config.credit.estimator != "paper":
        why = f"credit.estimator {config.credit.estimator} has no modulation"
        note("credit", "modulation first_state sharpen", why)
    if config.explore.rule != "mutual_information" or not explores:
        note("explore", "pilots", "only explore.rule mutual_information samples pilots")
    if explores and config.credit.modulation == "none":
        note("credit", "first_state sharpen", "credit.modulation is none")
    if not explores and config.credit.baseline == "leave_one_out":
        note("credit", "normalize_std", f"{config.algorithm} with credit.baseline leave_one_out is RLOO")
    if not explores and config.credit.estimator == "value":
        note("credit", "estimator", f"{config.algorithm} has no modulation")
    if config.algorithm == "grpo":
        note("credit", "reject", "grpo rejects no states")
        note("loss", "clip_high", "grpo clips at loss.clip_low on both sides")
    if config.reward.format == 0:
        note("reward", "pattern", "reward.format is 0")
    if config.reward.cut != "shaped":
        note("reward", "cut_slope", f"reward.cut is {config.reward.cut}")
    if config.loss.entropy_target is None:
        note("loss", "entropy_step entropy_limit", "loss.entropy_target is null")
    if config.optimizer.schedule == "constant":
        note("optimizer", "final_rate_share", "optimizer.schedule is constant")
    if config.rollout.queries != "auto":
        note("rollout", "max_queries", "rollout.queries is a number")
    note_loss(config, note)
    return sentences


def note_loss(config: Config, note: Callable[[str, str, str], None]) -> None:
    """Note the options of the loss that change nothing.

    Args:
      config: as given.
      note: is given a section, names of options of it and why they have no effect.
    """
    loss, bounds = config.loss, "clip_low clip_high"
    if loss.objective in ("clip", "cispo", "gspo"):  # one of the user's own may read all of them
        sequence = "sequence_clip_low sequence_clip_high"
        used, unused = (sequence, bounds) if loss.objective == "gspo" else (bounds, sequence)
        note(
            "loss", unused, f"loss.objective {loss.objective} clips at loss.{used.replace(' ', ' and loss.')}"
        )
        if loss.objective == "cispo":
            note("loss", "dual_clip", "loss.objective cispo has no bound of the loss")
        if updates_of(config) == config.steps:
            why = "with one update a step the ratio is 1"
            note("loss", used if loss.objective == "cispo" else f"{used} dual_clip", why)
    if loss.mismatch == "none":
        note("loss", "mismatch_low mismatch_high", "loss.mismatch is none")
    elif loss.mismatch == "truncate":
        note("loss", "mismatch_low", "loss.mismatch truncate has an upper bound alone")
