"""Corrupted checkpoints: each is refused with one clear line, or loads exactly as before. None loads wrong,
hangs, or ends without a message.

Not among them is a flipped bit in the numbers themselves that leaves a finite number: safetensors has no
checksum, and nothing can tell.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import struct

import chex
import jax
import numpy as np
import pytest
from support import TINY, read, tiny_params, write

from fr3e_jax.models.hf import config_json, read_config
from fr3e_jax.pretrained.safetensors_files import INDEX_FILE, CheckpointError

CONFIG = dataclasses.replace(TINY, num_hidden_layers=2, tie_word_embeddings=False)
PARAMS = tiny_params(CONFIG)
VALUES = [None, True, False, 0, -1, 1, 3, 1.5, "", "x", [], {}, [1], {"a": 1}, 2**20, 2**40, 2**63, 10**400,
          1e308, math.nan, math.inf, -math.inf]  # fmt: skip
# Fields of config.json that say nothing about what is computed.
HARMLESS = {"architectures", "attention_dropout", "initializer_range", "use_cache", "sliding_window",
            "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
            "original_max_position_embeddings"}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "model", CONFIG, PARAMS, max_file_bytes=30_000)


@pytest.fixture
def checkpoint(good, tmp_path):
    """A fresh copy, to spoil."""
    return shutil.copytree(good, tmp_path / "model")


@contextlib.contextmanager
def limited(seconds):
    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(directory):
    """(architecture, parameters), or the refusal."""
    with limited(30):
        try:
            return read_config(directory), jax.device_get(read(directory))
        except CheckpointError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1000, message
            assert str(directory) in message, message
            return message


def refused_or_unharmed(directory):
    """Whether it is refused; what loads must be what was written."""
    found = outcome(directory)
    if isinstance(found, str):
        return True
    assert found[0] == CONFIG
    chex.assert_trees_all_equal(found[1], PARAMS)
    return False


def header_of(file):
    """(header, the bytes behind it), by the format's definition."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(file, header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def spoil_bytes(rng, file, end):
    """One fault among the first `end` bytes."""
    data = bytearray(file.read_bytes())
    at = int(rng.integers(end))
    match rng.integers(4):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[at] = int(rng.integers(256))
        case 2:
            del data[at]
        case 3:
            data.insert(at, int(rng.integers(256)))
    file.write_bytes(data)


def few(often, every):
    """So many seeds by default, and the others of `every` marked slow."""
    seeds = [*range(often), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(often, every))]
    return pytest.mark.parametrize("seed", seeds)


@few(6, 12)
def test_faults_in_the_headers(checkpoint, good, seed):
    """Each time ten single-byte faults in the headers of weight files."""
    rng = np.random.default_rng((0, seed))
    refusals = 0
    for _ in range(10):
        file = sorted(checkpoint.glob("*.safetensors"))[rng.integers(4)]
        (size,) = struct.unpack("<Q", file.read_bytes()[:8])
        spoil_bytes(rng, file, 8 + size)
        refusals += refused_or_unharmed(checkpoint)
        shutil.copyfile(good / file.name, file)
    assert refusals > 5


@few(2, 4)
def test_faults_in_the_index(checkpoint, good, seed):
    """Each time ten single-byte faults in the index."""
    rng = np.random.default_rng((1, seed))
    file = checkpoint / INDEX_FILE
    for _ in range(10):
        spoil_bytes(rng, file, file.stat().st_size)
        refused_or_unharmed(checkpoint)
        shutil.copyfile(good / file.name, file)


@few(2, 4)
def test_truncated_and_lengthened_files(checkpoint, good, seed):
    """Each time ten files that are too short or too long; of weights, every one is refused."""
    rng = np.random.default_rng((2, seed))
    files = sorted(checkpoint.iterdir())
    for _ in range(10):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        cut = data[: rng.integers(len(data))] if rng.integers(3) else data + rng.bytes(1 + rng.integers(99))
        file.write_bytes(cut)
        assert refused_or_unharmed(checkpoint) or file.suffix == ".json"
        shutil.copyfile(good / file.name, file)


@few(4, 8)
def test_edited_headers(checkpoint, good, seed):
    """Each time five headers that are valid JSON and say something else; every one is refused."""
    rng = np.random.default_rng((3, seed))
    for _ in range(5):
        file = sorted(checkpoint.glob("*.safetensors"))[rng.integers(4)]
        header, rest = header_of(file)
        names = [name for name in header if name != "__metadata__"]
        name = names[rng.integers(len(names))]
        entry = header[name]
        match rng.integers(6):
            case 0:
                entry["dtype"] = ["I32", "U32", "F64", "BF16", "F8_E4M3", "BOOL", "f32", ""][rng.integers(8)]
            case 1:
                entry["shape"] = [*entry["shape"][::-1], 1]
            case 2:
                entry["data_offsets"][rng.integers(2)] += int(rng.choice([-4, 4, 2**40, -(2**40)]))
            case 3:
                del header[name]
            case 4:
                header[f"{name}.old"] = header.pop(name)
            case 5:
                header[name] = VALUES[rng.integers(len(VALUES))]
        put_header(file, header, rest)
        assert refused_or_unharmed(checkpoint)
        shutil.copyfile(good / file.name, file)


OTHERS = {"torch_dtype", "dtype", "layer_types", "rope_parameters", "auto_map", "quantization_config",
          "partial_rotary_factor", "mlp_bias", "original_max_position_embeddings"}  # fmt: skip
FIELDS = sorted({*config_json(CONFIG, [1], 0), *OTHERS})


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("field", FIELDS)
def test_edited_configs(checkpoint, field, share):
    """Every field of config.json as odd values. What loads has taken the value for what it is."""
    file = checkpoint / "config.json"
    raw = json.loads(file.read_text())
    for value in VALUES[FIELDS.index(field) % share :: share]:
        file.write_text(json.dumps(raw | {field: value}))
        found = outcome(checkpoint)
        if isinstance(found, str):
            assert field not in HARMLESS, found
            continue
        config, params = found
        chex.assert_trees_all_equal(params, PARAMS)
        if field in HARMLESS or value is None:
            assert {**dataclasses.asdict(config), field: 0} == {**dataclasses.asdict(CONFIG), field: 0}
        elif hasattr(CONFIG, field):
            assert (getattr(config, field) == value and type(value) is not bool) or value is False
        else:  # a switch of what is not supported: only its off position loads
            assert value == 1 if field == "partial_rotary_factor" else not value


def test_files_in_one_anothers_place(checkpoint):
    one, two = sorted(checkpoint.glob("*.safetensors"))[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert refused_or_unharmed(checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff" * 64,
        b"{}",
        b"null",
        b'{"__metadata__": 3}',
        b"",
        b'{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}',
    ],
    ids=range(8),
)
def test_headers_that_are_no_headers(checkpoint, header):
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    put_header(file, header, header_of(file)[1])
    assert refused_or_unharmed(checkpoint)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
def test_headers_that_lie_about_their_size(checkpoint, size):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    assert refused_or_unharmed(checkpoint)


def test_a_directory_or_a_broken_link_in_the_place_of_a_file(checkpoint):
    for name in ("config.json", INDEX_FILE, min(file.name for file in checkpoint.glob("*.safetensors"))):
        spoiled = shutil.copytree(checkpoint, checkpoint.with_name(f"spoiled {name}"))
        (spoiled / name).unlink()
        (spoiled / name).mkdir()
        assert refused_or_unharmed(spoiled)
        (spoiled / name).rmdir()
        (spoiled / name).symlink_to("/nowhere")
        assert refused_or_unharmed(spoiled)
