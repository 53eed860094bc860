"""Functions of the user's own in place of a rule's name, `module:function`: loaded, refused, resumed."""

import sys
import textwrap

import numpy as np
import pytest
import yaml
from support import SMALL, call, changed, metrics

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, CreditConfig, check, dump, resolve
from fr3e_jax.config.checks import check_options
from fr3e_jax.config.own_functions import load_function
from fr3e_jax.config.values import tables_of, with_functions
from fr3e_jax.run.run_dir import refuse_differing

MINE = """
    import jax.numpy as jnp

    WEIGHT = 2.0

    def late(base):
        return base.entropy * jnp.arange(base.entropy.shape[1])[None, :]

    def asking(base):
        return base.measured("gradient")

    asking.needs = ("gradeint",)

    def flat(base):
        return base.length

    def last(reward, correct, key):
        return jnp.broadcast_to(jnp.arange(reward.shape[1])[None] == reward.shape[1] - 1, reward.shape)

    def raw(reward, valid):
        return reward

    def doubled(change):
        return 2.0 + 0 * change

    def every(reward, valid, query):
        return valid

    def reinforce(logprob, old_logprob, advantage, mask, denominator, **others):
        return -jnp.sum(jnp.where(mask, advantage * logprob, 0.0)) / denominator, {}

    def halves(length, query, limit):
        return 0 * length + 0.5

    class Rules:
        early = staticmethod(lambda base: -jnp.arange(base.entropy.shape[1])[None, :] + 0 * base.entropy)
"""
CHOSEN = {
    "explore.rule": "late",
    "explore.keep": "last",
    "credit.advantage": "raw",
    "credit.modulation": "doubled",
    "credit.reject": "every",
    "loss.objective": "reinforce",
    "loss.aggregate": "halves",
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the current directory, whose name no other test has."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "broken_of_mine.py").write_text("import numpy\n1 / 0\n")
    (tmp_path / "lacking_of_mine.py").write_text("import there_is_no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield name
    for module in (name, "broken_of_mine", "lacking_of_mine"):
        sys.modules.pop(module, None)


def flags(mine):
    return [f"--{option}={mine}:{function}" for option, function in CHOSEN.items()]


def test_every_table_of_rules_takes_one_from_flags_and_from_a_file(mine, tmp_path):
    config, _ = parse(Config, "train", "configs/quickstart.yaml", flags(mine))
    assert len(CHOSEN) == sum(len(tables_of(part)) for part in (config.explore, config.credit, config.loss))
    (tmp_path / "run.yaml").write_text(
        "base: configs/quickstart.yaml\n"
        + yaml.safe_dump({"explore": {"rule": f"{mine}:late"}, "credit": {"advantage": f"{mine}:raw"}})
    )
    from_file, _ = parse(Config, "train", "configs/quickstart.yaml", ["--config", "run.yaml"])
    assert from_file.explore.rule == config.explore.rule == f"{mine}:late"
    assert with_functions(from_file.explore).rule is load_function(f"{mine}:late")
    assert with_functions(config.credit).reject is sys.modules[mine].every
    assert load_function(f"{mine}:Rules.early") is sys.modules[mine].Rules.early
    assert str(tmp_path) not in sys.path  # it is only looked at


def test_a_run_keeps_its_text_and_goes_on_with_the_same_one_alone(mine):
    config = resolve(parse(Config, "train", "configs/quickstart.yaml", flags(mine))[0])
    held = yaml.safe_load(dump(config))
    assert held["explore"]["rule"] == f"{mine}:late" and held["loss"]["objective"] == f"{mine}:reinforce"
    refuse_differing(held, config, "the run", "it has")
    other = changed(config, explore__rule=f"{mine}:Rules.early")
    with pytest.raises(ConfigError, match=r"explore\.rule"):
        refuse_differing(held, other, "the run", "it has")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MINE:lat", "MINE has no function lat; did you mean late?"),
        ("MINE:WEIGHT", "WEIGHT of MINE is no function but float"),
        ("MINE:", "this is not module:function: the names of a module and of a function in it"),
        (":late", "this is not module:function"),
        ("MINE.py:late", "there is no module MINE.py"),
        (
            "no_such_module_of_mine:late",
            "there is no module no_such_module_of_mine, neither in HERE nor on PYTHON",
        ),
        ("broken_of_mine:late", "broken_of_mine cannot be imported: ZeroDivisionError: division by zero"),
        (
            "lacking_of_mine:late",
            "lacking_of_mine cannot be imported: No module named 'there_is_no",
        ),
        ("entropie", "did you mean entropy? choose one of entropy, "),
        ("thoughts", "'thoughts'; choose one of entropy, "),
    ],
)
def test_what_cannot_be_loaded_is_one_line_and_exit_code_2(mine, tmp_path, text, message):
    text, message = text.replace("MINE", mine), message.replace("MINE", mine).replace("HERE", str(tmp_path))
    done = call("train", f"--explore.rule={text}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"explore.rule is {text!r}" in done.stderr and message in done.stderr
    file = tmp_path / "run.yaml"
    file.write_text(f"steps: 1\nexplore:\n  rule: '{text}'\n")
    done = call("train", f"--config={file}")
    assert done.returncode == 2 and f"{file}, line 3: explore.rule" in done.stderr and message in done.stderr


def test_a_library_call_takes_the_text_too_and_refuses_what_it_gives(mine):
    section = with_functions(CreditConfig(modulation=f"{mine}:doubled"))
    change = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(section.modulation(change), np.full((2, 3), 2.0))
    check_options(CreditConfig(modulation=f"{mine}:doubled"))
    with pytest.raises(ConfigError, match="there is no module nowhere_of_mine"):
        check_options(CreditConfig(modulation="nowhere_of_mine:doubled"))


def test_a_rule_that_needs_what_there_is_not_is_refused_before_a_run_begins(mine):
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [f"--explore.rule={mine}:asking"])
    with pytest.raises(
        ConfigError, match=r"^explore\.rule: .*asking needs 'gradeint', which is none of gradient"
    ):
        check(resolve(config), 1, 32_768)


def test_reading_a_run_imports_nothing_that_it_names(tmp_path):
    """What lies in a run directory is text: only what the user gives is imported."""
    settings = yaml.safe_load(dump(Config()))
    settings["explore"]["rule"] = "this:late"  # a module of Python's that nothing else imports
    sys.modules.pop("this", None)
    with pytest.raises(ConfigError, match=r"explore\.rule: this:late -> entropy"):
        refuse_differing(settings, Config(), "the run", "it has")
    assert "this" not in sys.modules


@pytest.mark.slow
def test_a_run_of_functions_of_ones_own_trains_and_one_of_another_shape_says_so(mine, tmp_path):
    small = [*SMALL, "--steps=1", "--evaluate.every=0"]
    done = call("train", *small, *flags(mine), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    line = metrics(tmp_path / "run")[1]
    assert line["modulation/mean"] == 2.0 and line["states/accepted"] > 0 and np.isfinite(line["update/loss"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["explore"]["keep"] == f"{mine}:last"
    again = call("train", *small, *flags(mine), f"--run_dir={tmp_path / 'run'}", "--steps=2")
    assert again.returncode == 0, again.stderr
    done = call("train", *small, f"--explore.rule={mine}:flat")
    assert done.returncode == 2 and "scores [N, S] must have shape" in done.stderr
