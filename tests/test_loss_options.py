"""A training step of every value of the options of the loss, in process; and files of earlier versions."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml
from support import SMALL, changed, restored

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, LossConfig, dump, resolve, without_effect
from fr3e_jax.learner import groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.build import build, mesh_of
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.run_dir import changes, parse_settings
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.update import train_step

ALL = ("gspo", "sequence", "truncate", "--loss.top_entropy_share=0.5", "--loss.covariance_share=0.1")
STEPS = [
    ALL,
    ("cispo", "prompt", "mask", "--rollout.temperature=0.7"),
    ("clip", "constant", "none", "--loss.top_entropy_share=0.2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", STEPS, ids=lambda x: "-".join(x[:3]))
def test_a_step_trains_by_every_option_of_the_loss(options):
    objective, aggregate, mismatch, *others = options
    flags = [f"--loss.objective={objective}", f"--loss.aggregate={aggregate}", f"--loss.mismatch={mismatch}"]
    config, _ = parse(Config, "train", "configs/quickstart.yaml", [*SMALL, *flags, *others])
    config = resolve(config)
    parts = build(config, Hosts(mesh_of(config.mesh), timeout=60))
    state = parts.policy.fresh_state(parts.learner)
    sizes = config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    with jax.transfer_guard("disallow"):
        carried, shown = groups.empty_groups(*sizes), StepProgress(print)
        state, _, _, metrics, _ = train_step(config, parts, None, state, carried, Progress(), shown)
    parts.verifier.pool.close()
    assert np.isfinite(metrics["update/loss"]) and metrics["update/grad_norm"] > 0
    share = config.loss.top_entropy_share
    if share < 1:
        assert 1 - share - 0.01 < metrics["update/left_out"] < 1.01 - share + config.loss.covariance_share
    assert ("mismatch/outside" in metrics) == ("flops/mismatch" in metrics) == (mismatch != "none")
    if mismatch == "truncate":  # at temperature 1 sampler and learner differ by rounding alone
        assert metrics["mismatch/outside"] == metrics["mismatch/bounded"] == 0
        assert 1 - 1e-4 < metrics["mismatch/ratio_max"] < 1.001
        # A third of forward and backward, but for trunks: the batch and its minibatches are laid out each in
        # the way that computes least, which repeats other trunks.
        assert 0 < metrics["flops/mismatch"] <= metrics["flops/update"] / 2
        assert metrics["time/mismatch"] > 0
    if mismatch == "mask":
        assert metrics["mismatch/outside"] > 0.001


# --- what earlier versions wrote


def test_the_earlier_name_of_the_objective_is_read_in_files_flags_and_runs(tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text("loss:\n  policy: cispo\n  clip_low: 0.1\n")
    for given in (["--config", str(file)], ["--loss.policy=cispo"], ["--loss.policy", "cispo"]):
        config, _ = parse(Config, "train", "configs/quickstart.yaml", given)
        assert config.loss.objective == "cispo"
    old = yaml.safe_load(dump(Config()))
    old["loss"] = {"policy": old["loss"]["objective"], "clip_low": 0.22}
    assert changes(parse_settings(yaml.safe_dump(old)), yaml.safe_load(dump(Config()))) == {}
    old["loss"]["policy"] = "gspo"
    held = parse_settings(yaml.safe_dump(old))
    assert changes(held, yaml.safe_load(dump(Config()))) == {"loss.objective": ("gspo", "clip")}
    file.write_text("steps: 3\nloss:\n  policy: cispo\n  objective: clip\n")
    with pytest.raises(SystemExit):
        parse(Config, "train", "configs/quickstart.yaml", ["--config", str(file)])
    assert capsys.readouterr().err == (
        f"fr3e_jax.train: error: {file}, line 3: loss.policy is the earlier name of loss.objective, and both "
        "are set; leave one out\n"
    )


def test_carried_states_of_an_earlier_version_are_read(tmp_path, monkeypatch):
    """Its checkpoints hold neither entropies nor the log-probabilities of filtered distributions."""
    rng = np.random.default_rng(0)
    held = jax.tree.map(
        lambda x: rng.integers(0, 9, (2, *x.shape[1:])).astype(x.dtype), groups.empty_groups(2, 3, 4)
    )
    old = dataclasses.replace(held, sampled_logprob=None, entropy=None, drawn_step=None)
    like = TrainState({"w": jax.numpy.ones(2)}, {"count": jax.numpy.int32(1)})
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(like, old, Progress(step=1))
    writer.close()
    assert set(groups.as_dict(held)) - set(groups.as_dict(old)) == groups.LATER_FIELDS
    _, again, _ = restored(tmp_path, 1, like)
    np.testing.assert_array_equal(again.logprob, held.logprob)
    np.testing.assert_array_equal(again.sampled_logprob, held.logprob)  # filters came later than these
    assert again.entropy.shape == held.entropy.shape
    assert groups.count(groups.concatenate(again, held)) == 4


# --- options that change nothing


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({"objective": "gspo", "clip_low": 0.1}, ["clip_low"]),
        ({"objective": "gspo", "sequence_clip_low": 0.1}, []),
        ({"sequence_clip_high": 0.1}, ["sequence_clip_high"]),
        ({"objective": "cispo", "dual_clip": 2.0, "clip_high": 0.5}, ["dual_clip"]),
        ({"mismatch_low": 0.1, "mismatch_high": 3.0}, ["mismatch_low", "mismatch_high"]),
        ({"mismatch": "truncate", "mismatch_low": 0.1, "mismatch_high": 3.0}, ["mismatch_low"]),
        ({"mismatch": "mask", "mismatch_low": 0.1, "mismatch_high": 3.0}, []),
    ],
)
def test_options_of_the_loss_without_effect_are_noted(settings, noted):
    sentences = without_effect(dataclasses.replace(Config(), loss=LossConfig(**settings)))
    assert [sentence.partition(" has no effect: ")[0] for sentence in sentences] == [
        f"loss.{name}" for name in noted
    ]


def test_with_one_update_the_bounds_that_an_objective_reads_have_no_effect():
    config = changed(Config(), optimizer__minibatches=1, loss__objective="gspo", loss__sequence_clip_low=0.1)
    assert without_effect(config) == [
        "loss.sequence_clip_low has no effect: with one update a step the ratio is 1"
    ]
