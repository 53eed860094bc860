"""Tokens <-> text: the tokenizer of a checkpoint, its end tokens, and prompt templates."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# Its advice that there is no torch is not for our users: only tokenizers are used of it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError
from fr3e_jax.models.hf import read_json

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATES = ("chat", "boxed_chat")
BOXED_TEMPLATES = ("boxed", "boxed_chat")
TEMPLATES = ("plain", "chat", *BOXED_TEMPLATES)
PLACE = "{question}"
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."  # paper


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with what a run needs of it.

    end_tokens: every token that ends an answer, from the checkpoint's files.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    template: str

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template that ends a turn as the model ends an answer.

        Tokenizers of base models have one too, whose turns their model does not end.
        """
        template, end = self.tokenizer.chat_template or "", self.tokenizer.eos_token
        return "eos_token" in template or (end is not None and end in template)

    def rendered(self, question: str) -> str:
        """What the model sees of a question, as text."""
        template = self.template
        if template in BOXED_TEMPLATES:
            question = f"{question}\n{INSTRUCTION}"
        elif template not in TEMPLATES:
            question = template.replace(PLACE, question)
        if template not in CHAT_TEMPLATES:
            return question
        messages = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def query(self, question: str) -> list[int]:
        """The token ids that the model sees before its answer."""
        return list(self.tokenizer.encode(self.rendered(question), add_special_tokens=False))

    def seen(self, question: str) -> str:
        """A query as text, out of its tokens."""
        return str(self.tokenizer.decode(self.query(question)))

    def query_lengths(self, questions: Sequence[str]) -> list[int]:
        """How many tokens each query has; of many questions at a time."""
        if not questions:
            return []
        rendered = [self.rendered(question) for question in questions]
        return [len(ids) for ids in self.tokenizer(rendered, add_special_tokens=False)["input_ids"]]

    def decode(self, rows: Sequence[Any]) -> list[str]:
        """Responses (sequences of ids) as text, special tokens left out."""
        # transformers makes one empty text of no rows.
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True)) if len(rows) else []


def load_text(directory: Path, template: str) -> Text:
    """Read the tokenizer of a checkpoint directory.

    Args:
      directory: of the checkpoint.
      template: one of TEMPLATES, or a text with {question} in it.

    Raises:
      ConfigError: it is none of these; there is no tokenizer, no end token, or no chat template where one is
        asked for.
    """
    if template not in TEMPLATES and PLACE not in template:
        raise ConfigError(
            f"data.template {template!r} is none of {', '.join(TEMPLATES)}, and has no {PLACE} in it"
        )
    tokenizer = read_tokenizer(directory)
    if template in CHAT_TEMPLATES and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {directory} has no chat template; use --data.template plain, or generate --raw"
        )
    return Text(tokenizer, end_tokens(directory), template)


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
    """The ids of a checkpoint's tokenizer, as the decoder takes them: empty where it has all.

    Args:
      directory: of the checkpoint.
      vocabulary: rows of the embedding.

    Returns:
      Ranges [first, end).

    Raises:
      ConfigError: the embedding lacks ids of the tokenizer, or the padding token; or an end token is none
        of the tokenizer's.
    """
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
      ConfigError: none of them names one, or it is no id.
    """
    found = token_id(directory, "eos_token_id", "eos_token")
    if found is None:
        raise ConfigError(
            f"{directory} names no end token: eos_token_id is in neither {GENERATION_FILE} nor config.json, "
            "and tokenizer_config.json has no eos_token"
        )
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id of {directory} is {found!r}, must be an id or a list of ids")
    return tuple(ids)


def pad_token(directory: Path) -> int | None:
    """The id that pads, as the checkpoint's files say, or None where they say nothing.

    Nothing here is padded with it: masks come from lengths. It is what others read of an export.
    """
    found = token_id(directory, "pad_token_id", "pad_token")
    return found if isinstance(found, int) and found >= 0 else None  # -1 says that there is none


def token_id(directory: Path, id_field: str, token_field: str) -> Any:
    """An id of the first file that names it; the tokenizer's own is looked up in its vocabulary."""
    for name in (GENERATION_FILE, "config.json"):
        if (directory / name).is_file() and (found := read_json(directory / name).get(id_field)) is not None:
            return found
    named = directory / "tokenizer_config.json"
    token = read_json(named).get(token_field) if named.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    return Tokenizer.from_file(str(directory / TOKENIZER_FILE)).token_to_id(token)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character; ids 0 and 1 are `<pad>` and `<eos>`."""
    special = ["<pad>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        clean_up_tokenization_spaces=False,
    )
