"""Which files a configuration is made of, and which sizes of a source are flags."""

import pytest
import yaml
from command_lines import DEFAULT, SOURCES, parsed, refused
from environment import REPOSITORY
from support import differences

from fr3e_jax.cli import parse
from fr3e_jax.config import (
    Config,
    SFTConfig,
    SourceConfig,
    dump,
)

# --- files that begin from others


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_file_says_what_its_base_does_not_section_by_section(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path, below="base: lowest.yaml\nsteps: 3\nexplore:\n  rollouts: 5\n  positions: 2\n")
    written(tmp_path, lowest="seed: 9\nsteps: 1\nloss:\n  clip_low: 1e-1\n")
    file = written(tmp_path / "deep", mine="base: ../below.yaml\nexplore:\n  positions: 3\n")
    config, name = parsed("--config", file, "--loss.clip_high=0.5")
    assert name == "mine"
    assert differences(config, Config()) == {
        "steps": 3,
        "seed": 9,
        "explore.rollouts": 5,
        "explore.positions": 3,
        "loss.clip_low": 0.1,
        "loss.clip_high": 0.5,
    }
    assert "base" not in yaml.safe_load(dump(config))


def test_a_base_is_a_shipped_file_where_none_lies_beside(tmp_path):
    file = written(tmp_path, mine="base: configs/qwen2.5.yaml\n")
    assert parsed("--config", file)[0].data.source == "fr3e_paper"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml\n"}, "a.yaml, line 1: base goes in a circle: DIR/a.yaml -> DIR/a.yaml"),
        (
            {"a": "steps: 2\nbase: b.yaml\n", "b": "base: a.yaml\n"},
            "b.yaml, line 1: base goes in a circle: DIR/a.yaml -> DIR/b.yaml -> DIR/a.yaml",
        ),
        ({"a": "steps: 2\nbase: c.yaml\n"}, "a.yaml, line 2: base: there is no file c.yaml"),
        ({"a": "base: [b.yaml]\n"}, "a.yaml, line 1: base is ['b.yaml'], must be the name of a file"),
        ({"a": "base:\n"}, "a.yaml, line 1: base is None, must be the name of a file"),
        ({"a": "base: b.yaml\n", "b": ""}, "b.yaml is empty; give it options"),
        ({"a": "base: b.yaml\n", "b": "stepz: 1\n"}, "b.yaml, line 1: there is no option stepz"),
        ({"a": "base: b.yaml\nsteps: 0\n", "b": "steps: 1\n"}, "a.yaml, line 2: steps is 0"),
    ],
)
def test_a_base_that_cannot_be_is_refused_with_its_line(tmp_path, capsys, files, message):
    file = written(tmp_path, **files)
    assert refused(capsys, "--config", file).startswith(f"{tmp_path}/{message}".replace("DIR", str(tmp_path)))


def test_slices_say_what_is_theirs_alone():
    """What all of them say stands in their base, and nowhere else."""
    base = yaml.safe_load((REPOSITORY / "configs/qwen2.5.yaml").read_text())
    files = sorted((REPOSITORY / "configs/slices").glob("*.yaml"))
    assert len(files) == 12
    for file in files:
        own = yaml.safe_load(file.read_text())
        assert own["base"] == "../qwen2.5.yaml"
        assert "data" not in own and set(own["model"]) == {"path"}
        config, _ = parsed("--config", file)
        assert config.model.compute_dtype == base["model"]["compute_dtype"]
        assert {name: getattr(config.data, name) for name in base["data"]} == base["data"]


# --- which file applies


def test_where_a_file_went_is_said(capsys):
    assert refused(capsys, "--config", "configs/qwen2.5_7b_v5e16.yaml") == (
        "there is no file configs/qwen2.5_7b_v5e16.yaml; did you mean configs/slices/qwen2.5_7b_v5e16.yaml?"
    )


@pytest.mark.parametrize(
    ("argv", "name", "said"),
    [
        ([], "quickstart", f"{DEFAULT} applies, since neither --config nor another model is given"),
        (["--steps=3"], "quickstart", f"{DEFAULT} applies, since neither --config nor another model is"),
        (["--model.path=quickstart"], "quickstart", "configs/quickstart.yaml applies"),
        (["--model.path", "Org/Name"], "run", "no file applies, since configs/quickstart.yaml is not for "
         "--model.path Org/Name: the defaults and the flags do. configs/own_task.yaml is a beginning"),
        (["--data.source=mine.py"], "quickstart", "configs/quickstart.yaml applies, since neither"),
        (["--config=configs/smollm2_135m.yaml"], "smollm2_135m", "configs/smollm2_135m.yaml applies\n"),
        (["--config=configs/smollm2_135m.yaml", "--model.path=there"], "smollm2_135m",
         "configs/smollm2_135m.yaml applies, and the flags over it\n"),
    ],
)  # fmt: skip
def test_the_quickstarts_file_is_for_the_quickstart_and_what_applies_is_said(capsys, argv, name, said):
    config, named = parsed(*argv)
    assert named == name
    assert capsys.readouterr().out.startswith(f"fr3e_jax.train: {said}")
    quick = yaml.safe_load((REPOSITORY / DEFAULT).read_text())["rollout"]["max_response"]
    assert config.rollout.max_response == {"quickstart": quick, "run": 3072, "smollm2_135m": 48}[name]


