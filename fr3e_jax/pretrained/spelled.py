"""Responses as text, with the place of each of their tokens in it."""

import codecs
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32


def texts_with_ends(
    pieces: Sequence[bytes], token: Int[np.ndarray, " tokens"], length: Int[np.ndarray, " rows"]
) -> tuple[list[str], Int32[np.ndarray, " tokens"]]:
    """Spell responses that lie one behind the other.

    Args:
      pieces: the bytes that each id adds to a text; ids beyond them add none.
      token: ids of all responses.
      length: how many of them each response has.

    Returns:
      (text of each response, for each token the number of characters of its response's text up to the
      token's end). A character that several tokens make up belongs to the last of them. Bytes that are no
      UTF-8 become U+FFFD.
    """
    spelled = [pieces[number] if number < len(pieces) else b"" for number in token.tolist()]
    data = b"".join(spelled)
    stop = np.cumsum(np.array([len(piece) for piece in spelled], np.int64))  # of each token, in bytes
    last = np.cumsum(length)  # token behind each response
    bounds = np.append(0, np.append(0, stop)[last])  # of the responses, in bytes
    raw = np.frombuffer(data, np.uint8)
    # Of UTF-8 a byte 10xxxxxx goes on with a character, and any other begins one.
    begins = np.append((raw & 0xC0) != 0x80, True)
    begun = np.concatenate([[0], np.cumsum(begins[:-1])])  # characters that begin before each byte
    row = np.repeat(np.arange(len(length)), length)
    ends = begun[stop] - begun[bounds[:-1][row]]
    ends -= (stop < bounds[1:][row]) & ~begins[stop]  # the token ends within a character
    texts = []
    for (start, end), after, count in zip(itertools.pairwise(bounds.tolist()), last, length, strict=True):
        try:
            texts.append(data[start:end].decode())
        except UnicodeDecodeError:
            texts.append(data[start:end].decode(errors="replace"))
            ends[after - count : after] = ends_of_broken(spelled[after - count : after])
    return texts, ends.astype(np.int32)


def ends_of_broken(pieces: Sequence[bytes]) -> list[int]:
    """Count the characters up to the end of each piece of a text that is not all UTF-8."""
    decoder, ends, count = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], 0
    for number, piece in enumerate(pieces, start=1):
        count += len(decoder.decode(piece, final=number == len(pieces)))
        ends.append(count)
    return ends
