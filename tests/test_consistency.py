"""What settings imply, what cannot stand together, and what has no effect."""

import pytest
from support import changed, differences

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, check, dump, resolve, without_effect


def test_fr3e_is_what_the_settings_say():
    config = changed(Config(), credit__modulation="none", loss__clip_high=0.5)
    assert resolve(config) == config


def test_the_baselines_are_settings():
    grpo = resolve(changed(Config(), algorithm="grpo", loss__clip_low=0.1))
    plus = resolve(changed(Config(), algorithm="grpo++", loss__clip_low=0.1))
    both = {
        "explore.positions": 0,
        "credit.modulation": "none",
        "credit.normalize_std": True,
        "loss.clip_low": 0.1,
    }
    assert differences(plus, Config()) == {"algorithm": "grpo++", **both}
    # grpo has neither rejection sampling nor clip-higher.
    expected = {"algorithm": "grpo", "credit.reject": "none", "loss.clip_high": 0.1, **both}
    assert differences(grpo, Config()) == expected
    for config in (grpo, plus):
        assert resolve(config) == config


def test_the_baselines_without_a_rollouts_own_reward_in_its_baseline_are_rloo():
    """Which does not divide by the standard deviation."""
    config = changed(
        Config(), algorithm="grpo++", credit__baseline="leave_one_out", credit__normalize_std=True
    )
    assert not resolve(config).credit.normalize_std
    assert without_effect(config) == [
        "credit.normalize_std has no effect: grpo++ with credit.baseline leave_one_out is RLOO"
    ]
    check(resolve(changed(RUNNABLE, algorithm="grpo", credit__baseline="leave_one_out")), 8, 48)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, []),
        ({"algorithm": "grpo", "explore__rule": "random"}, ["explore.rule"]),
        ({"algorithm": "grpo", "explore__adaptive": True}, ["explore.adaptive"]),
        ({"algorithm": "grpo", "explore__temperature": 2.0}, ["explore.temperature"]),
        ({"explore__pilots": 8}, ["explore.pilots"]),
        ({"explore__pilots": 8, "explore__rule": "mutual_information"}, []),
        ({"algorithm": "grpo++", "credit__sharpen": True, "explore__rollouts": 8}, ["credit.sharpen"]),
        ({"algorithm": "grpo", "loss__clip_high": 0.5, "loss__clip_low": 0.1}, ["loss.clip_high"]),
        ({"credit__sharpen": True, "explore__rule": "random"}, []),
        ({"credit__sharpen": True, "credit__modulation": "none"}, ["credit.sharpen"]),
        ({"optimizer__final_rate_share": 0.1}, ["optimizer.final_rate_share"]),
        ({"optimizer__final_rate_share": 0.1, "optimizer__schedule": "cosine"}, []),
        ({"credit__estimator": "edge", "credit__modulation": "none"}, ["credit.modulation"]),
        ({"credit__estimator": "value", "credit__sharpen": True}, ["credit.sharpen"]),
        ({"credit__estimator": "value", "credit__state_weight": "trajectory"}, []),
        ({"algorithm": "grpo++", "credit__state_weight": "trajectory"}, ["credit.state_weight"]),
        ({"algorithm": "grpo++", "credit__estimator": "value"}, ["credit.estimator"]),
        ({"reward__pattern": "x"}, ["reward.pattern"]),
        ({"reward__pattern": "x", "reward__format": 0.1}, []),
        ({"optimizer__minibatches": 1, "loss__clip_low": 0.1}, ["loss.clip_low"]),
    ],
)
def test_settings_that_change_nothing_are_told(settings, named):
    told = without_effect(changed(Config(), **settings))
    assert [line.split(" has no effect: ")[0] for line in told] == named


@pytest.mark.parametrize("algorithm", ["fr3e", "grpo", "grpo++"])
def test_a_resolved_configuration_can_be_run_again(tmp_path, algorithm):
    config = resolve(changed(Config(), algorithm=algorithm))
    (tmp_path / "run.yaml").write_text(dump(config))
    again, _ = parse(Config, "train", "configs/quickstart.yaml", ["--config", str(tmp_path / "run.yaml")])
    assert resolve(again) == config


