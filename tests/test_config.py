"""Parsing, refusals and help: a user's mistake is one line, and every setting explains itself."""

import ast
import dataclasses
import inspect

import pytest
import yaml
from environment import REPOSITORY
from support import differences, settings_of

from fr3e_jax import config as config_module
from fr3e_jax.cli import find_config, parse
from fr3e_jax.config import (
    Config,
    SFTConfig,
    check,
    resolve,
    tables_of,
)

SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
DEFAULT = "configs/quickstart.yaml"


def parsed(*argv, config_class=Config):
    return parse(config_class, "train", DEFAULT, list(map(str, argv)))


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
        if kind.__module__.startswith(config_module.__name__):
            assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


# --- shipped files


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_can_run(file):
    if "sft" in file.stem:
        config, name = parse(SFTConfig, "sft", DEFAULT, ["--config", str(file)])
    else:
        config, name = parsed("--config", file)
        check(resolve(config), 1, 32_768)  # the context of Qwen2.5
    assert name == file.stem
