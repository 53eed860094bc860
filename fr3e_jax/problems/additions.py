"""Built-in tasks: generated additions, and worked solutions to warm up on.

A problem is held out or not by a hash of its operands, so that training never draws what evaluation
asks, whatever the seeds are.
"""

import dataclasses
import zlib
from typing import ClassVar

import numpy as np

from fr3e_jax.config import ConfigError, DataConfig
from fr3e_jax.types import Problem

TRAINING_PROBLEMS = 2**16
HELD_OUT_SHARE = 8  # one problem in so many is held out
MAX_DIGITS = 18  # operands are drawn as 64-bit integers


def is_held_out_pair(pair: tuple[int, int]) -> bool:
    """Whether a pair of operands, in this order, belongs to evaluation."""
    return zlib.crc32(f"{pair[0]}+{pair[1]}".encode()) % HELD_OUT_SHARE == 0


@dataclasses.dataclass(frozen=True)
class Addition:
    """Problems about two operands, their numbers of digits drawn uniformly from [min_digits, max_digits]."""

    min_digits: int
    max_digits: int

    name: ClassVar[str]
    """Of the source and of its scorer."""
    question: ClassVar[str]
    """Format of the question, with places for `a` and `b`."""

    def __len__(self) -> int:
        """Number of training problems."""
        return TRAINING_PROBLEMS

    def __getitem__(self, index: int) -> Problem:
        """The first problem drawn for `index` that is not held out."""
        attempt = 0
        while is_held_out_pair(pair := self.draw(0, index, attempt)):
            attempt += 1
        return self.problem(*pair)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` different held-out problems; all of them where there are fewer.

        Raises:
          ConfigError: there is none.
        """
        pairs: dict[tuple[int, int], None] = {}
        different = 10 ** (2 * self.max_digits)  # pairs of operands, at most
        for index in range(min(1000 * count, 20 * different)):
            pair = self.draw(1, index)
            if is_held_out_pair(pair):
                pairs[pair] = None
            if len(pairs) == count:
                break
        if not pairs:
            raise ConfigError(
                f"operands of {self.min_digits} to {self.max_digits} digits have no held-out problems; raise "
                "data.max_digits"
            )
        return [self.problem(*pair) for pair in pairs]

    def draw(self, *entropy: int) -> tuple[int, int]:
        """A pair of operands as a function of `entropy`."""
        rng = np.random.default_rng(entropy)

        def operand() -> int:
            digits = int(rng.integers(self.min_digits, self.max_digits + 1))
            return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))

        return operand(), operand()

    def problem(self, a: int, b: int) -> Problem:
        """The question about two operands."""
        return Problem(self.question.format(a=a, b=b), str(a + b), self.name, self.name)


@dataclasses.dataclass(frozen=True)
class CarryAddition(Addition):
    """Addition column by column, each line naming the carry that goes on to the next column.

    `47+85=` is answered by `7+5+0=12,1;4+8+1=13,1;=132`. A solution to warm up on forgets a carry
    between two columns with probability `dropped_carry` (writes `,0;`), and goes on from there without
    another mistake: one wrong decision decides the answer. The carry out of the last column is never
    forgotten.
    """

    dropped_carry: float = 0.0

    name: ClassVar[str] = "carry_addition"
    question: ClassVar[str] = "{a}+{b}="
    alphabet: ClassVar[str] = "0123456789+=,;"
    """Characters that questions and worked solutions are made of."""

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """Write the columns from the ones upwards, then the sum that they give."""
        a, b = problem.question.rstrip("=").split("+")
        columns = max(len(a), len(b))
        lines, digits, carry = [], "", 0
        for column in range(1, columns + 1):
            x, y = (int(n.zfill(columns)[-column]) for n in (a, b))
            total = x + y + carry
            given = total // 10
            if column < columns and given and rng.random() < self.dropped_carry:
                given = 0
            lines.append(f"{x}+{y}+{carry}={total},{given};")
            digits, carry = f"{total % 10}{digits}", given
        result = f"{carry or ''}{digits}".lstrip("0") or "0"
        return "".join(lines) + f"={result}"


@dataclasses.dataclass(frozen=True)
class WordAddition(Addition):
    """Addition that is asked in words and judged by the last number of the response."""

    name: ClassVar[str] = "word_addition"
    question: ClassVar[str] = "What is {a} + {b}?"


def make_addition(name: str, config: DataConfig, dropped_carry: float = 0.0) -> CarryAddition | WordAddition:
    """Make the built-in task of a name.

    Args:
      name: `carry_addition` or `word_addition`.
      config: says how many digits operands have.
      dropped_carry: the bad habit of carry_addition's worked solutions.

    Raises:
      ConfigError: operands that the task cannot have.
    """
    if not 1 <= config.min_digits <= config.max_digits <= MAX_DIGITS:
        raise ConfigError(
            f"data.min_digits {config.min_digits} and data.max_digits {config.max_digits} must be ascending "
            f"and lie in [1, {MAX_DIGITS}]"
        )
    digits = config.min_digits, config.max_digits
    return WordAddition(*digits) if name == "word_addition" else CarryAddition(*digits, dropped_carry)
