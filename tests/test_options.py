"""Values of options: what each takes by its type, and what cannot stand together."""

import dataclasses
import math
from typing import Literal, get_args, get_origin

import pytest
import yaml
from support import changed, differences, settings_of

from fr3e_jax.algorithm.rules import Rule
from fr3e_jax.cli import parse
from fr3e_jax.config import (
    Config,
    ConfigError,
    ExploreConfig,
    LossConfig,
    SFTConfig,
    SourceConfig,
    check_options,
    dump,
    tables_of,
)
from fr3e_jax.config.checks import check_value, without_limits
from fr3e_jax.config.values import Bounds, OptionError
from fr3e_jax.evaluate import EvaluationConfig
from fr3e_jax.export import ExportConfig
from fr3e_jax.generate import GenerateConfig
from fr3e_jax.plan import PlanConfig

NEEDED = {"model": "quickstart", "prompt": "2+3=", "run": "a", "out": "b", "name": "a"}
CLASSES = (Config, SFTConfig, EvaluationConfig, GenerateConfig, ExportConfig, PlanConfig, SourceConfig)


def parsed(*argv):
    return parse(Config, "train", "configs/quickstart.yaml", list(map(str, argv)))


def made(config_class):
    """A configuration of defaults, with something where there are none."""
    needed = [f.name for f in dataclasses.fields(config_class) if f.default is f.default_factory]
    return config_class(**{name: NEEDED[name] for name in needed})


def bounds_of(kind):
    """The bounds of a type, of `None | ...` too."""
    for part in (kind, *get_args(kind)):
        for limit in without_limits(part)[1]:
            if isinstance(limit, Bounds):
                return limit
    return None


def set_to(config_class, option, value):
    return changed(made(config_class), **{option.replace(".", "__"): value})


OF_TRAINING = {name for name, *_ in settings_of(Config)}
BOUNDED = [
    (config_class, name, bounds_of(kind), float in (without_limits(k)[0] for k in (kind, *get_args(kind))))
    for config_class in CLASSES
    for name, kind, *_ in settings_of(config_class)
    if bounds_of(kind) and not (config_class is PlanConfig and name in OF_TRAINING)
]


@pytest.mark.parametrize(
    ("config_class", "name", "bounds", "real"),
    BOUNDED,
    ids=lambda x: getattr(x, "__name__", None) or (x if isinstance(x, str) else ""),
)
def test_an_option_takes_what_lies_within_its_bounds_and_nothing_else(config_class, name, bounds, real):
    """Both sides of each limit; the message names the option and the value."""
    step = 1e-6 if real else 1
    refused: list[float] = [
        bounds.least - step,
        bounds.most + step,
        bounds.above,
        bounds.below,
        math.nan,
        math.inf,
    ]
    taken = [bounds.least, bounds.most, bounds.above + step, bounds.below - step]
    if bounds.besides is not None:
        refused = [value for value in refused if value != bounds.besides]
        taken.append(bounds.besides)
    for value in refused:
        if math.isfinite(value) and not real:
            value = int(value)
        if value == -math.inf:
            continue
        with pytest.raises(OptionError) as refusal:
            check_options(set_to(config_class, name, value))
        assert str(refusal.value).startswith(f"{name} is {value!r}, must be ")
    for value in filter(math.isfinite, taken):
        check_options(set_to(config_class, name, value if real else int(value)))


