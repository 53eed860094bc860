"""Damaged run directories: what is taken is bit for bit what was saved, or one line says why nothing is."""

import dataclasses
import gc
import json
import random
import shutil
import time

import damage
import jax
import numpy as np
import pytest
import yaml
from etils import epath
from support import SMALL, call, metrics, run

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, resolve
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.build import build, mesh_of
from fr3e_jax.run.resume import resume
from fr3e_jax.run.run_dir import refuse_other_settings
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.storage import StorageError


class Opening:
    """The opening of a run directory as train does it, without what it does not depend on."""

    def __init__(self):
        self.config = resolve(parse(Config, "train", "configs/quickstart.yaml", SMALL)[0])
        self.hosts = Hosts(mesh_of(self.config.mesh), timeout=60)
        parts = build(self.config, self.hosts)
        parts.verifier.pool.close()
        self.state, corpus = parts.policy.fresh_state(parts.learner), parts.corpus
        sizes = self.config.explore.rollouts, self.config.rollout.max_prompt, self.config.rollout.max_response
        self.fresh = self.state, groups.empty_groups(*sizes), Progress(problems=corpus.checksum)

    def __call__(self, directory, **changes):
        config = dataclasses.replace(self.config, run_dir=str(directory), **changes)
        lost = refuse_other_settings(config)
        return resume(epath.Path(directory), config, self.fresh, self.hosts, lost)

    def bits(self, directory):
        """(progress, bytes of every array) of what is gone on from; None where a run begins."""
        found = self(directory)
        if found.progress == self.fresh[2]:
            return None
        return found.progress, [
            np.asarray(x).tobytes() for x in jax.tree.leaves((found.state, found.carried))
        ]


@pytest.fixture(scope="module")
def opening():
    return Opening()


@pytest.fixture(scope="module")
def right(opening, whole_run, tmp_path_factory):
    """Step -> what is gone on from, of the checkpoints of the run."""
    copy = damage.linked_copy(whole_run[0], tmp_path_factory.mktemp("right") / "run")
    found = {4: opening.bits(copy)}
    shutil.rmtree(copy / damage.NEWEST)
    found[2] = opening.bits(copy)
    assert [found[step][0].step for step in (4, 2)] == [4, 2]
    assert found[4][1] != found[2][1]
    return found


def outcome(opening, right, copy):
    """`step N`, `begins`, or the line of the refusal; anything else is an error."""
    try:
        found = opening.bits(copy)
    except (ConfigError, StorageError) as error:
        said = str(error)
        assert said and len(said) < 2000 and "Traceback" not in said, said
        return said
    if found is None:
        assert not (copy / "checkpoints").is_dir() or not any((copy / "checkpoints").iterdir())
        return "begins"
    step = found[0].step
    assert found[0] == right[step][0]
    assert found[1] == right[step][1], f"wrong numbers of step {step}"
    return f"step {step}"


def try_all(opening, right, run, cases, folder, capfd):
    """Name -> outcome of each damage."""
    outcomes = {}
    for name, spoil in cases:
        copy = damage.linked_copy(run, folder / "run")
        spoil(copy)
        began = time.monotonic()
        try:
            outcomes[name] = outcome(opening, right, copy)
        except BaseException as error:
            raise AssertionError(name) from error
        assert time.monotonic() - began < 20, name
    gc.collect()
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "Exception" not in said.err, said.err[-3000:]
    return outcomes


@pytest.mark.slow
def test_no_damage_is_trained_on(opening, right, whole_run, tmp_path, capfd):
    """A byte, a file, a folder, a key at a time; 200 of some 1,300 such damages."""
    cases = random.Random(1).sample(damage.damages(whole_run[0]), 200)
    outcomes = try_all(opening, right, whole_run[0], cases, tmp_path, capfd)
    assert len(outcomes) > 180
    taken = [outcomes[name] for name in outcomes]
    # Most leave a checkpoint to go on from, and many damage the newest.
    assert taken.count("step 2") > 20 and taken.count("step 4") > 20
    assert sum(x.startswith("step") for x in taken) > 0.7 * len(taken)


