"""Exports describe what a run used, and transformers 4 and 5 read the same of them."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from environment import REPOSITORY
from support import logits, read, tiny_params, write
from texts import TEXTS

from fr3e_jax.models.hf import read_config
from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.pretrained.export import copy_description, export_model
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.pretrained.tokenizer import end_tokens

OLD = "4.57.6"  # the last transformers before 5
QWEN = REPOSITORY / "tests" / "qwen2.5_tokenizer_cut"
QWEN_SHAPE = Qwen2Config(151_666, 16, 32, 2, 2, 1, 8, 128, 1e6, 1e-6, True)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.2}
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def edited(directory, name, drop=(), **changes):
    """Change and take out fields of a JSON file."""
    file = directory / name
    raw = json.loads(file.read_text()) if file.exists() else {}
    kept = {key: value for key, value in (raw | changes).items() if key not in drop}
    file.write_text(json.dumps(kept, ensure_ascii=False))


def as_5_writes(directory, **rope):
    """The rotation and the type in the words of transformers 5 alone."""
    edited(directory, "config.json", ("rope_theta", "rope_scaling", "torch_dtype"), rope_parameters=rope)


def quickstart(directory):
    """The shipped model as transformers 5 writes its tokenizer."""
    shutil.copytree(find_model("quickstart"), directory)
    (directory / "generation_config.json").unlink()
    drop = ("added_tokens_decoder", "model_input_names", "bos_token", "unk_token")
    edited(
        directory, "tokenizer_config.json", drop, tokenizer_class="TokenizersBackend", backend="tokenizers"
    )
    return directory


def rope_parameters_alone(directory):
    quickstart(directory)
    as_5_writes(directory, rope_type="default", rope_theta=1e6)


def yarn_in_rope_parameters(directory):
    quickstart(directory)
    as_5_writes(directory, rope_theta=5e4, **YARN)


def end_token_in_config(directory):
    quickstart(directory)
    edited(directory, "generation_config.json", ("eos_token_id",), pad_token_id=0)


def sampling_settings(directory):
    quickstart(directory)
    edited(directory, "generation_config.json", eos_token_id=[1, 9], **SAMPLING)


def qwen_of_5(directory):
    """Qwen's tokenizer as transformers 5 saves it: a list of extra tokens, the template in a file."""
    write(directory, QWEN_SHAPE, tiny_params(QWEN_SHAPE))
    shutil.copytree(QWEN, directory, dirs_exist_ok=True)
    held = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "chat_template.jinja").write_text(held["chat_template"])
    drop = ("chat_template", "additional_special_tokens", "added_tokens_decoder")
    extra = {"extra_special_tokens": held["additional_special_tokens"], "backend": "tokenizers"}
    edited(directory, "tokenizer_config.json", drop, **extra)
    edited(directory, "config.json", pad_token_id=151_643, eos_token_id=151_645)
    edited(directory, "generation_config.json", eos_token_id=[151_645, 151_643], **SAMPLING)


def llama_that_begins_texts(directory):
    """As transformers 5 saves a Llama: what a text begins with is said in tokenizer_config.json alone."""
    shape = Qwen2Config(151_666, 16, 32, 2, 2, 1, 8, 128, 1e6, 1e-6, True, qkv_bias=False)
    write(directory, shape, tiny_params(shape))
    shutil.copytree(QWEN, directory, dirs_exist_ok=True)
    begins = {"add_bos_token": True, "bos_token": "<|im_start|>", "tokenizer_class": "TokenizersBackend"}
    edited(directory, "tokenizer_config.json", **begins)
    edited(directory, "config.json", pad_token_id=-1, eos_token_id=151_645)


SOURCES = {
    make.__name__: make
    for make in (quickstart, rope_parameters_alone, yarn_in_rope_parameters, end_token_in_config,
                 sampling_settings, qwen_of_5, llama_that_begins_texts)
}  # fmt: skip


@pytest.fixture(params=SOURCES)
def described(request, tmp_path):
    """(a source, the description of an export of it)."""
    source, out = tmp_path / "source", tmp_path / "out"
    SOURCES[request.param](source)
    out.mkdir()
    copy_description(source, out, jnp.float32)
    return source, out


def held(directory, name):
    return json.loads((directory / name).read_text())


def rope_of_4(raw):
    """Base and scaling as transformers 4.57 takes them from config.json."""
    return raw.get("rope_theta", 10_000.0), raw.get("rope_scaling")


def rope_of_5(raw):
    """Base and scaling as transformers 5 takes them (convert_rope_params_to_dict)."""
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10_000.0))
    return theta, None if rope.get("rope_type", "default") == "default" else rope


def test_both_versions_find_the_rotation_of_the_run_in_config_json(described):
    source, out = described
    used, raw = read_config(source), held(out, "config.json")
    assert rope_of_4(raw) == rope_of_5(raw)
    theta, scaling = rope_of_4(raw)
    assert theta == used.rope_theta
    if used.yarn is None:
        assert scaling is None
    else:
        assert scaling["rope_type"] == "yarn" and scaling["factor"] == used.yarn.factor == 4.0
        assert scaling["attention_factor"] == 1.2 and scaling["original_max_position_embeddings"] == 32
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    assert read_config(out) == used
    # What transformers 5 makes of it.
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(out).rope_parameters
    assert theirs["rope_theta"] == theta and theirs["rope_type"] == (scaling or {}).get(
        "rope_type", "default"
    )


