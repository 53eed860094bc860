"""Tokens <-> text: the tokenizer of a checkpoint, its end tokens, and prompt templates."""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# Its advice that there is no torch is not for our users: only tokenizers are used of it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError
from fr3e_jax.host.problems.problem import Turns
from fr3e_jax.models.hf import read_json

GENERATION_FILE = "generation_config.json"
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

    @functools.cached_property
    def control(self) -> re.Pattern[str] | None:
        """Finds the texts of control tokens: the special ones, which begin and end turns and answers."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # The longest first: one may begin as another does.
        either = "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))
        return re.compile(either) if either else None

    def control_in(self, question: str, before: Turns = ()) -> str | None:
        """The text of the first control token in a question or the turns before it, or None."""
        if self.control is None:
            return None
        texts = (*(text for _, text in before), question)
        return next((found[0] for text in texts if (found := self.control.search(text))), None)

    def rendered(self, question: str, before: Turns = ()) -> str:
        """What the model sees of a question, as text.

        Args:
          question: the question.
          before: the turns of a chat before it.

        Raises:
          ConfigError: there are turns before it, and the template has no place for them or refuses them.
        """
        template = self.template
        if template in BOXED_TEMPLATES:
            question = f"{question}\n{INSTRUCTION}"
        elif template not in TEMPLATES:
            question = template.replace(PLACE, question)
        if template not in CHAT_TEMPLATES:
            if before:
                raise ConfigError(
                    f"{question[:60]!r} is a turn of a chat, behind one of the {before[0][0]}, which "
                    f"data.template {template!r} has no place for; use --data.template chat, or set the "
                    "source's prompt to one turn, such as messages.1.content"
                )
            return question
        messages = [{"role": role, "content": text} for role, text in (*before, ("user", question))]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template of the model fails over {question[:60]!r}: {' '.join(str(error).split())}"
            ) from None

    def encoded(self, text: str) -> list[int]:
        """The token ids of text in which control tokens are control tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def query(self, question: str, before: Turns = ()) -> list[int]:
        """The token ids that the model sees before its answer.

        The control tokens among them are the template's alone: in a question they are text.

        Raises:
          ConfigError: as `rendered`; or the question has a control token in it that cannot be text.
        """
        control, token = self.control, self.control_in(question, before)
        if control is None or token is None:
            return self.encoded(self.rendered(question, before))
        ids = self.spelled(question, before)
        # The same with a letter in place of each: there the tokenizer itself says what is right.
        plain = [control.sub("x", text) for text in (question, *(text for _, text in before))]
        turns = tuple((role, text) for (role, _), text in zip(before, plain[1:], strict=True))
        if ids is None or self.spelled(plain[0], turns) != self.encoded(self.rendered(plain[0], turns)):
            raise ConfigError(
                f"{question[:60]!r} has the control token {token!r} in it, which this model's tokenizer or "
                "chat template does not take as text; take it out"
            )
        return ids

    def spelled(self, question: str, before: Turns) -> list[int] | None:
        """A query in which the control tokens of its texts are spelled out as text.

        The template is rendered with a mark in place of each text; its own control tokens, between the
        marks, part the rendered text into runs, as the tokenizer parts it, and the runs are encoded as text.

        Returns:
          The ids; None where the template changes the texts, or control tokens were encoded all the same.
        """
        assert self.control is not None
        texts = (*(text for _, text in before), question)
        marks = [f"\ue000{i}\ue001" for i in range(len(texts))]
        turns = tuple((role, mark) for (role, _), mark in zip(before, marks, strict=False))
        pieces = re.split("\ue000([0-9]+)\ue001", self.rendered(marks[-1], turns))
        pieces[1::2] = [texts[int(number)] for number in pieces[1::2]]
        if "".join(pieces) != self.rendered(question, before):
            return None
        runs, own = [""], 0
        for i, piece in enumerate(pieces):
            if i % 2:
                runs[-1] += piece
                continue
            end = 0
            for found in self.control.finditer(piece):
                runs[-1] += piece[end : found.start()]
                runs += [found[0], ""]
                end, own = found.end(), own + 1
            runs[-1] += piece[end:]
        ids: list[int] = []
        for i, run in enumerate(runs):
            if i % 2:
                ids += self.encoded(run)
            elif run:
                ids += self.tokenizer.encode(run, add_special_tokens=False, split_special_tokens=True)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return ids if sum(i in special for i in ids) == own else None

    def seen(self, question: str, before: Turns = ()) -> str:
        """A query as text, out of its tokens."""
        return str(self.tokenizer.decode(self.query(question, before)))

    def query_lengths(self, questions: Sequence[str], before: Sequence[Turns] | None = None) -> list[int]:
        """How many tokens each query has; of many questions at a time.

        Args:
          questions: the questions.
          before: the turns before each; by default there are none.
        """
        asked = list(zip(questions, before or [()] * len(questions), strict=True))
        lengths = {i: len(self.query(*one)) for i, one in enumerate(asked) if self.control_in(*one)}
        others = [self.rendered(*one) for i, one in enumerate(asked) if i not in lengths]
        rest = iter(self.tokenizer(others, add_special_tokens=False)["input_ids"] if others else ())
        return [lengths[i] if i in lengths else len(next(rest)) for i in range(len(asked))]

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
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory} holds no tokenizer.json")
    # Not AutoTokenizer: for model_type qwen2 it would force Qwen's own pre-tokenizer on every file.
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the library's own, of no common class
        raise ConfigError(f"the tokenizer of {directory} cannot be read: {error}") from None
    if template in CHAT_TEMPLATES and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {directory} has no chat template; use --data.template plain, or generate --raw"
        )
    return Text(tokenizer, end_tokens(directory), template)


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
    return found if isinstance(found, int) else None


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
    return Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(token)


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
