"""Single expressions as math-verify compares them: those that it reads right, and soon.

They have few kinds of symbols, and values that cannot grow beyond some thousand digits. Two that differ in
their letters, or in their values somewhere, are told apart before it is asked to simplify.
"""

import cmath
import functools
import logging
import random
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Abs, Expr, Float, Function, I, Pow, Rational
from sympy.functions.elementary.trigonometric import TrigonometricFunction

MOST_EXACT_DIGITS = 5000  # about, of a value within an expression without letters
MOST_DEGREE = 700  # about the same, of one with letters, which may be expanded
CERTAIN = 2 * MOST_DEGREE  # digits by which two values are the same
SLACK = Float(10) ** (60 - CERTAIN)
DEEPEST = 8  # brackets within brackets
MOST_FUNCTIONS = 6  # such as sin, which may be nested without brackets
logging.getLogger("math_verify").setLevel(logging.ERROR)  # that it has no time limit is meant
# One expression, as it is: what it would correct is corrected here.
AS_IT_IS = LatexExtractionConfig(
    boxed_match_priority=-1, normalization_config=NormalizationConfig(basic_latex=False, boxed="none")
)
LATEX_COMMANDS = frozenset(
    r"""\frac \sqrt \pi \infty \cdot \times \div \pm \mp \le \ge \ne \cup \cap \in \setminus \emptyset \circ
    \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \ln \log \exp \binom
    \lfloor \rfloor \lceil \rceil \mathbb \{ \} \begin \end \\
    \alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \rho
    \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Psi \Omega""".split()
)
FUNCTION = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp)(?![a-z])")
COMMAND = re.compile(r"\\[A-Za-z]+")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|[A-Za-z]|[^\s]")
# Misread by math-verify (two numbers in a row, subscripts of numbers), of any size (powers of ten as 1e5,
# long numbers, factorials but of short ones), or no mathematics.
UNREADABLE = re.compile(
    r"[0-9] [0-9]|[0-9)}]_|[0-9]\.?(?:[eE][0-9]|E[+-])|[0-9]{101}|[^0-9A-Za-z]!|[0-9]{5}!"
    r"|\.[0-9]*\.|[?@#$&%\"`]"
)
# Infinity where it is a bound, or all there is: within an expression it has any value that is asked for.
INFINITE = re.compile(r"(?:\A|(?<=[(\[,<>]))[+-]?\\infty ?(?=[)\],<>]|\\[lg]e(?![a-z])|\Z)")
# Products that math-verify takes for sums, as in 3\frac{1}{2}, or for functions, as in f(x).
MIXED_UP = re.compile(r"(?<=[0-9])(?=\()|(?<=\))(?=[0-9]|\\frac)|(?<=\})(?=\\frac)")
PRODUCT = re.compile(r"(?<![A-Za-z\\])([a-eijk-z]|[a-z]{2,3})(?=\()")
DECIMAL_POINT = re.compile(r"([0-9]*)\.([0-9]+)")


def expression(gold: str, candidate: str, sets: bool = False) -> bool:
    """Whether two single expressions, equations or sets are the same for math-verify."""
    gold, candidate = told_apart(gold, candidate)
    if not manageable(gold) or not manageable(candidate):
        return False
    if letters(gold) != letters(candidate) and not sets:
        # To ask would be the slowest of questions. Two have a value in common only where one is a constant.
        if letters(gold) and letters(candidate):
            return False
        wanted, value = parse_expression(gold), parse_expression(candidate)
        return bool(wanted and value) and same_everywhere(wanted[0], value[0])
    wanted, value = parse_expression(gold), parse_expression(candidate)
    if not wanted or not value or differ(wanted[0], value[0]):
        return False
    return verify(wanted, value, numeric_precision=30, allow_set_relation_comp=sets, timeout_seconds=None)


def differ(wanted: Any, value: Any) -> bool:
    """Whether two expressions have different values where their letters have some: they are not the same.

    This takes a moment; simplifying, which would have to fail otherwise, may take minutes.
    """
    if not isinstance(wanted, Expr) or not isinstance(value, Expr):
        return False
    names = sorted(wanted.free_symbols | value.free_symbols, key=str)
    somewhere = {name: Rational(13 + 3 * i, 7 + 2 * i) for i, name in enumerate(names)}
    try:
        one, two = (complex(text.subs(somewhere).evalf(20)) for text in (wanted, value))
        if not (cmath.isfinite(one) and cmath.isfinite(two)):
            return one != two
        return abs(one - two) > 1e-12 + 1e-9 * max(abs(one), abs(two))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def same_everywhere(wanted: Any, value: Any) -> bool:
    """Whether two expressions have one value whatever their letters are, as sin(x)^2 + cos(x)^2 and 1.

    Asked of sums, products, powers by numbers, and functions of angles: for these, some points in the complex
    plane that nobody can know beforehand decide, at more digits than any of their numbers has. Of others, no.
    """
    if not isinstance(wanted, Expr) or not isinstance(value, Expr):
        return False
    for one in (wanted, value):
        known = all(isinstance(f, TrigonometricFunction) for f in one.atoms(Function))
        if not known or any(power.exp.free_symbols for power in one.atoms(Pow)):
            return False
    names = sorted(wanted.free_symbols | value.free_symbols, key=str)
    draw = random.Random(f"{wanted} = {value}")
    for size in (3, -8, 14, -22):  # tenths: on both sides of 0 and of 1
        somewhere = {
            name: Rational(size * draw.randint(50, 99), 1000) + I * Rational(draw.randint(-99, 99), 70)
            for name in names
        }
        try:
            one, two = (text.subs(somewhere).evalf(CERTAIN, maxn=2 * CERTAIN) for text in (wanted, value))
            apart = Abs(one - two).evalf(10)
            if not apart.is_finite or not apart <= Abs(one).evalf(10) * SLACK + SLACK:
                return False
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return False
    return True


