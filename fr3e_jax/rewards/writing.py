r"""Mathematical text in one way of writing, and the parts that it has."""

import functools
import itertools
import re
from collections.abc import Callable

BRACKET = re.compile(r"\\[{}]|\\.|[][(){}]", re.DOTALL)
GROUPS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:,|\{,\}|\\,|\\!|,\\!)[0-9]{3})+(?![0-9,])")
SEPARATOR = re.compile(r"\{,\}|\\[,!]|,")
UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b0": r"^\circ ",
        "\u222a": r"\cup ", "\u00b1": r"\pm ", "\u00b2": "^2", "\u00b3": "^3", "\u20ac": "", "\u00a3": "",
        "\u2248": r"\approx ",
        "\u221a": r"\sqrt ", "\u2208": r"\in ", "\u03b8": r"\theta ", "\u00f7": r"\div ",
    }
)  # fmt: skip
AMOUNT = r"([0-9]+(?:(?:,|\{,\})[0-9]{3})*(?:\.[0-9]+)?)"
FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi"
# Each pattern and what takes its place, in this order.
WRITINGS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (rf"\\\$\s*{AMOUNT}(?!\s*\\text)", r"\1\\text{dollars}"),
    (r"(?<=[A-Za-z0-9)}])\*\*(?=[A-Za-z0-9({\\-])", "^"),
    (r"(?<!\\)\\[()\[\]]|\\\$|\$|\\!|\*\*", ""),
    (r"[.,;:]\s*\Z", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])\.?|\\(?:displaystyle|textstyle|limits)(?![a-z])", ""),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (
        r"\\(?:text(?:bf|it|rm|normal)|math(?:rm|bf|it|sf)|mbox|operatorname|boldsymbol|bm)(?![a-z])\s*",
        r"\\text",
    ),
    (
        r"(?:[,;]\s*(?:(?:\\[;:, ]|\\q?quad(?![a-z])|~)\s*)*)?"
        r"\\text\{[\s~]*,?[\s~]*(?:and|or)[\s~]*,?[\s~]*\}|,?(?<![A-Za-z\\])\s*(?:and|or)(?![A-Za-z])",
        ", ",
    ),
    (r"(?<!\\)\\(?:[;:, ]|q?quad(?![a-z]))|~|\s+", " "),
    (r"\\leq?(?:slant)?(?![a-z])|<=", r"\\le "),
    (r"\\geq?(?:slant)?(?![a-z])|>=", r"\\ge "),
    (r"\\neq?(?![a-z])|!=", r"\\ne "),
    (r"\\lt(?![a-z])", "<"),
    (r"\A(?:([A-Za-z])\s*)?\\approx(?![a-z])", lambda match: f"{match[1]}=" if match[1] else ""),
    (r"\\gt(?![a-z])", ">"),
    (r"\\([lr])brace(?![a-z])", lambda match: "\\" + "{}"["lr".index(match[1])]),
    (r"\\varnothing(?![a-z])|\\\{ *\\\}", r"\\emptyset "),
    (r"(?<![A-Za-z\\])infinity|\\infinity", r"\\infty "),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?![a-z])", r"\\\1 "),
    (r" ?(?:\\text\{ *percent *\}|percent)", r"\\%"),
    (
        r" ?(?:\^ ?\{? ?\\(?:circ|degree) ?\}?|\\degree(?![a-z])|\\text\{ *degrees? *\}| degrees?)",
        r"^\\circ ",
    ),
    (r" *([^A-Za-z0-9\\ ]) *", r"\1"),
    (r"\\frac ?([0-9A-Za-z])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"\\log_ ?([0-9]+) ?", r"\\log_{\1}"),
    (r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"\\sqrt\[([3579])\]\{-([0-9]+)\}", r"(-\\sqrt[\1]{\2})"),
    (r"\(-\\infty ?,\+?\\infty ?\)", r"\\mathbb{R}"),
    (r"\A\\text\{([^{}]*[0-9][^{}]*)\}\Z", r"\1"),
]
TIDY = [(re.compile(pattern), new) for pattern, new in WRITINGS]
SPACED = re.compile(r"(?<![0-9])[1-9][0-9]{0,2}(?:(?:\\,| )[0-9]{3})+(?![0-9 ])")


def split_top(text: str, separator: str) -> list[str]:
    """Parts between separators (a regular expression) that stand in no bracket of any kind."""
    depth, ends = 0, [(0, 0)]
    for match in re.finditer(rf"{separator}|{BRACKET.pattern}", text, re.DOTALL):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0 and re.fullmatch(separator, token):
            ends.append(match.span())
    ends.append((len(text), len(text)))
    return [text[a:b].strip() for (_, a), (b, _) in itertools.pairwise(ends)]


def wrapped(text: str) -> tuple[str, str]:
    """Split a text into the outermost brackets, if they hold all of it, and what they hold."""
    opening = text[:2] if text.startswith("\\{") else text[:1]
    closing = text[-2:] if text.endswith("\\}") else text[-1:]
    if opening not in ("(", "[", "\\{") or closing not in (")", "]", "\\}"):
        return "", text
    inner = text[len(opening) : -len(closing)]
    depth = 0
    for token in re.findall(r"\\[{}]|\\.|[][(){}]", inner):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth < 0:
            return "", text
    return opening + closing, inner


def both_signs(text: str) -> list[str]:
    r"""The two values of an expression with \pm."""
    if not re.search(r"\\(pm|mp)(?![a-z])", text):
        return [text]
    name, sign, rest = text.rpartition("=")
    plus = re.sub(r"\\pm ?", "+", re.sub(r"\\mp ?", "-", rest)).removeprefix("+")
    minus = re.sub(r"\\pm ?", "-", re.sub(r"\\mp ?", "+", rest)).removeprefix("+")
    return [name + sign + plus, name + sign + minus]


def without_groups(text: str) -> str:
    """The text without separators of thousands."""
    return GROUPS.sub(lambda match: SEPARATOR.sub("", match[0]), text)


@functools.lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    """Write a text in one way for each thing, with spaces only where they part letters or digits."""
    text = without_groups(text) if not re.search(r"[(\[]|\\\{", text) else text.replace("{,}", "")
    text = SPACED.sub(lambda match: re.sub(r"\\,| ", "", match[0]), text.strip().translate(UNICODE))
    for pattern, new in TIDY:
        text = pattern.sub(new, text.strip())
    return text.strip()


def squeezed(text: str) -> str:
    """Tidy text without the spaces that part no digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