# --- what cannot stand together

RUNNABLE = changed(
    Config(), rollout__max_prompt=8, rollout__max_response=40, optimizer__batch_states=16
)  # 2 minibatches of 8 states x 16 rollouts = 128 rows, in micro-batches of 64


def test_what_can_run_is_not_refused():
    check(RUNNABLE, 8, 48)
    for algorithm in ("grpo", "grpo++"):
        check(resolve(changed(RUNNABLE, algorithm=algorithm)), 8, 48)
    check(changed(RUNNABLE, steps=5), 8, 48)  # all warm-up
    check(changed(RUNNABLE, steps=5, optimizer__schedule="cosine", optimizer__epochs=2), 8, 48)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"explore__positions": 0}, ["explore.positions", "grpo++"]),
        (
            {"explore__positions": 1_000_000},
            ["explore.positions is 1000000", "39 positions;", "max_response"],
        ),
        ({"explore__positions": 40}, ["explore.positions is 40", "39 positions;"]),
        ({"explore__positions": 3, "explore__min_gap": 20}, ["20 apart", "2 positions", "explore.min_gap"]),
        ({"rollout__max_prompt": 9}, ["rollout.max_prompt 9", "rollout.max_response 40", "48"]),
        ({"rollout__queries": 12}, ["rollout.queries", "12", "8"]),
        ({"evaluate__rows": 12}, ["evaluate.rows", "12", "8"]),
        ({"evaluate__samples": 4}, ["evaluate.samples is 4", "evaluate.temperature 0"]),
        ({"optimizer__minibatches": 3}, ["optimizer.batch_states 16", "optimizer.minibatches 3"]),
        # 5 steps x 2 minibatches are all warm-up.
        (
            {"optimizer__schedule": "cosine", "steps": 5},
            ["optimizer.warmup_updates 10", "cosine", "10 updates"],
        ),
        (
            {"optimizer__schedule": "linear", "optimizer__warmup_updates": 200},
            ["200", "linear", "200 updates"],
        ),
        ({"rollout__top_k": 1}, ["rollout.top_k", "one token"]),
        ({"rollout__max_response": 1}, ["rollout.max_response", "reward.cut"]),
        ({"reward__answer": 0.0}, ["reward.answer", "reward.format", "one of them must be above 0"]),
        ({"explore__rollouts": 100_000}, ["explore.rollouts is 100000", "at most 4,096"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"algorithm": "grpo", "credit__estimator": "edge"}, ["credit.estimator edge", "grpo has none"]),
        ({"credit__estimator": "edge", "credit__normalize_std": True}, ["normalize_std", "only one"]),
        ({"credit__baseline": "leave_one_out", "credit__normalize_std": True}, ["leave_one_out", "only one"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(settings, named):
    with pytest.raises(ConfigError) as refusal:
        check(resolve(changed(RUNNABLE, **settings)), 8, 48)
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(("length", "gap"), [(2, 0), (9, 0), (9, 1), (9, 2), (9, 3), (9, 8), (9, 20)])
def test_as_many_positions_are_taken_as_a_longest_response_has_room_for(length, gap):
    """Counted by choosing them one after the other, from the second token on."""
    room = len(range(1, length, max(gap, 1)))
    fits = changed(RUNNABLE, rollout__max_response=length, explore__min_gap=gap, explore__positions=room)
    check(fits, 8, 48)
    with pytest.raises(ConfigError, match=rf"room for {room} positions"):
        check(changed(fits, explore__positions=room + 1), 8, 48)


def test_the_defaults_take_more_than_one_optimizer_step_per_batch():
    """With one, the ratio is 1 and clipping does nothing."""
    assert Config().optimizer.minibatches * Config().optimizer.epochs > 1
