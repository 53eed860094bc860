"""Questions that occur twice, and held-out questions that share text with training questions."""

import collections
import re
from collections.abc import Iterator, Sequence

from fr3e_jax.host.problems.problem import Problem

# With the signs, without which two different sums would be one question.
WORD = re.compile(r"\w+|[-+*/^=<>]")
SHARED = 13
"""Words in a row that make an overlap, as in the contamination study of GPT-3 (arXiv 2005.14165)."""


def words(question: str) -> list[str]:
    """A question as words and signs; case, white space and other punctuation do not count."""
    return WORD.findall(question.casefold())


def normalised(question: str) -> str:
    """Text that two questions have in common if and only if they count as one."""
    return " ".join(words(question))


def duplicates(problems: Sequence[Problem]) -> int:
    """How many problems have the question of an earlier one."""
    return len(problems) - len({normalised(problem.asked) for problem in problems})


def runs(question: str, n: int) -> Iterator[tuple[str, ...]]:
    """The runs of `n` words of a question; all of it where it has fewer."""
    text = words(question)
    if len(text) < n:
        return iter([tuple(text)])
    return zip(*(text[start:] for start in range(n)), strict=False)


def overlaps(train: Sequence[Problem], held_out: Sequence[Problem], n: int = SHARED) -> list[int]:
    """Which held-out problems share `n` words in a row with a training problem, in time linear in the words.

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
    found: set[int] = set()
    for problem in train:
        for run in filter(owners.__contains__, runs(problem.asked, n)):
            found |= owners[run]
    return sorted(found)


def report(train: Sequence[Problem], held_out: Sequence[Problem]) -> str:
    """One line for people: how many problems, duplicates and overlaps."""
    told = f"{len(train):,} problems, {duplicates(train):,} duplicates"
    if not held_out:
        return told
    found = overlaps(train, held_out)
    told += f"; of {len(held_out):,} held-out problems "
    if not found:
        return f"{told}none shares {SHARED} words in a row with a training problem"
    example = " ".join(held_out[found[0]].question.split())[:60]
    share = "share" if len(found) > 1 else "shares"
    return f"{told}{len(found):,} {share} {SHARED} words in a row with a training problem (e.g. {example!r})"
