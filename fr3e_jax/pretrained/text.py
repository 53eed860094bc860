"""Questions as tokens for a model, and its answers as text."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from jaxtyping import Bool

from fr3e_jax.config import ConfigError
from fr3e_jax.pretrained.sentences import sentence_starts
from fr3e_jax.pretrained.stops import cut_answer, make_table, token_bytes
from fr3e_jax.pretrained.tokenizer import end_tokens, read_tokenizer
from fr3e_jax.types import Rollouts, States, StopTable, Turns

CHAT_TEMPLATES = ("chat", "boxed_chat")
BOXED_TEMPLATES = ("boxed", "boxed_chat")
TEMPLATES = ("plain", "chat", *BOXED_TEMPLATES)
PLACE = "{question}"
PROBE, ANSWER_PROBE = "2+2?", "The answer is 4."  # a conversation to render with a chat template
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."  # paper


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with a template for questions and with the ends of answers.

    end_tokens: ids of every token that ends an answer, from the checkpoint's files. template: one of
    TEMPLATES, or a text with {question} in it. stop: texts that end an answer too, and do not belong to it.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    template: str
    stop: tuple[str, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template whose turns end as the model ends an answer.

        Tokenizers of base models have a chat template too, but their model does not end its turns.
        """
        after = self.behind_a_turn
        if after is None:
            return False
        ends = set(self.tokenizer.encode(after, add_special_tokens=False)) & set(self.end_tokens)
        return bool(ends) or any(text in after for text in self.stop)

    @property
    def behind_a_turn(self) -> str | None:
        """The text that the chat template writes behind an answer; None if it cannot be found out."""
        if not self.tokenizer.chat_template:
            return None
        roles = ("user", PROBE), ("assistant", ANSWER_PROBE), ("user", PROBE)
        messages = [{"role": role, "content": content} for role, content in roles]
        try:
            conversation = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # of the template, which may refuse such a conversation
            return None
        return conversation.rpartition(ANSWER_PROBE)[2] if ANSWER_PROBE in conversation else None

    def endless(self) -> str | None:
        """A warning that the model does not end the turns of its chat template, with advice; else None."""
        if self.template not in CHAT_TEMPLATES or self.chats or self.behind_a_turn is None:
            return None
        ends = self.tokenizer.convert_ids_to_tokens(list(self.end_tokens))
        return (
            f"the chat template writes {self.behind_a_turn[:40]!r} behind an answer, without an end token of "
            f"the model ({', '.join(ends)}), as those of base models do: its answers would go on to the "
            "length limit. Use the template boxed or plain, or name what ends a turn as a stop text"
        )

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id adds to a text, by id."""
        return token_bytes(self.tokenizer)

    @functools.cached_property
    def spoken(self) -> list[bytes]:
        """The bytes that each id adds to the text of an answer, by id: none of control tokens."""
        pieces = list(self.pieces)
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                pieces[number] = b""
        return pieces

    def sentence_starts(self, token: Any, length: Any) -> Bool[np.ndarray, "N S"]:
        """Mark the tokens that sentences, lines and steps of responses begin with.

        Args:
          token: int [N, S] on the host.
          length: int [N], tokens of each response.
        """
        control = {*self.tokenizer.all_special_ids, *self.end_tokens}
        pieces = [b"" if number in control else piece for number, piece in enumerate(self.pieces)]
        marks = np.zeros(token.shape, bool)
        for row, tokens, count in zip(marks, token, length, strict=True):
            row[:count] = sentence_starts(pieces, tokens[:count].tolist())
        return marks

    @functools.cached_property
    def stops(self) -> StopTable | None:
        """The automaton that finds stop texts while an answer is generated; None if there are none."""
        return make_table(self.pieces, self.stop) if self.stop else None

    def trimmed(self, rollouts: Rollouts, states: States | None = None) -> Rollouts:
        """Rollouts without their stop texts; at least one token of each is kept.

        Args:
          rollouts: on the host, leaves [N, C, S]. If there are states, C is J x M branches, state-major.
          states: on the host; a stop text may begin in their prefixes.
        """
        if not self.stop:
            return rollouts
        ended = np.take_along_axis(rollouts.token, np.maximum(rollouts.length - 1, 0)[..., None], axis=2)
        by_text = rollouts.stopped & ~np.isin(ended[..., 0], self.end_tokens)
        length = np.array(rollouts.length)
        for n, c in np.argwhere(by_text).tolist():
            before: list[int] = []
            if states is not None:
                j = c // (length.shape[1] // states.valid.shape[1])
                before = states.response[n, : states.prefix_length[n, j]].tolist()
            own = rollouts.token[n, c, : length[n, c]].tolist()
            length[n, c] = max(1, cut_answer(self.pieces, before + own, self.stop)[0] - len(before))
        kept = np.arange(rollouts.token.shape[2]) < length[..., None]

        def short(x: Any) -> Any:
            return np.where(kept, x, 0).astype(x.dtype) if x.ndim == 3 else x

        return dataclasses.replace(jax.tree.map(short, rollouts), length=length)

    @functools.cached_property
    def control(self) -> re.Pattern[str] | None:
        """A pattern that finds the texts of control tokens, which begin and end turns and answers."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # Longest first, since one may be the beginning of another.
        either = "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))
        return re.compile(either) if either else None

    def control_in(self, question: str, before: Turns = ()) -> str | None:
        """The text of the first control token in a question or in the turns before it; None without one."""
        if self.control is None:
            return None
        texts = (*(text for _, text in before), question)
        return next((match[0] for text in texts if (match := self.control.search(text))), None)

    def rendered(self, question: str, before: Turns = ()) -> str:
        """The text that the model sees of a question.

        Args:
          question: the question itself.
          before: turns of a chat that go before it.

        Raises:
          ConfigError: the template has no place for turns before the question, or refuses them.
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
        """The ids of a text; the texts of control tokens become control tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def query(self, question: str, before: Turns = ()) -> list[int]:
        """The ids that the model sees before its answer.

        Control tokens come from the template alone; in a question their texts stay text.

        Raises:
          ConfigError: as `rendered`, or the question has a control token in it that cannot stay text.
        """
        control, token = self.control, self.control_in(question, before)
        if control is None or token is None:
            return self.encoded(self.rendered(question, before))
        ids = self.spelled(question, before)
        # The same with a letter in place of each control token: there the tokenizer itself is the reference.
        plain = [control.sub("x", text) for text in (question, *(text for _, text in before))]
        turns = tuple((role, text) for (role, _), text in zip(before, plain[1:], strict=True))
        if ids is None or self.spelled(plain[0], turns) != self.encoded(self.rendered(plain[0], turns)):
            raise ConfigError(
                f"{question[:60]!r} has the control token {token!r} in it, which this model's tokenizer or "
                "chat template does not take as text; take it out"
            )
        return ids

    def spelled(self, question: str, before: Turns) -> list[int] | None:
        """The ids of a query in which control tokens of the question and its turns are encoded as text.

        The template is rendered with a mark in place of each text. Its own control tokens, between the marks,
        split the rendered text into runs, as the tokenizer does, and the runs are encoded as text.

        Returns:
          The ids; None if the template changes the texts, or if control tokens were encoded all the same.
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
            for match in self.control.finditer(piece):
                runs[-1] += piece[end : match.start()]
                runs += [match[0], ""]
                end, own = match.end(), own + 1
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
        """The text of a query, decoded from its tokens."""
        return str(self.tokenizer.decode(self.query(question, before)))

    def query_lengths(self, questions: Sequence[str], before: Sequence[Turns] | None = None) -> list[int]:
        """The number of tokens of each query, for many questions at a time.

        Args:
          questions: the questions themselves.
          before: turns that go before each; by default none.
        """
        queries = list(zip(questions, before or [()] * len(questions), strict=True))
        lengths = {i: len(self.query(*one)) for i, one in enumerate(queries) if self.control_in(*one)}
        others = [self.rendered(*one) for i, one in enumerate(queries) if i not in lengths]
        rest = iter(self.tokenizer(others, add_special_tokens=False)["input_ids"] if others else ())
        return [lengths[i] if i in lengths else len(next(rest)) for i in range(len(queries))]

    def lost(self, texts: Iterable[str]) -> dict[int, str]:
        """Find the characters that the tokenizer cannot say: they become `<unk>` or `<pad>`, or vanish.

        Args:
          texts: without control tokens.

        Returns:
          Index of a text -> its characters that are not there again when its tokens are decoded, each once.
        """
        texts = list(texts)
        none = {*self.tokenizer.all_special_ids, self.tokenizer.unk_token_id} - {None}
        suspects = {
            character
            for character in set().union(*map(set, texts))
            # Some tokenizers say white space with the word behind it alone.
            if none & set(ids := self.encoded(character)) or not (ids or character.isspace())
        }
        lost = {}
        for i, text in enumerate(texts if suspects else ()):
            if not suspects.isdisjoint(text):
                said = str(self.tokenizer.decode(self.encoded(text), skip_special_tokens=True))
                if missing := [c for c in dict.fromkeys(text) if c in suspects and c not in said]:
                    lost[i] = "".join(missing)
        return lost

    def answers(self, rows: Sequence[Any], stopped: Sequence[bool]) -> list[str]:
        """The text of whole responses that is judged, each up to its stop text if one ended it.

        Args:
          rows: ids of each response as they were sampled.
          stopped: whether each response ended before the length limit.
        """
        tails = [b""] * len(rows)
        if self.stop:
            rows = list(rows)
            for i, (row, end) in enumerate(zip(rows, stopped, strict=True)):
                if end and row[-1] not in self.end_tokens:
                    kept, tails[i] = cut_answer(self.pieces, list(row), self.stop)
                    rows[i] = row[:kept]
        texts = zip(self.decode(rows), tails, strict=True)
        return [text.removesuffix(tail.decode(errors="replace")) for text, tail in texts]

    def decode(self, rows: Sequence[Any]) -> list[str]:
        """The text of responses, given as sequences of ids; special tokens are left out."""
        # transformers makes one empty text of no rows.
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True)) if len(rows) else []


def load_text(directory: Path, template: str, stop: Sequence[str] = ()) -> Text:
    """The tokenizer of a checkpoint directory with a template.

    Args:
      directory: of the checkpoint.
      template: one of TEMPLATES, or a text with {question} in it.
      stop: texts that end an answer.

    Raises:
      ConfigError: the template is none of these, a stop text is empty, or there is no tokenizer, no end
        token, or no chat template for a template that needs one.
    """
    if not all(stop):
        raise ConfigError("a stop text is empty; leave it out")
    if template not in TEMPLATES and PLACE not in template:
        raise ConfigError(
            f"data.template {template!r} is none of {', '.join(TEMPLATES)}, and has no {PLACE} in it"
        )
    tokenizer = read_tokenizer(directory)
    if template in CHAT_TEMPLATES and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {directory} has no chat template, which the template {template!r} goes "
            "through; choose another, such as plain"
        )
    return Text(tokenizer, end_tokens(directory), template, tuple(stop))
