"""Ids that the embedding has and the tokenizer has not: out of every distribution, or refused by name."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support import TINY, call, placement, tiny_params

from fr3e_jax.config import QUICKSTART_MODEL, ConfigError, LossConfig
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.model import open_model
from fr3e_jax.types import Batch, Bundle, Queries

RANGES = ((0, 19), (24, 41))  # of TINY's 48 ids
KNOWN = np.array([i for first, end in RANGES for i in range(first, end)])
CONFIG = dataclasses.replace(TINY, known_ids=RANGES)
PARAMS = tiny_params(scale=2.0)
WIDTH = 12


@jax.jit
def known_policy(params, token):
    """Log-probabilities [rows, T, known ids] of whole rows, by leaving the other columns out."""
    model = nnx.merge(graph_of(TINY), params)

    def one(row):
        hidden, _ = model(row, jnp.arange(WIDTH), jnp.int32(WIDTH))
        return model.logits(hidden)[:, KNOWN]

    return jax.nn.log_softmax(jax.vmap(one)(token))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 4)], ids=["1", "8"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 12, 0.95)], ids=["policy", "filtered"])
def test_unknown_ids_are_never_drawn_and_have_no_share_of_probability_and_entropy(mesh, sampling):
    place = placement(*mesh, table=SAMPLING_TABLE)
    engine = Engine(graph_of(CONFIG), place, WIDTH - 4, (48,))
    token = np.random.default_rng(0).choice(KNOWN, (2, 4)).astype(np.int32)
    queries = Queries(token, np.full(2, 4, np.int32), np.arange(2, dtype=np.int32))
    rollouts, _ = engine.sample(PARAMS, place.place_rows(queries), jax.random.key(1), 0, 64, sampling)
    rollouts = jax.device_get(rollouts)
    assert np.isin(rollouts.token, KNOWN).all()
    rows = np.concatenate([np.repeat(token, 64, axis=0), rollouts.token.reshape(128, -1)], axis=1)
    policy = np.asarray(known_policy(PARAMS, rows), np.float64)[:, 3:-1]
    place_of = np.searchsorted(KNOWN, rows[:, 4:])
    drawn = np.take_along_axis(policy, place_of[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(rollouts.logprob.reshape(128, -1), drawn, atol=1e-4)
    entropy = -(np.exp(policy) * policy).sum(axis=2)
    np.testing.assert_allclose(rollouts.entropy.reshape(128, -1), entropy, atol=1e-4)


def test_the_update_has_the_same_distribution_as_the_sampler():
    """Loss with entropy bonus, and its gradient, against softmax over the known columns alone."""
    rng = np.random.default_rng(1)
    token = rng.choice(KNOWN, (4, WIDTH)).astype(np.int32)
    old = rng.normal(size=token.shape).astype(np.float32) - 3.0
    advantage, none = rng.normal(size=4).astype(np.float32), np.zeros(4, np.int32)
    start, length = np.full(4, 3, np.int32), np.full(4, WIDTH, np.int32)
    batch = Batch(token, length, start, old, advantage, none, none)
    settings = LossConfig(entropy_coefficient=0.1)

    def expected(params):
        policy = known_policy(params, token)[:, 2:-1]
        place_of = np.searchsorted(KNOWN, token[:, 3:])
        ratio = jnp.exp(jnp.take_along_axis(policy, place_of[..., None], axis=2)[..., 0] - old[:, 3:])
        clipped = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
        loss = -jnp.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
        entropy = -(jnp.exp(policy) * policy).sum(axis=2)
        return jnp.mean(loss) - 0.1 * jnp.mean(entropy)

    graph, axes = graph_of(CONFIG), logical_axes(CONFIG)
    learner = Learner(
        graph, placement(), optax.sgd(1.0), settings, compute_dtype=jnp.float32, logit_chunk=16, remat=False
    )
    params = jax.device_put(PARAMS, learner.placement.shardings(axes, PARAMS))
    gradient, metrics = learner.gradient(params, [Bundle(None, (batch,), (0,))], None)
    value, slope = jax.value_and_grad(expected)(jax.tree.map(jnp.asarray, PARAMS))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert optax.tree.norm(slope) > 1e-2
    chex.assert_trees_all_close(jax.device_get(gradient), jax.device_get(slope), rtol=1e-4, atol=1e-6)


# --- at load


def edited(directory, rows=None, generation=None):
    """A copy of the quickstart model, whose tokenizer has ids 0 to 15, with another embedding."""
    shutil.copytree(QUICKSTART_MODEL, directory)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if rows is not None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        tensors = load_file(directory / "model.safetensors")
        table = tensors["model.embed_tokens.weight"]
        more = 3 * np.random.default_rng(0).normal(size=(max(0, rows - len(table)), table.shape[1]))
        table = np.concatenate([table, more.astype(table.dtype)])[:rows]
        tensors["model.embed_tokens.weight"] = np.ascontiguousarray(table)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_model_knows_which_ids_its_tokenizer_has(tmp_path):
    assert open_model("quickstart").config.known_ids == ()
    assert open_model(str(edited(tmp_path / "more", rows=32))).config.known_ids == ((0, 16),)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 12}, r"has 4 id\(s\) that the embedding's 12 rows .* lack, such as '.*' \(12\)"),
        ({"generation": {"eos_token_id": 99}}, "end token 99 is none of the tokenizer's 16 ids"),
        ({"rows": 32, "generation": {"eos_token_id": [1, 20]}}, "end token 20 is none"),
        ({"generation": {"eos_token_id": 1, "pad_token_id": 16}}, "pad_token_id 16 is beyond"),
    ],
    ids=["fewer rows", "end token beyond", "end token unknown", "padding beyond"],
)
def test_ids_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        open_model(str(edited(tmp_path / "model", **change)))


def test_a_padding_token_of_minus_one_is_none(tmp_path):
    open_model(str(edited(tmp_path / "model", generation={"eos_token_id": 1, "pad_token_id": -1})))


def test_an_answer_has_no_tokens_that_vanish_in_its_text(tmp_path):
    """Of a model whose unknown ids are the likely ones: as many characters as tokens."""
    model = edited(tmp_path / "model", rows=32)
    asked = [f"--model={model}", "--raw", "--prompt=347+285=", "--temperature=1", "--max_new_tokens=8"]
    done = call("generate", *asked, "--compute_dtype=float32")
    assert done.returncode == 0, done.stderr
    tokens = int(done.stderr.rsplit("\n", 2)[-2].split()[0])
    ended = "cut before the end" not in done.stderr
    assert len(done.stdout.rstrip("\n")) == tokens - ended
