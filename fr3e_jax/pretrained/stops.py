"""Stop texts: which tokens complete them, and where an answer that holds one is cut."""

import bisect
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fr3e_jax.types import StopTable


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id adds to the text of an answer, by id; b"" for ids that the tokenizer lacks."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    if is_byte_level(tokenizer):
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        for token, number in vocabulary.items():
            pieces[number] = bytes(byte_of.get(character, 0) for character in token)
    else:
        # Decoded behind another token, since decoders may treat the first one of a text differently.
        first = min(set(vocabulary.values()) - set(tokenizer.all_special_ids))
        before = tokenizer.decode([first])
        numbers = sorted(vocabulary.values())
        texts = tokenizer.batch_decode([[first, number] for number in numbers])
        for number, text in zip(numbers, texts, strict=True):
            pieces[number] = text.removeprefix(before).encode()
    for number, token in tokenizer.added_tokens_decoder.items():
        pieces[number] = token.content.encode()
    return pieces


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer's tokens stand for bytes, as those of GPT-2 and Qwen do."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return "ByteLevel" in [part["type"] for part in (decoder, *decoder.get("decoders", ()))]


def make_table(pieces: Sequence[bytes], stop: Sequence[str]) -> StopTable:
    """The automaton that recognises stop texts in a sequence of tokens.

    Args:
      pieces: the bytes that each id adds to a text, from `token_bytes`.
      stop: the stop texts, none of them empty.
    """
    by_byte = byte_table([text.encode() for text in stop])
    state = np.repeat(np.arange(len(by_byte))[:, None], len(pieces), axis=1)
    longest = max(map(len, pieces))
    for place in range(longest):
        here = np.flatnonzero([len(piece) > place for piece in pieces])
        byte = np.array([pieces[token][place] for token in here.tolist()])
        state[:, here] = by_byte[state[:, here], byte[None]]
    following, group = np.unique(state, axis=1, return_inverse=True)
    return StopTable(group.reshape(-1).astype(np.int32), following.astype(np.int32))


def byte_table(stop: Sequence[bytes]) -> np.ndarray:
    """The automaton that recognises stop texts in bytes (Aho and Corasick): next state, int [states, 256].

    A state is the longest beginning of a stop text that was just read; the last state is a complete one.
    """
    beginnings = sorted({text[:n] for text in stop for n in range(len(text))}, key=len)
    number = {beginning: i for i, beginning in enumerate(beginnings)}
    complete = len(beginnings)
    table = np.full((complete + 1, 256), complete)
    for beginning, byte in itertools.product(beginnings, range(256)):
        read = beginning + bytes([byte])
        if not read.endswith(tuple(stop)):
            longest = next(read[i:] for i in range(len(read) + 1) if read[i:] in number)
            table[number[beginning], byte] = number[longest]
    return table


def cut_answer(pieces: Sequence[bytes], tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, bytes]:
    """Cut an answer at its first stop text.

    A token that begins before the stop text, such as the bracket in "}\\n\\n", belongs to the answer.

    Returns:
      (number of tokens that belong to the answer, the bytes of the stop text that the last of them has). All
      tokens and b"" if there is no stop text.
    """
    start = [0, *itertools.accumulate(len(pieces[token]) for token in tokens)]
    answer = b"".join(pieces[token] for token in tokens)
    places = [place for text in stop if (place := answer.find(text.encode())) >= 0]
    if not places:
        return len(tokens), b""
    kept = bisect.bisect_left(start, min(places))
    return kept, answer[min(places) : start[kept]]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that can be shown: up to the first stop text, or to where one may begin."""
    places = [place for end in stop if (place := text.find(end)) >= 0]
    if places:
        return text[: min(places)]
    most = max(map(len, stop), default=0)
    for size in range(min(most, len(text)), 0, -1):
        if any(end.startswith(text[-size:]) for end in stop):
            return text[:-size]
    return text