@pytest.mark.parametrize("part", range(3))
def test_few_damages_of_each_kind_are_not_trained_on(opening, right, whole_run, tmp_path, capfd, part):
    cases = damage.damages(whole_run[0])
    some = random.Random(part).sample(cases, 10)
    try_all(opening, right, whole_run[0], some, tmp_path, capfd)


def refused(directory, opening, **changes):
    """The line with which a run directory is refused."""
    with pytest.raises(ConfigError) as error:
        opening(directory, **changes)
    return str(error.value)


@pytest.fixture
def copy(whole_run, tmp_path):
    """A copy of the run, none of whose files may be written in place."""
    return damage.linked_copy(whole_run[0], tmp_path / "run")


def spoil_array(run, item="params", step=4):
    """Change a bit in the midst of an item's largest file, which decompresses still."""
    folder = run / f"checkpoints/{step}/{item}/ocdbt.process_0/d"
    file = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damage.write(file, bytes(content))


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_of_a_damaged_checkpoint_it_is_told_what_is_damaged(opening, right, copy, item):
    spoil_array(copy, item)
    found = opening(copy)
    assert found.progress.step == 2 and found.damaged == [4]
    assert f"the checkpoint of step 4 of {copy} is damaged: the checksum of {item}/" in found.messages[0]
    assert "step 2 is taken" in found.messages[1]
    assert opening.bits(copy) == right[2]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(opening, copy):
    spoil_array(copy)
    damage.remove(copy / damage.OLDER / "progress")
    said = refused(copy, opening)
    assert "holds no whole checkpoint" in said and "step 4: " in said and "step 2: progress" in said