def test_an_export_ends_answers_as_the_run_and_samples_as_nobody(described):
    source, out = described
    ends, generation = end_tokens(source), held(out, "generation_config.json")
    found = generation["eos_token_id"]
    assert tuple(found if isinstance(found, list) else [found]) == ends == end_tokens(out)
    assert generation.keys() <= {"eos_token_id", "pad_token_id", "do_sample"}
    assert generation["do_sample"] is False
    assert held(out, "config.json")["eos_token_id"] == found
    assert 0 <= generation.get("pad_token_id", 0) < read_config(out).vocab_size


def test_a_tokenizer_of_an_export_is_the_runs_in_both_versions(described):
    source, out = described
    raw = held(out, "tokenizer_config.json")
    assert raw["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")  # both know these
    # Version 4 takes a mapping alone, knows no other name, and would add token_type_ids.
    assert not isinstance(raw.get("extra_special_tokens"), list) and "backend" not in raw
    assert raw["model_input_names"] == ["input_ids", "attention_mask"]
    before, after = load_text(source, "plain").tokenizer, load_text(out, "plain").tokenizer
    for line in [*TEXTS, "347+285=", "<|im_start|>1<|vision_pad|>"]:
        ids = before(line)["input_ids"]
        assert after(line)["input_ids"] == ids
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert (after.eos_token, after.pad_token, after.bos_token, after.unk_token, len(after)) == (
        before.eos_token, before.pad_token, before.bos_token, before.unk_token, len(before)
    )  # fmt: skip
    assert after.chat_template == before.chat_template
    assert set(after.all_special_tokens) == set(before.all_special_tokens)
    # What version 5 takes from tokenizer_config.json alone is in tokenizer.json, which version 4 reads too.
    assert (
        after.backend_tokenizer.from_file(str(out / "tokenizer.json")).encode("1").ids
        == before("1")["input_ids"]
    )


def test_no_code_and_no_other_place_of_special_tokens_is_carried_on(tmp_path):
    """Version 4 cannot read special_tokens_map.json of 5, and added_tokens.json is a third place."""
    source, out = quickstart(tmp_path / "source"), tmp_path / "out"
    edited(source, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    edited(source, "special_tokens_map.json", extra_special_tokens=["<more>"])
    edited(source, "config.json", use_cache=False, _name_or_path="/home/me/x", transformers_version="5.1.0")
    out.mkdir()
    copy_description(source, out, jnp.float32)
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    raw, config = held(out, "tokenizer_config.json"), held(out, "config.json")
    assert "auto_map" not in raw and raw["additional_special_tokens"] == ["<more>"]
    assert config["use_cache"] is True and not {"_name_or_path", "transformers_version"} & config.keys()


def test_the_shipped_model_is_described_as_an_export_of_it(tmp_path):
    model = find_model("quickstart")
    copy_description(model, tmp_path, jnp.float32)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (model / file.name).read_bytes(), file.name


# --- both versions, in environments of their own


@pytest.fixture(scope="module")
def old_version(tmp_path_factory):
    """A folder with transformers 4.57 and what it needs, to put before what is installed."""
    folder = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, f"transformers=={OLD}"]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        pytest.skip(f"needs a network, for transformers {OLD}")
    if done.returncode:
        pytest.skip(f"needs pip and a network, for transformers {OLD}")
    return folder


def told(wanted, tmp_path, *path):
    """What one version of transformers reads of directories."""
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    reader = [sys.executable, REPOSITORY / "tests" / "exported.py", tmp_path / "wanted.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(reader, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_both_versions_read_the_same_model_end_tokens_template_and_texts(old_version, tmp_path):
    pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    token = list(range(2, 14)) * 4
    wanted, expected, text_of = {}, {}, {}
    for name, make in SOURCES.items():
        source, out = tmp_path / name, str(tmp_path / f"{name}-export")
        make(source)
        params = read(source)
        export_model(source, tmp_path / f"{name}-export", params)
        expected[out] = logits(read_config(source), params, np.array([token]))[0]
        text = text_of[out] = load_text(source, "plain")
        chats = text.tokenizer.chat_template is not None
        # Version 5 takes every tokenizer of a Qwen2 model for Qwen's: one token a character is read alike
        # within its alphabet.
        texts = (
            TEXTS[:10] if chats else ["".join(map(str, [i, "+", 7 * i, "=", 8 * i, ",;"])) for i in range(10)]
        )
        messages = [{"role": "user", "content": "What is 17 + 25?"}] if chats else None
        wanted[out] = {"token": token, "texts": texts, "messages": messages}
    new, old = told(wanted, tmp_path), told(wanted, tmp_path, old_version)
    assert old["version"] == OLD and new["version"].startswith("5.")
    for found in (new["read"], old["read"]):
        for out, text in text_of.items():
            it, asked = found[out], wanted[out]
            np.testing.assert_allclose(it["logits"], expected[out], atol=2e-4, err_msg=out)
            assert tuple(it["ends"]) == tuple(it["config ends"]) == text.end_tokens
            assert set(it["changed"]) <= {"eos_token_id", "pad_token_id", "do_sample", "transformers_version"}
            ids = text.tokenizer(asked["texts"])["input_ids"]
            assert it["encoded"] == [ids, ids]
            assert it["words"] == [len(text.tokenizer)] * 2
            if asked["messages"]:
                seen = text.tokenizer.apply_chat_template(
                    asked["messages"], add_generation_prompt=True, tokenize=False
                )
                assert it["template"] == [seen, seen]
    assert new["read"].keys() == old["read"].keys()
    for out in wanted:
        assert new["read"][out]["generated"] == old["read"][out]["generated"]
