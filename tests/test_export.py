"""Exports: a Hugging Face directory that holds exactly what was trained, whole or not at all."""

import json
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import TINY, call, logits, placed, read, tiny_params, write

from fr3e_jax.export import main
from fr3e_jax.learner.groups import empty_groups
from fr3e_jax.learner.state import TrainState
from fr3e_jax.models.hf import config_json, read_config
from fr3e_jax.parallel.mesh import make_mesh
from fr3e_jax.pretrained import export, write_weights
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.model import open_model
from fr3e_jax.run.checkpoints import Checkpoints
from fr3e_jax.run.saved import Progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory as training leaves it: config.yaml, and checkpoints of the steps 1 and 3, sharded.

    Returns (the directory, the parameters of each step).
    """
    directory = tmp_path_factory.mktemp("runs") / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text("model:\n  path: quickstart\n")
    model = open_model("quickstart").place(make_mesh(2, 2, 2))
    params = model.read_params(model.training)
    saved = {}
    writer = Checkpoints(directory, keep=5)
    for step in (1, 3):
        params = jax.tree.map(lambda x, step=step: x + 0.001 * step * jnp.cos(x), params)
        saved[step] = jax.device_get(params)
        writer.save(
            TrainState(params, {"count": jnp.int32(step)}), empty_groups(2, 3, 4), Progress(step=step)
        )
    writer.close()
    return directory, saved


def exported(directory, out, *flags):
    done = call("export", "--run", directory, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_last_checkpoint_is_written_bit_for_bit_on_any_mesh(trained, tmp_path):
    directory, saved = trained
    said = exported(directory, tmp_path / "out")
    assert "step 3" in said and str(tmp_path / "out") in said
    chex.assert_trees_all_equal(jax.device_get(read(tmp_path / "out", (1, 8, 1))), saved[3])


def test_an_older_checkpoint_in_bfloat16_and_small_files(trained, tmp_path):
    directory, saved = trained
    exported(directory, tmp_path / "out", "--step=1", "--dtype=bfloat16", "--max_file_gb=0.0005")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), saved[1])
    chex.assert_trees_all_equal(jax.device_get(read(tmp_path / "out", dtype=jnp.bfloat16)), rounded)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 4
    assert max(sum(x.nbytes for x in load_file(file).values()) for file in files) <= 500_000
    index = json.loads((tmp_path / "out" / write_weights.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(saved[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_an_export_and_gives_the_same_logits(trained, tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory, _ = trained
    out = tmp_path / "out"
    exported(directory, out, f"--dtype={dtype}", "--max_file_gb=0.001")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == getattr(torch, dtype)
    assert theirs.generation_config.eos_token_id == 1 and theirs.generation_config.pad_token_id == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    token = np.array([tokenizer.encode("347+285=7+5+0=12,1;", add_special_tokens=False)])
    with torch.no_grad():
        expected = theirs.to(torch.float32)(torch.tensor(token)).logits.numpy()
    np.testing.assert_allclose(logits(read_config(out), read(out), token), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=2"], "no checkpoint of step 2; it holds those of steps 1, 3"),
        (["--run=/nowhere"], "/nowhere is not a run directory"),
        (["--max_file_gb=0"], "max_file_gb"),
        (["--dtype=float16"], "dtype"),
        (["--mesh.data=3"], "does not cover"),
        (["--model=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(trained, tmp_path, monkeypatch, capsys, flags, message):
    given = ["--run", str(trained[0]), "--out", str(tmp_path / "out"), *flags]
    assert message in refused(monkeypatch, capsys, given)
    assert not (tmp_path / "out").exists()


def test_a_run_may_be_named_as_a_model(trained, tmp_path):
    directory, saved = trained
    assert "step 3" in exported_model(directory, tmp_path / "out")
    chex.assert_trees_all_equal(jax.device_get(read(tmp_path / "out")), saved[3])


def test_a_hugging_face_directory_or_a_name_is_written_bit_for_bit(tmp_path):
    source = find_model("quickstart")
    expected = jax.device_get(read(source))
    for number, name in enumerate(("quickstart", str(source))):
        out = tmp_path / str(number)
        assert exported_model(name, out, "--max_file_gb=0.001").startswith(name)
        chex.assert_trees_all_equal(jax.device_get(read(out)), expected)
        assert (out / write_weights.INDEX_FILE).is_file()
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--run or --model says what to write"),
        (["--model=quickstart", "--step=1"], "--step is for runs"),
        (["--model=not a name"], "not a name"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    assert message in refused(monkeypatch, capsys, ["--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def exported_model(name, out, *flags):
    """What `export --model` prints."""
    done = call("export", "--model", name, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_lies_in_out_is_never_overwritten(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "mine.txt"):
        error = refused(monkeypatch, capsys, ["--run", str(trained[0]), "--out", str(out)])
        assert "choose another" in error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_another_model_than_the_run_trained_is_refused(trained, tmp_path, monkeypatch, capsys):
    other = write(tmp_path / "other", TINY, tiny_params())
    flags = ["--run", str(trained[0]), "--out", str(tmp_path / "out"), "--model", str(other)]
    assert "is not the model" in refused(monkeypatch, capsys, flags)


def test_where_nothing_can_be_written_is_refused_before_anything_is_read(
    trained, tmp_path, monkeypatch, capsys
):
    """The working directory, below a file, beside what a kill left."""
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "killed.tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, message in (
        (".", "a directory in it"),
        ("../file/out", "cannot be written"),
        ("../killed", "killed.tmp"),
    ):
        assert message in refused(monkeypatch, capsys, ["--run", str(trained[0]), "--out", out])


def test_an_export_through_a_link_replaces_what_it_points_to(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    exported(trained[0], tmp_path / "link")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_damaged_run_config_is_refused_unless_the_model_is_named(trained, tmp_path, monkeypatch, capsys):
    directory = shutil.copytree(trained[0], tmp_path / "run")
    (directory / "config.yaml").write_text("model: [")
    flags = ["--run", str(directory), "--out", str(tmp_path / "out")]
    assert "damaged" in refused(monkeypatch, capsys, flags)
    exported(directory, tmp_path / "out", "--model=quickstart")


def test_a_run_without_checkpoints_says_so_and_gets_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("model:\n  path: quickstart\n")
    error = refused(monkeypatch, capsys, ["--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no checkpoint yet" in error
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def refused(monkeypatch, capsys, flags):
    """The one line of a refusal."""
    monkeypatch.setattr(sys, "argv", ["export", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert ended.value.code == 2
    assert out == "" and len(error.splitlines()) == 1
    return error


# --- the directory


@pytest.fixture
def source(tmp_path):
    """A checkpoint directory with everything that people keep in one."""
    directory = write(tmp_path / "source", TINY, tiny_params(), max_file_bytes=20_000)
    shutil.copy(find_model("quickstart") / "tokenizer.json", directory)
    (directory / "LICENSES").mkdir()
    for name in ("chat_template.jinja", "LICENSE", "merges.txt", "vocab.json", "tokenizer_config.json"):
        (directory / name).write_text("{}" if name.endswith(".json") else f"this is {name}")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "modeling_x.py",
        "README.md",
        "x.gguf",
        "trainer_state.json",
    ):
        (directory / name).write_text("not part of a model")
    return directory


def held(directory, name):
    return json.loads((directory / name).read_text())


def test_an_export_holds_what_a_model_needs_and_nothing_else(source, tmp_path):
    export_model(source, tmp_path / "out", placed(tiny_params(), TINY, (2, 2, 2)), jnp.bfloat16)
    description = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    description |= {"chat_template.jinja", "LICENSE", "merges.txt", "vocab.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == description
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert held(tmp_path / "out", "config.json") == config_json(TINY, [1], 0, None, "bfloat16")
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "out").iterdir())


def test_an_export_that_fails_leaves_the_old_one(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_model(source, out, placed(tiny_params(), TINY))
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(write_weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(source, out, placed(tiny_params(scale=1.0), TINY))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not export.temporary_beside(out).exists()
    monkeypatch.undo()
    export.temporary_beside(out).mkdir()  # a kill leaves this
    export_model(source, out, placed(tiny_params(scale=1.0), TINY))
    chex.assert_trees_all_equal(jax.device_get(read(out)), tiny_params(scale=1.0))
    assert not export.temporary_beside(out).exists()
