"""Questions that occur twice, and held-out questions that share text with training questions."""

import collections
import re
import unicodedata
from collections.abc import Iterator, Sequence

from fr3e_jax.types import Problem

# With the signs, without which two different sums would be one question.
COMPARED_WORD = re.compile(r"\w+|[-+*/^=<>]")
# Characters that look alike and are written for each other, but for those that NFKC makes one of.
TWINS = {
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63\uff0d\u2796"), "-"),
    **dict.fromkeys(map(ord, "\u00d7\u00b7\u22c5\u2219\u2217\u2715\u2716"), "*"),
    **dict.fromkeys(map(ord, "\u00f7\u2044\u2215"), "/"),
    **dict.fromkeys(map(ord, "\u2264\u2a7d"), "<="),
    **dict.fromkeys(map(ord, "\u2265\u2a7e"), ">="),
    ord("\u2260"): "<>",
    # Nothing to see: soft hyphen, zero-width space, joiners, marks of direction, byte order mark.
    **dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")),
}
SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
SHARED = 13
"""Words in a row that make an overlap, as in the contamination study of GPT-3 (arXiv 2005.14165)."""


def words(question: str) -> list[str]:
    """Split a question into words and signs; case, white space and other punctuation do not count.

    Characters that look alike are one: a minus sign is a hyphen, x\u00b2 is x^2, a full-width 7 is a 7.
    """
    if not question.isascii():
        raised = SUPERSCRIPT.sub(lambda match: f"^{match[0]}", question.translate(TWINS))
        question = unicodedata.normalize("NFKC", raised).translate(TWINS)
    return COMPARED_WORD.findall(question.casefold())


def normalised(question: str) -> str:
    """Write a question as the text by which it counts as the same as another."""
    return " ".join(words(question))


def duplicates(problems: Sequence[Problem]) -> int:
    """Count the problems that have the question of an earlier one."""
    return len(problems) - len({normalised(problem.asked) for problem in problems})


def runs(question: str, n: int) -> Iterator[tuple[str, ...]]:
    """The runs of `n` words of a question; all of it where it has fewer."""
    text = words(question)
    if len(text) < n:
        return iter([tuple(text)])
    return zip(*(text[start:] for start in range(n)), strict=False)


def overlaps(train: Sequence[Problem], held_out: Sequence[Problem], n: int = SHARED) -> list[int]:
    """Find the held-out problems that share `n` words in a row with a training problem, in linear time.

    A question of fewer words is shared as a whole or not at all.

    Args:
      train: the training problems.
      held_out: the others.
      n: words.

    Returns:
      Indices into `held_out`, ascending.
    """
    owners: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
    for i, problem in enumerate(held_out):
        for run in runs(problem.asked, n):
            owners[run].add(i)
    shared: set[int] = set()
    for problem in train:
        for run in filter(owners.__contains__, runs(problem.asked, n)):
            shared |= owners[run]
    return sorted(shared)


def report(train: Sequence[Problem], held_out: Sequence[Problem]) -> str:
    """Report, in one line for people, how many problems, duplicates and overlaps there are."""
    line = f"{len(train):,} problems, {duplicates(train):,} duplicates"
    if not held_out:
        return line
    shared = overlaps(train, held_out)
    line += f"; of {len(held_out):,} held-out problems "
    if not shared:
        return f"{line}none shares {SHARED} words in a row with a training problem"
    example = " ".join(held_out[shared[0]].question.split())[:60]
    share = "share" if len(shared) > 1 else "shares"
    return f"{line}{len(shared):,} {share} {SHARED} words in a row with a training problem (e.g. {example!r})"
