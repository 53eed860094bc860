"""SmolLM2-135M-Instruct through the whole program: `pytest -m real_model`.

Needs a Qwen2 checkpoint of it: in the directory that FR3E_SMOLLM2 names, or made of a package by smollm2.py.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from smollm2 import make_smollm2
from support import logits, placement, read, run
from texts import TEXTS

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.models.hf import read_config
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.types import Queries

pytestmark = [pytest.mark.real_model, pytest.mark.optimised]

WIDTH, NEW = 96, 24


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if directory := os.environ.get("FR3E_SMOLLM2"):
        return Path(directory)
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def llama(smollm2, tmp_path_factory):
    """The same model as what it is, a Llama without biases."""
    directory = tmp_path_factory.mktemp("llama")
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(smollm2 / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("bias")}, directory / "model.safetensors")
    return directory


@functools.cache
def torch_model(directory, dtype="float32"):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


@functools.cache
def expected_logits(directory, dtype="float32"):
    """torch's logits of every text alone, float32."""
    model = torch_model(directory, dtype)
    import torch

    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows_of(directory)]


def rows_of(directory):
    text = load_text(directory, "plain")
    return [text.query(line) for line in TEXTS]


def batch(rows, side):
    """(tokens, start, length) of rows padded on one side."""
    size = np.array([len(row) for row in rows])
    token = np.zeros((len(rows), WIDTH), np.int32)
    for i, row in enumerate(rows):
        token[i, slice(None, len(row)) if side == "right" else slice(WIDTH - len(row), None)] = row
    zero = np.zeros_like(size)
    return (token, zero, size) if side == "right" else (token, WIDTH - size, zero + WIDTH)


@functools.cache
def our_logits(directory, side="right", dtype="float32", precision=None):
    """Ours of every text, in one batch."""
    token, start, length = batch(rows_of(directory), side)
    with jax.default_matmul_precision(precision):
        params = read(directory, dtype=jnp.dtype(dtype))
        found = logits(read_config(directory), params, token, length, start)
    return [row[i:j] for row, i, j in zip(found, start, length, strict=True)]


def distances(ours, theirs):
    return [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_float32_logits_equal_torchs_at_every_position(smollm2, side):
    """Matrix products of float32 numbers are summed in float64 here: XLA's kernels for CPUs round twice as
    much as torch's, which alone makes up to 3e-4 on one of these texts (the next test)."""
    ours = our_logits(smollm2, side, precision="F64_F64_F64")
    for line, distance in zip(TEXTS, distances(ours, expected_logits(smollm2)), strict=True):
        assert distance.max() < 2e-4, (line, distance.max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_float32_logits_with_the_kernels_of_this_machine_are_off_by_their_rounding(smollm2, side):
    found = distances(our_logits(smollm2, side), expected_logits(smollm2))
    assert max(distance.max() for distance in found) < 5e-4
    assert np.mean([distance.mean() for distance in found]) < 3e-5


def test_rows_of_a_batch_equal_the_rows_alone(smollm2):
    config, params = read_config(smollm2), read(smollm2)
    for side in ("left", "right"):
        for i in (0, 4, 13):
            alone = logits(config, params, np.array([rows_of(smollm2)[i]]))[0]
            np.testing.assert_allclose(our_logits(smollm2, side)[i], alone, atol=2e-4)


def test_a_llama_is_read_as_it_is(smollm2, llama):
    """Without biases, and with the logits of transformers' Llama."""
    assert not read_config(llama).qkv_bias
    theirs = torch_model(llama)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    import torch

    for i in (0, 3):
        row = rows_of(smollm2)[i]
        with jax.default_matmul_precision("F64_F64_F64"):
            ours = logits(read_config(llama), read(llama), np.array([row]))[0]
        with torch.no_grad():
            expected = theirs(torch.tensor([row])).logits[0].numpy()
        assert np.abs(ours - expected).max() < 2e-4


def test_bfloat16_is_within_the_spread_of_torchs_bfloat16(smollm2):
    """Over all texts: not farther from torch in float32 than torch in bfloat16 is."""
    exact = expected_logits(smollm2)
    ours = distances(our_logits(smollm2, dtype="bfloat16"), exact)
    theirs = distances(expected_logits(smollm2, "bfloat16"), exact)
    assert np.mean([x.mean() for x in ours]) < np.mean([x.mean() for x in theirs])
    assert max(x.max() for x in ours) < max(x.max() for x in theirs)


def test_greedy_continuations_equal_generate(smollm2):
    import torch

    rows, model = rows_of(smollm2), torch_model(smollm2)
    token, _, length = batch(rows, "right")
    engine = Engine(graph_of(read_config(smollm2)), placement(table=SAMPLING_TABLE), NEW, end_tokens=())
    index = np.arange(len(rows), dtype=np.int32)
    queries = engine.placement.place_rows(Queries(token, length.astype(np.int32), index))
    ours, _ = engine.sample(read(smollm2), queries, jax.random.key(0), 0, 1, GREEDY)
    for i, row in enumerate(rows):
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        expected = model.generate(torch.tensor([row]), **settings)[0, len(row) :]
        np.testing.assert_array_equal(ours.token[i, 0], expected.numpy(), err_msg=TEXTS[i])


def test_an_export_of_real_weights_gives_them_back(smollm2, tmp_path):
    """bfloat16 weights, read as float32 on eight devices and written as bfloat16: bit for bit."""
    params = read(smollm2, (2, 4, 1))
    export_model(smollm2, tmp_path / "out", params, jnp.bfloat16, 100 * 10**6)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: x for file in files for name, x in load_file(file).items()}
    theirs = load_file(smollm2 / "model.safetensors")
    assert written.keys() == theirs.keys()
    assert all((written[name] == theirs[name]).all() for name in theirs)
    text, again = load_text(smollm2, "chat"), load_text(tmp_path / "out", "chat")
    assert text.query(TEXTS[0]) == again.query(TEXTS[0]) and text.end_tokens == again.end_tokens


def test_the_generate_command_answers(smollm2):
    done = run("generate", f"--model={smollm2}", "--prompt=What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"


def test_one_step_on_a_real_model(smollm2, tmp_path):
    flags = "--steps=1 --rollout.queries=2 --optimizer.batch_states=2 --optimizer.minibatches=1".split()
    done = run(
        "train",
        "--config=configs/smollm2_135m.yaml",
        f"--model.path={smollm2}",
        *flags,
        "--optimizer.micro_tokens=1024",
        "--data.held_out=8",
        "--evaluate.rows=8",
        f"--run_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    (_, step) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step["reward/root_mean"] < 1
    assert np.isfinite(step["update/loss"]) and step["update/grad_norm"] > 0
    assert step["update/abs_log_ratio"] < 1e-4  # one minibatch: sampler and learner see the same policy
