"""Parsing, refusals and help: a user's mistake is one line, and every setting explains itself."""

import ast
import dataclasses
import inspect
import typing

import pytest
import yaml
from environment import REPOSITORY

from fr3e_jax import config as config_module
from fr3e_jax.algorithm.rules import Rule
from fr3e_jax.cli import find_config, parse
from fr3e_jax.config import (
    Config,
    ConfigError,
    SFTConfig,
    check,
    dump,
    resolve,
    tables_of,
    without_effect,
)

SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
DEFAULT = "configs/quickstart.yaml"


def parsed(*argv, config_class=Config):
    return parse(config_class, "train", DEFAULT, list(map(str, argv)))


def changed(config, **settings):
    """A configuration with `section__key` (or `key`) replaced."""
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        if section:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{key: value})
    return config


def differences(ours, theirs):
    """Settings of two configurations that differ, as `section.key` -> value of the first."""
    found = {}
    for field in dataclasses.fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if dataclasses.is_dataclass(one):
            found |= {f"{field.name}.{key}": value for key, value in differences(one, other).items()}
        elif one != other:
            found[field.name] = one
    return found


def settings_of(config_class, prefix=""):
    """(name as on the command line, type, class, field name) of every setting."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, name = types[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from settings_of(kind, f"{name}.")
        else:
            yield name, kind, config_class, field.name


# --- parsing


def test_without_arguments_the_default_file_is_read():
    config, name = parsed()
    assert name == "quickstart"
    assert isinstance(config, Config)
    in_file = yaml.safe_load((REPOSITORY / DEFAULT).read_text())
    assert config.steps == in_file["steps"]
    assert config.optimizer.learning_rate == in_file["optimizer"]["learning_rate"]
    assert config.credit == Config().credit  # what the file does not name


@pytest.mark.parametrize("written", [["--config", "{}"], ["--config={}"]])
def test_a_file_is_overridden_by_what_follows_it(tmp_path, written):
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\nexplore:\n  rollouts: 3\n  rule: random\nloss:\n  dual_clip: 10\n")
    argv = [part.format(file) for part in written]
    config, name = parsed(*argv, "--explore.rollouts=5", "--mesh.data", "2", "--loss.clip_low=0.1")
    assert name == "mine"
    assert differences(config, Config()) == {
        "steps": 7,
        "explore.rollouts": 5,
        "explore.rule": "random",
        "loss.dual_clip": 10.0,
        "loss.clip_low": 0.1,
        "mesh.data": 2,
    }


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("steps: 7\nseed: 1\n")
    two.write_text("steps: 8\n")
    config, name = parsed("--config", one, "--config", two)
    assert (config.steps, config.seed, name) == (8, 1, "two")


def test_shipped_files_are_found_by_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, name = parsed("--config", "configs/smollm2_135m.yaml")
    assert (config.data.source, name) == ("word_addition", "smollm2_135m")
    # A file of the user's own goes first.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smollm2_135m.yaml").write_text("steps: 99\n")
    assert parsed("--config", "configs/smollm2_135m.yaml")[0].steps == 99
    assert find_config("configs/nowhere.yaml") == "configs/nowhere.yaml"


def test_numbers_and_null_are_read_as_their_types():
    config, _ = parsed(
        "--optimizer.learning_rate=1", "--loss.dual_clip=null", "--optimizer.eps=1e-9", "--run_dir=null"
    )
    assert (config.optimizer.learning_rate, config.loss.dual_clip) == (1.0, None)
    assert (config.optimizer.eps, config.run_dir) == (1e-9, None)


FILES = {
    "unknown.yaml": "steps: 3\nstepz: 4\n",
    "unknown_in_section.yaml": "explore:\n  position: 2\n",
    "unknown_section.yaml": "exploration:\n  positions: 2\n",
    "wrong_type.yaml": "steps: many\n",
    "wrong_type_in_section.yaml": "optimizer:\n  remat: perhaps\n",
    "bool_for_int.yaml": "steps: true\n",
    "float_for_int.yaml": "steps: 1.5\n",
    "null_for_int.yaml": "steps: null\n",
    "wrong_choice.yaml": "explore:\n  rule: entropie\n",
    "section_is_a_number.yaml": "explore: 5\n",
    "list.yaml": "- 1\n- 2\n",
    "empty.yaml": "",
    "no_yaml.yaml": "steps: [1\n",
}


def refused(capsys, *argv):
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as ended:
        parsed(*argv)
    out, error = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert error.endswith("\n") and len(error.splitlines()) == 1, error
    assert error.startswith("fr3e_jax.train: error: ")
    return error


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("unknown.yaml", "stepz"),
        ("unknown_in_section.yaml", "position"),
        ("unknown_section.yaml", "exploration"),
        ("wrong_type.yaml", "steps"),
        ("wrong_type_in_section.yaml", "optimizer.remat"),
        ("bool_for_int.yaml", "steps"),
        ("float_for_int.yaml", "steps"),
        ("null_for_int.yaml", "steps"),
        ("wrong_choice.yaml", "explore.rule"),
        ("section_is_a_number.yaml", "section"),
        ("list.yaml", ""),
        ("empty.yaml", ""),
        ("no_yaml.yaml", ""),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, capsys, file, named):
    (tmp_path / file).write_text(FILES[file])
    assert named in refused(capsys, "--config", tmp_path / file)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--stepz=3"], "stepz"),
        (["--step=3"], "--step=3"),  # no abbreviations
        (["--optimizer.learn=1"], "--optimizer.learn=1"),
        (["--explore.nothing=1"], "explore.nothing"),
        (["--steps=many"], "steps"),
        (["--steps=1.5"], "steps"),
        (["--steps"], "steps"),
        (["--loss.clip_low=low"], "loss.clip_low"),
        (["--rollout.temperature=nan"], "rollout.temperature"),
        (["--optimizer.remat=maybe"], "optimizer.remat"),
        (["--optimizer.schedule=exponential"], "optimizer.schedule"),
        (["--optimizer.moments=float16"], "optimizer.moments"),
        (["--algorithm=ppo"], "algorithm"),
        (["--explore.rule=entropie"], "explore.rule is 'entropie'; choose one of entropy, surprisal, "),
        (["--credit.reject=all"], "credit.reject is 'all'; choose one of state, query, none"),
        (["--loss.policy=null"], "loss.policy"),
        (['--explore.rule={"class_path": "os.getcwd"}'], "explore.rule"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config", "."], "config"),
        (["--config"], "config"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *argv)


# --- help


def documented(config_class):
    """Field name -> the string that follows it in the source."""
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    texts = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return texts


@pytest.mark.parametrize(("config_class", "command"), [(Config, "train"), (SFTConfig, "sft")])
def test_help_explains_every_setting(config_class, command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")  # a line broken at a hyphen would read differently
    with pytest.raises(SystemExit) as ended:
        parse(config_class, command, f"configs/{'quickstart_sft' if command == 'sft' else 'quickstart'}.yaml",
              ["--help"])  # fmt: skip
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    settings = list(settings_of(config_class))
    assert len(settings) > 15
    missing = []
    for name, _, owner, field in settings:
        text = documented(owner).get(field)
        if table := tables_of(owner).get(field):  # each of its names, with its line
            text += " " + "; ".join(f"`{rule}`, {told.help}" for rule, told in table.items()) + "."
        after = shown.partition(f" --{name} ")[2].partition(" (type: ")[0]
        if not text or not after.endswith(text):
            missing.append(name)
    assert not missing


def test_every_section_says_what_it_is():
    for _, kind in inspect.getmembers(config_module, dataclasses.is_dataclass):
        if kind.__module__ == config_module.__name__:
            assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


# --- dump


def another(kind, value):
    """A valid value of the type, other than `value`."""
    if typing.get_origin(kind) is list:
        return [*value, "'x' # [y]\n"]
    options = [k for k in typing.get_args(kind) if k is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return next(option for option in options if option != value)
    kind = options[0] if options else kind
    if kind is bool:
        return not value
    if kind is int:
        return value + 3
    if kind is float:
        return 1.0 / 3 if value is None else value * 1.1 + 1e-9
    return f"{value}: 'x' # [y]"


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


@pytest.mark.parametrize("algorithm", ["fr3e", "grpo", "grpo++"])
def test_a_resolved_configuration_can_be_run_again(tmp_path, algorithm):
    config = resolve(changed(Config(), algorithm=algorithm))
    (tmp_path / "run.yaml").write_text(dump(config))
    again, _ = parsed("--config", tmp_path / "run.yaml")
    assert resolve(again) == config


# --- the baselines


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


# --- impossible settings

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
        ({"explore__positions": -1}, ["explore.positions"]),
        ({"explore__rollouts": 1}, ["explore.rollouts", "2"]),
        ({"explore__min_gap": -1}, ["explore.min_gap"]),
        ({"rollout__temperature": 0.0}, ["rollout.temperature"]),
        ({"rollout__temperature": -1.0}, ["rollout.temperature"]),
        ({"rollout__top_k": -1}, ["rollout.top_k"]),
        ({"rollout__top_p": 0.0}, ["rollout.top_p"]),
        ({"rollout__top_p": 1.1}, ["rollout.top_p"]),
        ({"rollout__top_p": float("nan")}, ["rollout.top_p"]),
        ({"rollout__max_prompt": 9}, ["rollout.max_prompt 9", "rollout.max_response 40", "48"]),
        ({"rollout__max_response": 0}, ["rollout.max_response"]),
        ({"rollout__queries": 0}, ["rollout.queries"]),
        ({"rollout__queries": 12}, ["rollout.queries", "12", "8"]),
        ({"rollout__base_trajectories": 0}, ["rollout.base_trajectories"]),
        ({"evaluate__rows": 12}, ["evaluate.rows", "12", "8"]),
        ({"evaluate__every": -1}, ["evaluate.every"]),
        ({"optimizer__micro_tokens": 0}, ["optimizer.micro_tokens", "0"]),
        ({"loss__entropy_coefficient": -0.1}, ["loss.entropy_coefficient"]),
        ({"optimizer__minibatches": 3}, ["optimizer.batch_states 16", "optimizer.minibatches 3"]),
        ({"optimizer__minibatches": 0}, ["optimizer.minibatches"]),
        ({"optimizer__epochs": 0}, ["optimizer.epochs"]),
        ({"optimizer__logit_chunk": 0}, ["optimizer.logit_chunk"]),
        ({"optimizer__learning_rate": 0.0}, ["optimizer.learning_rate"]),
        ({"optimizer__final_rate_share": -0.1}, ["optimizer.final_rate_share", "-0.1"]),
        ({"optimizer__final_rate_share": 1.1}, ["optimizer.final_rate_share", "1.1"]),
        ({"optimizer__final_rate_share": float("nan")}, ["optimizer.final_rate_share"]),
        # 5 steps x 2 minibatches are all warm-up.
        (
            {"optimizer__schedule": "cosine", "steps": 5},
            ["optimizer.warmup_updates 10", "cosine", "10 updates"],
        ),
        (
            {"optimizer__schedule": "linear", "optimizer__warmup_updates": 200},
            ["200", "linear", "200 updates"],
        ),
        ({"optimizer__max_skipped": 0}, ["optimizer.max_skipped"]),
        ({"optimizer__max_grad_norm": 0.0}, ["optimizer.max_grad_norm"]),
        ({"optimizer__learning_rate": float("nan")}, ["optimizer.learning_rate"]),
        ({"optimizer__b1": 1.5}, ["optimizer.b1"]),
        ({"optimizer__eps": -1.0}, ["optimizer.eps"]),
        ({"optimizer__weight_decay": -1.0}, ["optimizer.weight_decay"]),
        ({"rollout__temperature": float("nan")}, ["rollout.temperature"]),
        ({"loss__clip_low": 1.0}, ["loss.clip_low"]),
        ({"loss__clip_low": -0.1}, ["loss.clip_low"]),
        ({"loss__clip_high": -0.1}, ["loss.clip_high"]),
        ({"loss__dual_clip": 1.0}, ["loss.dual_clip", "null"]),
        ({"loss__kl_coefficient": -0.1}, ["loss.kl_coefficient"]),
        ({"rollout__top_k": 1}, ["rollout.top_k", "one token"]),
        ({"rollout__max_response": 1}, ["rollout.max_response", "reward.cut"]),
        ({"credit__max_rounds": 0}, ["credit.max_rounds"]),
        ({"checkpoint__every": 0}, ["checkpoint.every"]),
        ({"checkpoint__keep": 0}, ["checkpoint.keep"]),
        ({"data__held_out": 0}, ["data.held_out"]),
        ({"steps": 0}, ["steps"]),
        ({"seed": -1}, ["seed"]),  # numpy takes none below 0
        ({"seed": 2**63}, ["seed"]),  # jax takes none of 64 bits
    ],
)
def test_what_cannot_run_is_refused_in_one_line(settings, named):
    with pytest.raises(ConfigError) as refusal:
        check(resolve(changed(RUNNABLE, **settings)), 8, 48)
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, []),
        ({"algorithm": "grpo", "explore__rule": "random"}, ["explore.rule"]),
        ({"algorithm": "grpo++", "credit__sharpen": True, "explore__rollouts": 8}, ["credit.sharpen"]),
        ({"algorithm": "grpo", "loss__clip_high": 0.5, "loss__clip_low": 0.1}, ["loss.clip_high"]),
        ({"credit__sharpen": True, "explore__rule": "random"}, []),
        ({"credit__sharpen": True, "credit__modulation": "none"}, ["credit.sharpen"]),
        ({"optimizer__final_rate_share": 0.1}, ["optimizer.final_rate_share"]),
        ({"optimizer__final_rate_share": 0.1, "optimizer__schedule": "cosine"}, []),
        ({"reward__pattern": "x"}, ["reward.pattern"]),
        ({"reward__pattern": "x", "reward__format": 0.1}, []),
        ({"optimizer__minibatches": 1, "loss__clip_low": 0.1}, ["loss.clip_low"]),
    ],
)
def test_settings_that_change_nothing_are_told(settings, named):
    told = without_effect(changed(Config(), **settings))
    assert [line.split(" has no effect: ")[0] for line in told] == named


# --- shipped files


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_can_run(file):
    if "sft" in file.stem:
        config, name = parse(SFTConfig, "sft", DEFAULT, ["--config", str(file)])
    else:
        config, name = parsed("--config", file)
        check(resolve(config), 1, 32_768)  # the context of Qwen2.5
    assert name == file.stem


def test_the_defaults_take_more_than_one_optimizer_step_per_batch():
    """With one, the ratio is 1 and clipping does nothing."""
    assert Config().optimizer.minibatches * Config().optimizer.epochs > 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--reward.answer=0", "one of them above 0"),
        ("--reward.answer=-1", "at least 0"),
        ("--reward.answer=.inf", "at least 0"),
        ("--reward.pattern=(", "no regular expression"),
        ("--scoring.workers=-1", "must be at least 0"),
        ("--scoring.time_limit=0", "above 0 seconds"),
        ("--scoring.time_limit=.nan", "above 0 seconds"),
        ("--scoring.memory_gb=0.5", "needs 1 or more"),
    ],
)
def test_rewards_and_limits_that_cannot_be_are_refused(flag, message):
    with pytest.raises(ConfigError, match=message):
        check(parsed(flag)[0], 1, 4096)