def with_settings(run, change):
    """Rewrite config.yaml with its settings changed in place."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    change(settings)
    damage.write(run / "config.yaml", yaml.safe_dump(settings).encode())


def test_an_option_that_an_older_config_does_not_have_is_at_its_default(opening, right, copy):
    with_settings(copy, lambda x: (x["explore"].pop("min_gap"), x.pop("reward")))
    assert opening.bits(copy) == right[4]
    other = dataclasses.replace(opening.config.explore, min_gap=3)
    assert "explore.min_gap" in refused(copy, opening, explore=other)


def test_an_unknown_option_of_a_config_is_named(opening, copy):
    with_settings(copy, lambda x: x["explore"].update(depth=3))
    assert "does not know: explore.depth" in refused(copy, opening)


@pytest.mark.parametrize("content", [None, b"", b"model: ["])
def test_without_its_config_a_run_goes_on_with_the_settings_of_its_checkpoint_only(
    opening, right, copy, content
):
    damage.remove(copy / "config.yaml")
    if content is not None:
        (copy / "config.yaml").write_bytes(content)
    assert opening.bits(copy) == right[4]
    assert any("config.yaml is" in message for message in opening(copy).messages)
    assert "other settings: seed: " in refused(copy, opening, seed=1)
    loss = dataclasses.replace(opening.config.loss, clip_high=0.4)
    assert "other settings: loss.clip_high: 0.28 -> 0.4" in refused(copy, opening, loss=loss)
    with pytest.raises(ConfigError, match="holds a run"):
        opening(copy, resume="never")


def test_a_config_that_lost_its_seed_does_not_let_another_one_in(opening, copy):
    """Cut between lines it is YAML still, and what it lacks would be at its default."""
    with_settings(copy, lambda x: x.update(seed=5))
    lines = (copy / "config.yaml").read_text().splitlines(keepends=True)
    damage.write(copy / "config.yaml", "".join(x for x in lines if "seed" not in x).encode())
    assert opening(copy).progress.step == 4
    with_settings(copy, lambda x: x.update(seed=5))
    assert "other settings: seed: " in refused(copy, opening, seed=5)


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_to_be_unverified(opening, right, copy):
    file = copy / damage.NEWEST / "progress" / "metadata"
    old = json.loads(file.read_text())["progress"]
    damage.write(file, json.dumps(old).encode())
    assert opening.bits(copy) == right[4]
    assert any("not verified" in line for line in opening(copy).messages)
    damage.remove(copy / "config.yaml")
    assert "seed 0, not 1" in refused_other_seed(opening, copy)
    assert "only its seed" in opening(copy).messages[-1]
    damage.write(file, json.dumps(old | {"depth": 3}).encode())
    found = opening(copy)
    assert found.progress.step == 2 and "the unknown key depth" in found.messages[0]


def refused_other_seed(opening, copy):
    """The refusal of a run of seed 1."""
    fresh = opening.fresh
    opening.fresh = (*fresh[:2], dataclasses.replace(fresh[2], seed=1))
    try:
        return refused(copy, opening, seed=1)
    finally:
        opening.fresh = fresh


# --- whole commands


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_bit_for_bit(copy, whole_run):
    spoil_array(copy)
    damage.remove(copy / "summary.json")  # a complete run is not opened
    (copy / "checkpoints" / "99").mkdir()
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damage.write(copy / "metrics.jsonl", b"".join(lines[:3]) + lines[3][:40])
    done = run("train", *SMALL, "--run_dir", copy)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "the checkpoint of step 99 of" in done.stdout and "the checkpoint of step 4 of" in done.stdout
    assert "metrics.jsonl: the last line, 4, is cut short" in done.stdout
    assert "resumed from the checkpoint of step 2" in done.stdout
    assert metrics(copy) == metrics(whole_run[0])
    ours, theirs = ((d / "model" / "model.safetensors").read_bytes() for d in (copy, whole_run[0]))
    assert ours == theirs
    assert sorted(each.name for each in (copy / "damaged").iterdir()) == ["4", "99"]
    assert sorted(each.name for each in (copy / "checkpoints").iterdir()) == ["2", "4"]


def test_a_damaged_checkpoint_is_not_exported(copy, tmp_path):
    spoil_array(copy)
    named = call("export", "--run", copy, "--out", tmp_path / "out", "--step=4")
    assert named.returncode == 2 and len(named.stderr.splitlines()) == 1
    assert "step 4: " in named.stderr and "params" in named.stderr
    assert not (tmp_path / "out").exists()
    done = call("export", "--run", copy, "--out", tmp_path / "out")
    assert done.returncode == 0 and "step 2 of" in done.stdout
    assert "the checkpoint of step 4 of" in done.stderr and len(done.stderr.splitlines()) == 2


def test_a_damaged_checkpoint_is_not_asked(copy, tmp_path):
    spoil_array(copy)
    few = ["--suite=carry_addition", "--limit=8", "--rows=8", "--max_response=40", "--model", copy]
    done = call("evaluate", *few, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "step 2 of" in done.stdout and "the checkpoint of step 4 of" in done.stderr
    assert yaml.safe_load((tmp_path / "out" / "evaluation.yaml").read_text())["step"] == 2
    named = call("evaluate", *few, "--out", tmp_path / "other", "--step=4")
    assert named.returncode == 2 and len(named.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_dozen_damages_are_one_line_of_a_command_or_none(whole_run, tmp_path):
    """Of training, which is done already, so that it ends when it has opened the run; and of export."""
    cases = [case for case in damage.damages(whole_run[0]) if damage.OLDER not in case[0]]
    ends = []
    for name, spoil in random.Random(5).sample(cases, 14):
        for command in (["train", *SMALL, "--run_dir"], ["export", "--out", tmp_path / "out", "--run"]):
            copy = damage.linked_copy(whole_run[0], tmp_path / "run")
            spoil(copy)
            damage.remove(copy / "summary.json")  # a complete run is not opened
            for step in ("2", "2.orbax-checkpoint-tmp"):  # so that nothing is left to train
                shutil.rmtree(copy / "checkpoints" / step, ignore_errors=True)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            ended = call(command[0], *command[1:], copy)
            assert ended.returncode in (0, 1, 2), name
            assert "Traceback" not in ended.stderr, name
            if ended.returncode:
                assert len(ended.stderr.splitlines()) == 1, (name, ended.stderr)
            ends.append(ended.returncode)
    assert 0 in ends and 2 in ends
