"""Parsing, refusals and help: a user's mistake is one line, and every setting explains itself."""

import ast
import dataclasses
import inspect
import json

import pytest
import yaml
from command_lines import DEFAULT, SOURCES, parsed, refused
from environment import REPOSITORY
from support import call, differences, settings_of

from fr3e_jax import config as config_module
from fr3e_jax.cli import parse
from fr3e_jax.config import (
    Config,
    ConfigError,
    SFTConfig,
    check,
    find_config,
    resolve,
    tables_of,
)

SHIPPED = sorted(file for file in (REPOSITORY / "configs").rglob("*.yaml") if file.parent.name != "studies")


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
    with pytest.raises(
        ConfigError,
        match=r"^there is no file configs/quickstat.yaml; did you mean configs/quickstart.yaml\?$",
    ):
        find_config("configs/quickstat.yaml")


def test_numbers_and_null_are_read_as_their_types():
    config, _ = parsed(
        "--optimizer.learning_rate=1", "--loss.dual_clip=null", "--optimizer.eps=1e-9", "--run_dir=null"
    )
    assert (config.optimizer.learning_rate, config.loss.dual_clip) == (1.0, None)
    assert (config.optimizer.eps, config.run_dir) == (1e-9, None)


MISTAKES = {
    "steps: 3\nstepz: 4\n": "FILE, line 2: there is no option stepz; did you mean steps?",
    "explore:\n  position: 2\n": "FILE, line 2: there is no option explore.position; did you mean "
    "explore.positions?",
    "exploration:\n  positions: 2\n": "FILE, line 1: there is no option exploration",
    "explor:\n  positions: 2\n": "FILE, line 1: there is no option explor; did you mean explore?",
    "positions: 2\n": "FILE, line 1: there is no option positions; did you mean explore.positions?",
    "seed: 1\n\n# many\nsteps: many\n": "FILE, line 4: steps is 'many', must be a whole number",
    "optimizer:\n  remat: perhaps\n": "FILE, line 2: optimizer.remat is 'perhaps', must be true or false",
    "steps: true\n": "FILE, line 1: steps is true, must be a whole number",
    "steps: 1.5\n": "FILE, line 1: steps is 1.5, must be a whole number",
    "steps: null\n": "FILE, line 1: steps is null, must be a whole number",
    "steps:\n": "FILE, line 1: steps is null, must be a whole number",
    "steps: 0\n": "FILE, line 1: steps is 0, must be at least 1",
    "steps: 3\nsteps: 4\n": "FILE, line 2: steps is set a second time, after line 1",
    "explore:\n  rule: entropie\n": "FILE, line 2: explore.rule is 'entropie'; did you mean entropy? ",
    "explore: 5\n": "FILE, line 1: explore is 5, must be a section: a mapping of options to values",
    "1: 5\n": "FILE, line 1: there is no option 1",
    "- 1\n- 2\n": "FILE is not a mapping of options to values",
    "": "FILE is empty; give it options",
    "# steps: 3\n": "FILE is empty; give it options",
    "--- \n": "FILE is not a mapping of options to values",
    "steps: [1\n": "FILE, line 2: this is no YAML: ",
    "steps: 1\n  seed: 2\n": "FILE, line 2: this is no YAML: mapping values are not allowed here",
    "a: &a\n  b: *a\n": "FILE is no configuration: ",
    SOURCES.format("scorer: 5"): "FILE, line 6: data.source[1].scorer is 5, must be text or null",
    SOURCES.format("nmae: c"): "FILE, line 6: there is no option data.source[1].nmae; did you mean "
    "data.source[1].name?",
    SOURCES.format("weight: 0"): "FILE, line 6: data.source[1].weight is 0, must be above 0",
    SOURCES.format(
        "answer_is: box"
    ): "FILE, line 6: data.source[1].answer_is is 'box', must be one of plain, ",
    SOURCES.format("where: {level: 5}"): "FILE, line 6: data.source[1].where.level is 5, must be a list",
    "data:\n  source:\n  - prompt: q\n": "FILE, line 3: data.source[0] has no name",
    "data:\n  source: []\n  template: plain\n  min_digits: x\n": "FILE, line 4: data.min_digits is 'x'",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: repr(text[:30]))
