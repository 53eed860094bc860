"""The warm-up command, and what the shipped model learned by it: a bad habit at known places."""

import jax
import numpy as np
import pytest
from flax import nnx
from support import call, placement, read, run

from fr3e_jax.algorithm.positions import positions_of
from fr3e_jax.algorithm.trajectories import Trajectories
from fr3e_jax.cli import parse
from fr3e_jax.config import ConfigError, DataConfig, SFTConfig
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling, row_key
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.models.hf import read_config
from fr3e_jax.models.presets import small
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.pretrained.tokenizer import end_tokens
from fr3e_jax.problems.additions import make_addition
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.sft import check_sft

PROBLEMS, ROLLOUTS, MAX_RESPONSE, K = 64, 4, 40, 2


def test_the_command_writes_a_model_that_training_can_start_from(tmp_path):
    shape = "--hidden_size=32 --num_hidden_layers=2 --intermediate_size=32".split()
    flags = ["--steps=3", "--warmup_steps=1", "--batch=8", *shape]
    done = run("sft", *flags, "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "model in" in done.stdout
    config = read_config(tmp_path / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (32, 2, True)
    params = read(tmp_path / "model")
    graph = graph_of(config)
    text = load_text(tmp_path / "model", "plain")
    assert text.end_tokens == (text.tokenizer.eos_token_id,)
    # It has learned something in three steps: the parameters are not those it was drawn with.
    assert float(np.abs(nnx.merge(graph, params).norm.scale[...] - 1).max()) > 0
    # And goes on from a directory.
    again = call("sft", *flags, "--init_path", tmp_path / "model", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert read_config(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.source=word_addition"], "no worked solutions"),
        (["--max_position_embeddings=20"], "max_position_embeddings 20"),
        (["--init_path=/nowhere"], "/nowhere"),
        (["--hidden_size=33"], "hidden_size"),
        (["--warmup_steps=9"], "warmup_steps is 9, must be below steps, which is 1; lower it"),
        (["--num_attention_heads=0"], "num_attention_heads"),
        (["--num_key_value_heads=0"], "num_key_value_heads"),
        (["--seed=-1"], "seed"),
    ],
)
def test_impossible_settings_are_one_line_and_exit_code_2(tmp_path, flags, message):
    refused = call("sft", "--steps=1", "--warmup_steps=0", *flags, "--out", tmp_path / "model")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_few_steps_need_no_other_flag():
    """The warm-up that nobody asked for is shortened, and is what it was for longer runs."""
    for steps, warmup in ((1, 0), (4, 1), (10, 2), (80, 20), (300, 20), (400, 20)):
        config, _ = parse(SFTConfig, "sft", "configs/quickstart_sft.yaml", [f"--steps={steps}"])
        check_sft(config, 1)
        assert config.warmup == warmup
    with pytest.raises(ConfigError, match="warmup_steps is 20, must be below steps, which is 10"):
        check_sft(SFTConfig(steps=10, warmup_steps=20), 1)


def test_a_directory_with_files_in_it_is_never_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "mine.txt"):
        refused = call("sft", "--steps=1", "--warmup_steps=0", "--out", out)
        assert refused.returncode == 2
        assert "choose another" in refused.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_the_shipped_config_says_how_the_shipped_model_was_made():
    config, _ = parse(SFTConfig, "sft", "configs/quickstart_sft.yaml", [])
    shipped = find_model("quickstart")
    vocabulary = len(load_text(shipped, "plain").tokenizer)
    assert read_config(shipped) == small(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocab=vocabulary,
        context=config.max_position_embeddings,
    )


@pytest.fixture(scope="module")
def rollouts():
    """Base trajectories of the shipped model on held-out problems."""
    directory = find_model("quickstart")
    config = read_config(directory)
    text, task = load_text(directory, "plain"), make_addition("carry_addition", DataConfig())
    engine = Engine(graph_of(config), placement(8, 1, 1, SAMPLING_TABLE), MAX_RESPONSE, end_tokens(directory))
    hosts = Hosts(engine.placement.mesh, 1)
    queries = QueryStream(None, text, 8, hosts).encode(task.held_out(PROBLEMS))
    sampled, _ = engine.sample(
        read(directory, (8, 1, 1)),
        engine.placement.place_rows(queries),
        jax.random.key(0),
        0,
        ROLLOUTS,
        Sampling(),
    )
    return text, jax.device_get(sampled)


def decision_points(response):
    """Positions of carries between columns that may be forgotten: `...=12,` is followed by 1 or 0."""
    columns = response.split(";")[:2]  # the last column's carry is never forgotten
    places, start = [], 0
    for column in columns:
        total, comma, _ = column.partition("=")[2].partition(",")
        if comma and len(total) == 2:
            places.append(start + column.index(",") + 1)
        start += len(column) + 1
    return places


def test_entropy_finds_the_decision_points_and_random_positions_do_not(rollouts):
    text, sampled = rollouts
    flat = jax.tree.map(lambda x: x.reshape(PROBLEMS * ROLLOUTS, *x.shape[2:]), sampled)
    responses = text.decode([t[:n] for t, n in zip(flat.token, flat.length, strict=True)])
    known = [decision_points(response) for response in responses]
    keys = jax.vmap(row_key, (None, None, 0, None))(jax.random.key(1), 0, np.arange(len(known)), 0)
    share = {}
    for rule in ("entropy", "surprisal", "random", "uniform"):
        base = Trajectories(flat.entropy, flat.logprob, flat.length, keys, count=K, min_gap=0)
        position, valid = positions_of(rule, base)
        chosen = [set(p[v].tolist()) for p, v in zip(np.asarray(position), np.asarray(valid), strict=True)]
        hit = sum(len(set(places) & picks) for places, picks in zip(known, chosen, strict=True))
        share[rule] = hit / sum(len(places) for places in known)
    assert sum(map(len, known)) > 100
    assert share["entropy"] > 0.95
    assert share["entropy"] > 5 * max(share["random"], share["uniform"])


def test_the_shipped_model_knows_both_ways_and_prefers_the_wrong_one(rollouts):
    text, sampled = rollouts
    kept = []
    for token, length in zip(
        sampled.token.reshape(-1, MAX_RESPONSE), sampled.length.reshape(-1), strict=True
    ):
        (response,) = text.decode([token[:length]])
        kept += [response[place] == "1" for place in decision_points(response)]
    assert 0.25 < np.mean(kept) < 0.5  # trained on 40%
