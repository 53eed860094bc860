"""Where sentences begin in a response: in prose, in mathematics and in code."""

import bisect
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

ENDS = re.compile(
    rb"""
      \n                                     # a line, of code or of a derivation
    | (?<!\\);                               # a step or a statement; \; is a space in LaTeX
    | (?<!\\)(?<!e\.g)(?<!i\.e)(?i:(?<!\bcf)(?<!\bvs)(?<!\bmr)(?<!\bmrs)(?<!\bdr)(?<!\beq)(?<!\bfig))
      [.!?]+ ["')\]}$*_]*                   # a point, ...
      (?=\s (?!\s*[=+/<>^,&)]))             # ... with a space behind it, which 3.14 has not, nor n! = 6
    | (?:\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f|\xef\xbc\x9b)  # those of Chinese, wide
    """,
    re.VERBOSE,
)
ENTRY_NUMBER = re.compile(rb"[\s#*(]*\d+[.)]?")  # as a list's entry begins: the point behind it ends nothing
SPOKEN = re.compile(rb"\S")


def sentence_starts(pieces: Sequence[bytes], tokens: Sequence[int]) -> Bool[np.ndarray, " S"]:
    r"""Mark the tokens that sentences begin with.

    A sentence ends with a line, with `;`, and with `.`, `!` or `?` before a space, but not with the number of
    a list's entry or a common abbreviation. It begins with the token that has its first character in it, or
    with that of the text.

    Args:
      pieces: the bytes that each id adds to a text, none for control tokens.
      tokens: of the response.
    """
    text = b"".join(pieces[token] for token in tokens)
    start = [0, *itertools.accumulate(len(pieces[token]) for token in tokens)]
    marks = np.zeros(len(tokens), bool)
    ends = [0, *(match.end() for match in ENDS.finditer(text) if not numbers_an_entry(text, match))]
    for end in ends:
        if spoken := SPOKEN.search(text, end):
            marks[bisect.bisect_right(start, spoken.start()) - 1] = True
    return marks


def numbers_an_entry(text: bytes, match: re.Match[bytes]) -> bool:
    """Tell whether what looks like an end is the point behind the number of a list's entry, as in `2. `."""
    line = text.rfind(b"\n", 0, match.start()) + 1
    return match[0][:1] == b"." and ENTRY_NUMBER.fullmatch(text, line, match.start()) is not None
