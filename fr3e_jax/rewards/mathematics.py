r"""Verdicts on mathematical answers: by text, by exact value, part by part, and by math-verify.

Only the last box (else what follows the last "answer is", else the last formula or number) is judged, never
the whole response: math-verify would take several candidates as a set. Lists, tuples, intervals, sets,
matrices, units, percentages and ratios are compared here; math-verify gets single expressions
(`symbolic`). The rest is compared as text alone.
"""

import re
from typing import Any

from fr3e_jax.rewards.extract import has_box, last_box, last_claim, last_formula, last_number
from fr3e_jax.rewards.plain import number
from fr3e_jax.rewards.symbolic import DEEPEST, expression
from fr3e_jax.rewards.verdict import WRONG, Verdict
from fr3e_jax.rewards.writing import both_signs, split_top, squeezed, tidy, wrapped

MOST_LENGTH = 1000  # characters of an answer that is more than compared as text
VARIABLE = re.compile(r"(?:[A-Za-z+'|()_ ,-]|(?<=_)[0-9]|(?<=_\{)[0-9]+(?=\})|\\[a-z]+|[{}])+")
UNIT = re.compile(r"(.*[^ ]) ?\\text\{([^{}]+)\}(?:\^\{?([0-9])\}?)?")
BARE_UNIT = re.compile(r"(.*[0-9}\]]) ?([A-Za-z][A-Za-z. /]*)(?:\^\{?([0-9])\}?)?")
# Words that are a part of the number, or of a sentence.
NO_UNIT = frozenset(
    """or and not no more less most least than plus minus times to if is are over per mod power point double
    twice triple negative positive squared cubed factorial root sqrt pi e i one two three four five six seven
    eight nine ten hundred hundreds thousand thousands million millions billion billions trillion trillions
    dozen dozens score half halves third thirds fourth fourths quarter quarters fifth fifths sixth sixths
    seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth
    thousandths""".split()
)
UNITS = {
    name: names[0]
    for names in map(
        str.split,
        [
            "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "m meter metre",
            "kg kilogram", "ft foot feet", "in inch inches", "hr hour h", "min minute", "s sec second",
            "ml milliliter", "g gram", "l liter litre", "k kelvin", "c celsius", "f fahrenheit", "n newton",
            "j joule", "w watt", "v volt",
            "dollar usd", "cent", "mph", "kmh", "am a.m", "pm p.m", "yd yard", "lb pound", "th st nd rd",
        ],
    )
    for name in names
}  # fmt: skip
MATRIX_TEXT = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
BASED = re.compile(r"(?:\\text\{)?([0-9A-F]*[0-9][0-9A-F]*)\}?_\{?(?:\\text\{)?([0-9]+|[a-z]+)\}*")


def score(response: str, answer: str, facts: Any = None) -> Verdict:
    """Judge whether the response's answer means the same as the problem's."""
    candidate = judged(response)
    if not candidate.strip() or not answer.strip():
        return WRONG
    if candidate.strip() == answer.strip():
        return Verdict(True, candidate)
    if max(len(candidate), len(answer)) > MOST_LENGTH:
        return Verdict("".join(candidate.split()) == "".join(answer.split()), candidate[:MOST_LENGTH])
    value = number(candidate)
    if value is not None and "%" not in candidate + answer and (wanted := number(answer)) is not None:
        return Verdict(value == wanted, candidate)
    return Verdict(same(tidy(answer), tidy(candidate)), candidate)


def judged(response: str) -> str:
    """The part of a response that is its answer; nothing where the last box is not closed."""
    if has_box(response):
        return last_box(response) or ""
    return last_claim(response) or last_formula(response) or last_number(response) or ""


def same(gold: str, candidate: str, depth: int = 0) -> bool:
    """Whether two tidy texts mean the same."""
    if not gold or not candidate or depth > DEEPEST:
        return False
    if squeezed(gold) == squeezed(candidate):
        return True
    for rule in (
        by_percent,
        by_degrees,
        by_number,
        by_unit,
        by_base,
        by_matrix,
        by_items,
        by_words,
        by_ratio,
    ):
        verdict = rule(gold, candidate, depth + 1)
        if verdict is not None:
            return verdict
    return by_equation(gold, candidate, depth + 1)