REFUSED = {
    Config: {
        "steps": [0, -1],
        "seed": [-1, 2**32, 2**63],
        "rollout.queries": [0],
        "rollout.base_trajectories": [0],
        "rollout.max_prompt": [0],
        "rollout.max_response": [0],
        "rollout.temperature": [0.0, -1.0, math.nan],
        "rollout.top_k": [-1],
        "rollout.top_p": [0.0, 1.1, math.nan],
        "explore.positions": [-1],
        "explore.rollouts": [1, 0],
        "explore.min_gap": [-1],
        "explore.temperature": [0.0, -1.0, math.nan],
        "explore.pilots": [0],
        "explore.rule": ["entropie"],
        "credit.max_rounds": [0],
        "credit.reject": ["all"],
        "reward.answer": [-1.0, math.inf, math.nan],
        "reward.format": [-1.0, math.inf],
        "reward.pattern": ["("],
        "scoring.workers": [-1],
        "scoring.time_limit": [0.0, math.nan],
        "scoring.memory_gb": [0.5, math.nan],
        "loss.clip_low": [-0.1, 1.1],
        "loss.clip_high": [-0.1],
        "loss.dual_clip": [1.0],
        "loss.kl_coefficient": [-0.1, math.nan],
        "loss.entropy_coefficient": [-0.1, math.nan],
        "loss.objective": ["ppo"],
        "loss.aggregate": ["mean"],
        "loss.top_entropy_share": [0.0, 1.1, math.nan],
        "loss.covariance_share": [-0.1, 1.0, math.nan],
        "loss.mismatch": ["yes"],
        "loss.mismatch_low": [-0.1, 1.0],
        "loss.mismatch_high": [0.9, math.inf],
        "loss.sequence_clip_low": [-0.1, 1.0],
        "loss.sequence_clip_high": [-0.1],
        "optimizer.batch_states": [0],
        "optimizer.minibatches": [0],
        "optimizer.epochs": [0],
        "optimizer.micro_tokens": [0],
        "optimizer.logit_chunk": [0],
        "optimizer.warmup_updates": [-1],
        "optimizer.max_skipped": [0],
        "optimizer.learning_rate": [0.0, math.nan],
        "optimizer.max_grad_norm": [0.0],
        "optimizer.eps": [0.0, -1.0],
        "optimizer.b1": [-0.1, 1.0, 1.5],
        "optimizer.b2": [-0.1, 1.0],
        "optimizer.weight_decay": [-1.0],
        "optimizer.final_rate_share": [-0.1, 1.1, math.nan],
        "evaluate.every": [-1],
        "evaluate.rows": [0],
        "checkpoint.every": [0],
        "checkpoint.keep": [0],
        "checkpoint.keep_every": [-1],
        "distributed.timeout": [0],
        "data.held_out": [0],
    },
    SFTConfig: {
        "steps": [0],
        "batch": [0],
        "learning_rate": [0, math.nan],
        "max_grad_norm": [0, -1.0],
        "hidden_size": [0],
        "intermediate_size": [0],
        "num_hidden_layers": [0],
        "num_attention_heads": [0],
        "num_key_value_heads": [0],
        "max_position_embeddings": [0],
        "seed": [-1, 2**32],
        "warmup_steps": [-1],
        "dropped_carry": [-0.1, 1.1],
    },
    EvaluationConfig: {
        "samples": [-1, 2**12 + 1],
        "max_response": [-1],
        "limit": [-1],
        "rows": [0],
        "seed": [-1, 2**32],
        "temperature": [-0.5, -2.0, math.nan],
        "top_k": [-1],
        "top_p": [0.0, 1.1],
        "scoring.workers": [-1],
        "scoring.time_limit": [0.0],
        "scoring.memory_gb": [0.5],
        "distributed.timeout": [0],
    },
    GenerateConfig: {
        "max_new_tokens": [0],
        "n": [0],
        "temperature": [-0.1, math.nan],
        "seed": [-1, 2**32],
        "tensor": [-1],
        "top_k": [-1],
        "top_p": [0.0, 1.1],
    },
    ExportConfig: {"max_file_gb": [0.0, -1.0, math.nan]},
    PlanConfig: {
        **{
            f"assume.{name}": [0.0, 1.1, math.nan]
            for name in ("response", "prompt", "accepted", "compute", "memory", "network")
        },
        "assume.kept": [0.5],
        "assume.latency": [-1.0],
    },
    SourceConfig: {"weight": [0.0, -1.0, math.inf, math.nan]},
}
"""Values that had a comparison of their own each, before types knew their limits."""


@pytest.mark.parametrize(
    ("config_class", "name"),
    [(config_class, name) for config_class, options in REFUSED.items() for name in options],
)
def test_what_no_comparison_refuses_any_more_the_type_does(config_class, name):
    for value in REFUSED[config_class][name]:
        with pytest.raises(ConfigError, match=name):
            check_options(set_to(config_class, name, value))