def test_a_new_model_for_a_task_of_ones_own_is_not_made_as_the_quickstarts_is(capsys):
    default = "configs/quickstart_sft.yaml"
    for flag in ("--data.source=mine.py", "--init_path=there"):
        config, name = parse(SFTConfig, "sft", default, [flag])
        assert (config.out, config.steps, name) == ("runs/sft", 300, "run")
        said = f"fr3e_jax.sft: no file applies, since {default} is not for {flag.replace('=', ' ')}: "
        assert capsys.readouterr().out.startswith(said)


def test_help_shows_the_defaults_that_apply(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")
    for argv, steps, said in (
        ([], 16, "configs/quickstart.yaml applies, since neither --config nor another model is given."),
        (["--config=configs/smollm2_135m.yaml"], 12, "configs/smollm2_135m.yaml applies."),
        (
            ["--model.path=x"],
            100,
            "no file applies, since configs/quickstart.yaml is not for --model.path x: ",
        ),
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            parsed(*argv, "--help")
        shown = capsys.readouterr().out
        assert f"Training steps. (type: int, at least 1, default: {steps})" in shown
        assert f"Of the defaults below: {said}" in shown


# --- settings of one source as flags


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data.source", "a.jsonl", "--data.source.prompt", "q"], SourceConfig("a.jsonl", prompt="q")),
        (["--data.source.prompt=q", "--data.source=a.jsonl"], SourceConfig("a.jsonl", prompt="q")),
        (
            ["--data.source=a.jsonl", "--data.source.prompt=7", "--data.source.weight=2"],
            SourceConfig("a.jsonl", prompt="7", weight=2),
        ),
        (
            ["--data.source=a.py", "--data.source.parameters.size=3", "--data.source.parameters.word", "x"],
            SourceConfig("a.py", parameters={"size": 3, "word": "x"}),
        ),
        (
            ["--data.source=a.csv", "--data.source.where.level", "[easy, 2]"],
            SourceConfig("a.csv", where={"level": ["easy", 2]}),
        ),
        (['--data.source=[{"name": "a.csv", "prompt": "q"}]'], SourceConfig("a.csv", prompt="q")),
    ],
)
def test_the_settings_of_one_source_are_flags_too(argv, expected):
    assert parsed(*argv)[0].data.source == [expected]


def test_flags_add_to_the_one_source_of_a_file(tmp_path, capsys):
    one = written(tmp_path, one="data:\n  source:\n  - name: a.csv\n    prompt: q\n")
    config, _ = parsed("--config", one, "--data.source.answer=a")
    capsys.readouterr()
    assert config.data.source == [SourceConfig("a.csv", prompt="q", answer="a")]
    two = written(tmp_path, two=SOURCES.format("weight: 2"))
    assert "data.source has 2 sources, and --data.source.answer does not say which it is for" in refused(
        capsys, "--config", two, "--data.source.answer=a"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.source=a.csv", "--data.source.weight=0"], "data.source[0].weight is 0, must be above 0"),
        (
            ["--data.source=[{nmae: a}]"],
            "there is no option data.source[0].nmae; did you mean data.source[0].name?",
        ),
        (["--data.source=[a, b]"], "data.source[0] is 'a', must be a mapping"),
        (["--data.source=[a]", "--data.source.prompt=q"], "data.source[0] is 'a', must be a mapping"),
        (["--data.source=[{name: a"], "'[{name: a' is no YAML"),
        (
            ["--data.source=a.csv", "--data.source.prompt=q", "--data.source.prompt.x=3"],
            "data.source[0].prompt is {'x': '3'}, must be text or null",
        ),
        (
            ["--data.source=a.csv", "--data.source.answer_is=box"],
            "data.source[0].answer_is is 'box', must be one",
        ),
    ],
)
def test_a_mistake_in_the_flags_of_a_source_is_one_line(capsys, argv, message):
    assert refused(capsys, *argv).startswith(message)