def by_number(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare two plain numbers exactly; None of other texts."""
    wanted, value = number(gold), number(candidate)
    return None if wanted is None or value is None else wanted == value


def by_percent(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare percentages: 50% is 0.5, and it is 50 too, since the sign is often left out of an answer."""
    if gold.endswith("%") == candidate.endswith("%"):
        if not gold.endswith("%"):
            return None
        return same(gold[:-1].rstrip("\\ "), candidate[:-1].rstrip("\\ "), depth)
    marked, other = (gold, candidate) if gold.endswith("%") else (candidate, gold)
    marked = marked[:-1].rstrip("\\ ")
    percent, value = number(marked), number(other)
    return (percent is not None and value is not None and percent == value * 100) or same(
        marked, other, depth
    )


def by_degrees(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare without the sign of degrees, except where the other text has radians or an angle is within."""
    sign = r"^\circ"
    if sign not in gold + candidate:
        return None
    if re.search(r"\\(?:pi|sin|cos|tan|cot|sec|csc)(?![a-z])", gold + candidate):
        gold, candidate = (
            re.sub(r"([0-9.]+|[a-z])\^\\circ ?", r"(\1\\cdot\\frac{\\pi}{180})", t) for t in (gold, candidate)
        )
        return same(gold.replace(sign, ""), candidate.replace(sign, ""), depth)
    gold, candidate = (
        re.sub(r"\^\\circ ?([CF]?)(?![A-Za-z])", lambda m: m[1] and rf"\text{{{m[1]}}}", t)
        for t in (gold, candidate)
    )
    return same(gold.replace(sign, ""), candidate.replace(sign, ""), depth)


def with_unit(text: str) -> tuple[str, str]:
    """Split a quantity into its number and its unit, which may be empty."""
    match = UNIT.fullmatch(text)
    bare = None if match else BARE_UNIT.fullmatch(text)
    match = match or bare
    if not match or r"\text" in match[1]:
        return text, ""
    name, power = match[2].casefold().strip(" ."), match[3] or ""
    if name.startswith(("square ", "sq ", "cubic ")):
        power, name = "3" if name[0] == "c" else "2", name.partition(" ")[2]
    spaced = text[match.end(1)] in " \\"
    singular = UNITS.get(name) or UNITS.get(name.removesuffix("s"))
    if singular is None or not (spaced or len(name) > 1):
        words = re.fullmatch(r"[a-z. /-]{2,}", name) and not NO_UNIT & set(re.split(r"[ ./-]+", name))
        if not words or (bare and (len(name) < 3 or not spaced or number(match[1]) is None)):
            return text, ""
    return match[1].strip(), (singular or name.removesuffix("s")) + power


def by_unit(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare quantities: a unit may be left out or added, and is not another."""
    (wanted, unit), (value, other) = with_unit(gold), with_unit(candidate)
    if not unit and not other:
        return None
    return (not unit or not other or unit == other) and same(wanted, value, depth)


def by_base(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare numbers with a base: the digits are the same, and the base where both name one."""
    wanted, value = BASED.fullmatch(gold), BASED.fullmatch(candidate)
    if not wanted and not value:
        return None
    if wanted and value:
        return wanted.groups() == value.groups()
    return (wanted[1] if wanted else gold) == (value[1] if value else candidate)


def by_matrix(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare matrices cell by cell, whatever their brackets."""
    match = [MATRIX_TEXT.fullmatch(text) for text in (gold, candidate)]
    if not all(match) or "\\begin" in "".join(m[2] for m in match if m):
        return None
    wanted, value = (
        [row.split("&") for row in re.split(r"\\\\", m[2].strip().removesuffix("\\\\"))] for m in match if m
    )
    return [len(row) for row in wanted] == [len(row) for row in value] and all(
        same(a.strip(), b.strip(), depth)
        for one, two in zip(wanted, value, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def items(text: str) -> tuple[str, list[str]]:
    r"""Split a text into (what holds its parts together: brackets, `union`, `list` or `one`; the parts)."""
    union = split_top(text, r"\\cup(?![a-z])")
    if len(union) > 1:
        return "union", union
    parts = split_top(text, "[,;]")
    if len(parts) == 1:
        brackets, inner = wrapped(text)
        parts = split_top(inner, "[,;]")
        if brackets and (len(parts) > 1 or brackets == "\\{\\}"):
            return brackets, parts
        parts = [inner if brackets == "()" else text]
    signs = [part for p in parts for part in both_signs(p)]
    return "list" if len(signs) > 1 else "one", signs


def by_items(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare tuples and intervals in order and with their brackets, sets and lists in any order."""
    gold, candidate = (re.sub(r"^[A-Za-z] ?\\in(?![a-z]) ?", "", text) for text in (gold, candidate))
    (kind, wanted), (other, values) = items(gold), items(candidate)
    if kind == other == "one":
        return None if (gold, candidate) == (wanted[0], values[0]) else same(wanted[0], values[0], depth)
    if kind != other and any(k == "one" and "=" in v[0] for k, v in ((kind, wanted), (other, values))):
        return None
    if relation(gold) != relation(candidate) or "union" in (kind, other):
        sets = all(
            k in ("union", "()", "[]", "(]", "[)") or relation(t)
            for k, t in ((kind, gold), (other, candidate))
        )
        return sets and len(wanted) + len(values) < 10 and expression(gold, candidate, True)
    if kind == "()" and other == "list":
        names = [value.partition("=")[0] for value in values]
        if all("=" in v for v in values) and sorted(set(names)) == names:
            other = kind
    loose = ("list", "one", r"\{\}")
    if (
        (kind != other and not (kind in loose and other in loose))
        or len(wanted) != len(values)
        or len(wanted) > 50
    ):
        return False
    if kind not in loose:
        return all(same(a, b, depth) for a, b in zip(wanted, values, strict=True))
    for one in wanted:
        place = next((i for i, value in enumerate(values) if same(one, value, depth)), None)
        if place is None:
            return False
        values.pop(place)
    return True


def relation(text: str) -> bool:
    """Whether a text is an inequality."""
    return re.search(r"[<>]|\\[lg]e(?![a-z])", text) is not None


def by_words(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare words as text, in capitals or not."""
    if not any(re.search(r"\\text|(?<![\\A-Za-z])[A-Za-z]{4}", text) for text in (gold, candidate)):
        return None
    gold, candidate = (re.sub(r"\\text|[{}().*\"'` ]", "", text).casefold() for text in (gold, candidate))
    return gold == candidate


def by_ratio(gold: str, candidate: str, depth: int) -> bool | None:
    """Compare ratios and times part by part."""
    wanted, values = gold.split(":"), candidate.split(":")
    if len(wanted) == len(values) == 1:
        return None
    return len(wanted) == len(values) and all(same(a, b, depth) for a, b in zip(wanted, values, strict=True))


def by_equation(gold: str, candidate: str, depth: int) -> bool:
    """Compare equations: `x = 5` is 5, and `2 + 3 = 5` too; `x^2 = 5` is not."""
    wanted, values = split_top(gold, "="), split_top(candidate, "=")
    if len(wanted) == len(values) == 1:
        return expression(gold, candidate)
    if len(wanted) == 1 and not relation(gold):
        named = VARIABLE.fullmatch(values[0]) or same(values[0], values[-1], depth)
        return bool(named) and same(gold, values[-1], depth)
    if len(values) == 1 and not relation(candidate):
        return bool(VARIABLE.fullmatch(wanted[0])) and same(wanted[-1], candidate, depth)
    if squeezed(wanted[0]) == squeezed(values[0]) and VARIABLE.fullmatch(wanted[0]):
        return same(wanted[-1], values[-1], depth)
    return expression(gold, candidate)