def test_a_mistake_in_a_file_is_one_line_with_file_line_and_option(tmp_path, capsys, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert refused(capsys, "--config", file).startswith(MISTAKES[text].replace("FILE", str(file)))


def test_a_file_that_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_bytes(b"steps: \xff\n")
    assert "mine.yaml is no configuration: " in refused(capsys, "--config", tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "scorer: maths",
            "FILE, line 6: the scorer of source b.jsonl is 'maths'; did you mean math? Scorers are ",
        ),
        ("parameters: {size: 3}", "FILE, line 6: source b.jsonl reads no parameters; leave it out"),
    ],
)
def test_a_mistake_that_is_found_later_has_its_file_and_line_too(tmp_path, entry, message):
    """When the sources are read, which is behind the parser and the model."""
    file = tmp_path / "mine.yaml"
    for name in "ab":
        rows = [{"q": f"1+{n}=", "question": f"1+{n}=", "answer": str(1 + n)} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = SOURCES.format(entry).replace("name: ", f"name: {tmp_path}/") + "  held_out: 1\n"
    file.write_text(text + "rollout: {max_prompt: 8, max_response: 40}\nevaluate: {rows: 8}\n")
    refusal = call("train", "--config", file).stderr
    expected = message.replace("FILE", str(file)).replace("b.jsonl", f"{tmp_path}/b.jsonl")
    assert refusal.startswith(f"fr3e_jax.train: error: {expected}")
    assert len(refusal.splitlines()) == 1


# --- flags


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--stepz=3"], "stepz"),
        (["--step=3"], "there is no option --step; did you mean --steps?"),  # no abbreviations
        (
            ["--optimizer.learn=1"],
            "there is no option --optimizer.learn; did you mean --optimizer.learning_rate?",
        ),
        (["--positions=3"], "there is no option --positions; did you mean --explore.positions?"),
        (["--exploration.rule=random"], "did you mean --explore.rule?"),
        (["--data.sorce=x"], "there is no option --data.sorce; did you mean --data.source?"),
        (
            ["--data.source.promt=x"],
            "there is no option --data.source.promt; did you mean --data.source.prompt?",
        ),
        (["--zzz=3"], "there is no option --zzz"),
        (["--explore.nothing=1"], "explore.nothing"),
        (["--steps=many"], "steps is 'many', must be a whole number"),
        (["--steps=1.5"], "steps"),
        (["--steps"], "--steps needs a value"),
        (["--loss.clip_low=low"], "loss.clip_low is 'low', must be a number"),
        (["--loss.dual_clip=low"], "loss.dual_clip is 'low', must be a number or null"),
        (["--rollout.temperature=nan"], "rollout.temperature"),
        (["--optimizer.remat=maybe"], "optimizer.remat is 'maybe', must be true or false"),
        (["--optimizer.schedule=exponential"], "optimizer.schedule"),
        (["--optimizer.moments=float16"], "optimizer.moments"),
        (["--algorithm=ppo"], "algorithm"),
        (["--explore.rule=entropie"], "explore.rule is 'entropie'; did you mean entropy? choose "),
        (["--credit.reject=all"], "credit.reject is 'all'; choose one of state, query, none"),
        (["--loss.objective=null"], "loss.objective"),
        (['--explore.rule={"class_path": "os.getcwd"}'], "explore.rule"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config", "."], "config"),
        (["--config"], "config"),
        (["stray"], "'stray' stands behind no option: options are written --key VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *argv)


# --- help


def documented(config_class):
    """Field name -> the string that follows it in the source, of the class and of those that it extends."""
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    texts = {}
    for base in config_class.__bases__:
        texts |= {} if base is object else documented(base)
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
            text += " " + "; ".join(f"`{rule}`, {told.help}" for rule, told in table.items())
            text += "; or a function of your own, `module:function`."
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
