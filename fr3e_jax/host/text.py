"""Tokens <-> text: the tokenizer of a checkpoint, its end tokens, and prompt templates."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# Its advice that there is no torch is not for our users: only tokenizers are used of it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with what a run needs of it.

    end_tokens: every token that ends an answer, from the checkpoint's files.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    template: Literal["plain", "chat"]

    def query(self, question: str) -> list[int]:
        """The token ids that the model sees before its answer."""
        if self.template == "plain":
            return list(self.tokenizer.encode(question, add_special_tokens=False))
        messages = [{"role": "user", "content": question}]
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def decode(self, rows: Sequence[Any]) -> list[str]:
        """Responses (sequences of ids) as text, special tokens left out."""
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))


def load_text(directory: Path, template: Literal["plain", "chat"]) -> Text:
    """Read the tokenizer of a checkpoint directory.

    Raises:
      ConfigError: there is no tokenizer, no end token, or no chat template where one is asked for.
    """
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory} holds no tokenizer.json")
    # Not AutoTokenizer: for model_type qwen2 it would force Qwen's own pre-tokenizer on every file.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {directory} has no chat template; use data.template plain")
    return Text(tokenizer, end_tokens(directory), template)


def end_tokens(directory: Path) -> tuple[int, ...]:
    """eos_token_id, one or several, of generation_config.json or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            found = json.loads((directory / name).read_text()).get("eos_token_id")
            if found is not None:
                return (found,) if isinstance(found, int) else tuple(found)
    raise ConfigError(f"neither generation_config.json nor config.json of {directory} has eos_token_id")


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