@pytest.mark.parametrize("config_class", CLASSES)
def test_defaults_are_values_of_their_types(config_class):
    check_options(made(config_class))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ExploreConfig(positions=2.5), "positions is 2.5, must be a whole number"),
        (ExploreConfig(positions="4"), "positions is '4', must be a whole number"),
        (ExploreConfig(positions=True), "positions is true, must be a whole number"),
        (LossConfig(dual_clip="off"), "dual_clip is 'off', must be a number or null"),
        (LossConfig(clip_low=None), "clip_low is null, must be a number"),
        (changed(Config(), optimizer__remat=1), "optimizer.remat is 1, must be true or false"),
        (changed(Config(), algorithm="ppo"), "algorithm is 'ppo', must be one of fr3e, grpo, grpo[+][+]"),
        (changed(Config(), rollout__stop="x"), "rollout.stop is 'x', must be a list"),
        (changed(Config(), rollout__stop=[1]), r"rollout.stop\[0\] is 1, must be text"),
        (changed(Config(), data__source=3), "data.source is 3, must be text or a list of mappings"),
        (
            changed(Config(), data__source=[SourceConfig("a"), SourceConfig("b", weight=0)]),
            r"data.source\[1\].weight is 0, must be above 0",
        ),
        (changed(Config(), explore=None), "explore is null, must be a mapping"),
        (changed(Config(), run_dir=""), "run_dir is '', must not be empty"),
        (changed(Config(), model__path=" "), "model.path is ' ', must not be empty"),
    ],
)
def test_what_is_made_in_python_is_checked_as_files_and_flags_are(section, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_options(section)


def test_numbers_of_numpy_and_functions_as_rules_are_taken():
    import numpy as np

    check_options(ExploreConfig(positions=np.int64(3), rule=lambda base: base.entropy))
    check_options(LossConfig(clip_low=np.float32(0.1)))


def test_values_stay_plain_numbers_and_texts():
    """Of which YAML and JSON know how to write them."""
    config, _ = parsed("--explore.positions=2", "--run_dir=there")
    assert type(config.explore.positions) is int and type(config.run_dir) is str
    assert yaml.safe_load(dump(config))["explore"]["positions"] == 2


@pytest.mark.parametrize(
    "flag", ["--run_dir=", "--model.path=", "--data.source=", "--compilation_cache=", "--data.template="]
)
def test_an_empty_name_is_refused(flag, capsys):
    """It would be the directory that a command is started in."""
    with pytest.raises(SystemExit, match=r"^2$"):
        parsed(flag)
    assert f"{flag.strip('-=')} is '', must not be empty" in capsys.readouterr().err


# --- what is written


def another(kind, value):
    """A valid value of the type, other than `value`."""
    if get_origin(kind) is list:
        choices = get_args(get_args(kind)[0])
        return [*value, *(choices or ("'x' # [y]\n",))]
    kind_of_one = next((part for part in get_args(kind) if part is not type(None)), kind)
    base = without_limits(kind)[0] if without_limits(kind)[1] else without_limits(kind_of_one)[0]
    base = kind if get_origin(kind) is Literal else base
    candidates = {
        bool: [True, False],
        int: [7, 1],
        float: [1.0 / 3, 2.0 / 3, 1.1 + 1e-9],
        str: [f"{value}: 'x' # [y]"],
    }.get(base, get_args(kind))
    for candidate in candidates:
        try:
            check_value(kind, candidate, ("it",))
        except ConfigError:
            continue
        if candidate != value:
            return candidate
    raise AssertionError(f"nothing else for {kind}")


def test_what_is_dumped_is_read_back(tmp_path, monkeypatch):
    """With every setting changed, floats to the last bit."""
    config = Config()
    for name, kind, owner, key in settings_of(Config):
        section = name.rpartition(".")[0]
        value = getattr(getattr(config, section) if section else config, key)
        other = another(kind, value)
        if table := tables_of(owner).get(key):
            monkeypatch.setitem(table, other, Rule(print, "another"))
        config = changed(config, **{name.replace(".", "__"): other})
    assert set(differences(config, Config())) == {name for name, *_ in settings_of(Config)}
    file = tmp_path / "dumped.yaml"
    file.write_text(dump(config))
    again, name = parsed("--config", file)
    assert again == config
    assert name == "dumped"
    assert dump(again) == dump(config)
