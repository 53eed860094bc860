"""The tokenizer of a checkpoint, and the special tokens that its files name."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError
from fr3e_jax.models.hf import read_json

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        raise ConfigError(f"{directory} holds no {TOKENIZER_FILE}")
    # Not AutoTokenizer: for model_type qwen2 it would force Qwen's own pre-tokenizer on every file.
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the library's own, of no common class
        raise ConfigError(f"the tokenizer of {directory} cannot be read: {error}") from None


def known_ids(directory: Path, vocabulary: int) -> tuple[tuple[int, int], ...]:
    """The ids of a checkpoint's tokenizer as the decoder takes them, ranges [first, end).

    Args:
      directory: of the checkpoint.
      vocabulary: rows of the embedding.

    Returns:
      The ranges; () if the tokenizer has all ids of the vocabulary, or if the directory has no tokenizer.

    Raises:
      ConfigError: the embedding lacks ids of the tokenizer or the padding token, or the tokenizer lacks an
        end token.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        return ()
    names = {id: name for name, id in read_tokenizer(directory).get_vocab().items()}
    ids = np.array(sorted(names))
    if beyond := [f"{names[id]!r} ({id})" for id in ids[ids >= vocabulary].tolist()]:
        raise ConfigError(
            f"{directory}: the tokenizer has {len(beyond)} id(s) that the embedding's {vocabulary} rows "
            f"(vocab_size in config.json) lack, such as {', '.join(beyond[:3])}; use the tokenizer that the "
            "model was trained with, or resize the embedding"
        )
    unknown = [str(id) for id in end_tokens(directory) if id not in names]
    if unknown:
        raise ConfigError(
            f"{directory}: the end token {' and '.join(unknown)} is none of the tokenizer's {len(names)} "
            f"ids, so that it would end no answer; correct eos_token_id in {GENERATION_FILE} or config.json"
        )
    pad = pad_token(directory)
    if pad is not None and pad >= vocabulary:
        raise ConfigError(
            f"{directory}: pad_token_id {pad} is beyond the embedding's {vocabulary} rows; correct it in "
            f"{GENERATION_FILE} or config.json"
        )
    if len(ids) == vocabulary:
        return ()
    pieces = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)


def end_tokens(directory: Path) -> tuple[int, ...]:
    """The ids that end an answer: eos_token_id, one or several, as the checkpoint's files say.

    generation_config.json goes before config.json, as in transformers, and both before the tokenizer's
    eos_token.

    Raises:
      ConfigError: no file names an end token, or what it names is no id.
    """
    named = token_id(directory, "eos_token_id", "eos_token")
    if named is None:
        raise ConfigError(
            f"{directory} names no end token: eos_token_id is in neither {GENERATION_FILE} nor config.json, "
            "and tokenizer_config.json has no eos_token"
        )
    ids = named if isinstance(named, list) else [named]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id of {directory} is {named!r}, must be an id or a list of ids")
    return tuple(ids)


def pad_token(directory: Path) -> int | None:
    """The id of the padding token that the checkpoint's files name, or None.

    Nothing here is padded with it, since masks come from lengths. It is written into exports for others.
    """
    return one_id(directory, "pad_token_id", "pad_token")


def begin_token(directory: Path) -> int | None:
    """The id of the token that begins a text, as the checkpoint's files name it, or None.

    No text here begins with it. It is written into exports for others.
    """
    return one_id(directory, "bos_token_id", "bos_token")


def one_id(directory: Path, id_field: str, token_field: str) -> int | None:
    """An id that the checkpoint's files name; None if they name none, or something that is no id."""
    named = token_id(directory, id_field, token_field)
    return named if type(named) is int and named >= 0 else None  # -1 says that there is none


def token_id(directory: Path, id_field: str, token_field: str) -> Any:
    """An id, or ids, from the first file that names it; None if no file does.

    Args:
      id_field: of generation_config.json and config.json.
      token_field: of tokenizer_config.json, whose text is looked up in the vocabulary.
    """
    for name in (GENERATION_FILE, "config.json"):
        if (directory / name).is_file() and (named := read_json(directory / name).get(id_field)) is not None:
            return named
    token = read_tokenizer_config(directory).get(token_field)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    return Tokenizer.from_file(str(directory / TOKENIZER_FILE)).token_to_id(token)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """The fields of a checkpoint's tokenizer_config.json; {} if there is no such file."""
    file = directory / TOKENIZER_CONFIG
    return read_json(file) if file.is_file() else {}


MOST_CHARACTERS = 200  # that a tokenizer has tokens for; of more it has one for each byte
SPECIAL = ["<pad>", "<eos>"]  # ids 0 and 1 of a new tokenizer


def new_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer for texts of these characters: a token for each, or for each byte where they are many.

    Ids 0 and 1 are `<pad>` and `<eos>`.
    """
    return character_tokenizer(alphabet) if len(alphabet) <= MOST_CHARACTERS else byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8, which can say every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast_tokenizer(tokenizer)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of an alphabet."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast_tokenizer(tokenizer)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers has it, with the special tokens of a new one."""
    pad, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, clean_up_tokenization_spaces=False
    )