def told_apart(*texts: str) -> list[str]:
    """Replace capitals that occur as small letters too by other letters: m and M are two unknowns.

    math-verify takes them for one. Where no letter is left, they stay as they are.
    """
    used = {letter for text in texts for letter in re.findall(r"[A-Za-z]", COMMAND.sub("", text))}
    both = sorted(letter for letter in used if letter.isupper() and letter.lower() in used)
    free = [letter for letter in "abcjklmnopqrstuvwxyz" if not {letter, letter.upper()} & used]
    other = dict(zip(both, free, strict=False))
    return [re.sub(rf"{COMMAND.pattern}|[A-Z]", lambda m: other.get(m[0], m[0]), text) for text in texts]


def letters(text: str) -> frozenset[str]:
    """The letters that an expression has for unknowns, in lower case as math-verify reads them."""
    plain = re.sub(
        rf"{FUNCTION.pattern}|\\(?:frac|sqrt|pi|infty|cdot|times|div|circ|binom|[lg]e|ne|in)(?![a-z])",
        "",
        text,
    )
    return frozenset(re.findall(r"\\[A-Za-z]+|[a-z]", re.sub(r"[A-Z]", lambda m: m[0].lower(), plain))) - {
        "e",
        "i",
    }


@functools.lru_cache(maxsize=4096)
def parse_expression(text: str) -> list[Any]:
    """Parse an expression with math-verify: one object, or None."""
    text = DECIMAL_POINT.sub(lambda m: rf"{{\frac{{{int(m[1] + m[2])}}}{{1{'0' * len(m[2])}}}}}", text)
    text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", "(I)", text)
    text = re.sub(r"(?<=[0-9])e(?=[+-])", r"\\cdot e", text)  # 2e + 3 is no 2000
    text = PRODUCT.sub(r"\1\\cdot ", text)
    text = MIXED_UP.sub(r"\\cdot ", round_to_braces(text))
    return parse(f"${text}$", (AS_IT_IS,), fallback_mode="no_fallback", parsing_timeout=None)


def round_to_braces(text: str) -> str:
    r"""The text with `^(2)` and `\sqrt(2)` as `^{2}` and `\sqrt{2}`."""
    for match in reversed(list(re.finditer(r"(?:\^|\\sqrt ?)(?=\()", text))):
        depth = 0
        for i in range(match.end(), len(text)):
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                text = f"{text[: match.end()]}{{{text[match.end() + 1 : i]}}}{text[i + 1 :]}"
                break
    return text


@functools.lru_cache(maxsize=4096)
def manageable(text: str) -> bool:
    """Whether math-verify can be expected to read an expression right and to end soon."""
    if not text.isascii() or not text.isprintable() or UNREADABLE.search(text):
        return False
    if not LATEX_COMMANDS.issuperset(re.findall(r"\\(?:[A-Za-z]+|.)", text)):
        return False
    if len(FUNCTION.findall(text)) > MOST_FUNCTIONS or r"\infty" in INFINITE.sub("", text):
        return False
    return size(text) <= (MOST_DEGREE if letters(text) else MOST_EXACT_DIGITS)


def size(text: str) -> float:
    """About the most digits that an expression's value can have, or infinity where brackets are too deep.

    Factors and terms add their digits, a power multiplies them; a letter counts as a digit or so.
    """
    frames = [[0.0, 0.3, 0.0]]  # digits of the earlier factors, of the last, whether a power is awaited

    def add(digits: float) -> None:
        frame = frames[-1]
        if frame[2]:
            frame[1] *= 10 ** min(digits, 12)
            frame[2] = 0
        else:
            frame[0], frame[1] = frame[0] + frame[1], digits

    for token in TOKEN.findall(text):
        if token in ("(", "[", "{", r"\{"):
            frames.append([0.0, 0.0, 0.0])
            if len(frames) > DEEPEST:
                return float("inf")
        elif token in (")", "]", "}", r"\}") and len(frames) > 1:
            done = frames.pop()
            add(done[0] + done[1])
        elif token.isdigit():
            add(max(0.3, len(token.lstrip("0")) - 1 + 0.1 * int(token.lstrip("0")[:1] or 0)))
        elif token == "^":
            frames[-1][2] = 1
        elif token == "!":
            frames[-1][1] = 10 ** min(frames[-1][1], 12) * max(frames[-1][1], 1)
        elif token == r"\binom":
            add(0.3)
            frames[-1][2] = 1
        elif token.isalpha() or token in "+-":
            add(0.3)
    return sum(frame[0] + frame[1] for frame in frames)
