r"""Where in a response its answer stands.

Every function takes time linear in the text, whatever the text: responses come from a model that is rewarded
for them. A box or tag that is opened last and never closed is no answer at all, not even if an earlier one
is closed: the model took its earlier answer back, or was cut off within the new one.
"""

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
CLAIM = re.compile(r"answer\s{0,3}(?:is|:)[\s:*]{0,5}", re.IGNORECASE)
OPENING = re.compile(r"(?:\s|\$|\\[\[(])+")
WRAPPED = r"[*$({]{0,4}(?:\\(?:text[a-z]{0,2}|math(?:rm|bf)|mbox)\{\(?)?([A-Z])"
CHOICE = re.compile(WRAPPED + r"(?:[)}.:*$\s]{0,8}\Z|[).:]\*{0,2}\s)")
CLAIMED = re.compile(WRAPPED + r"(?![A-Za-z0-9'^_/+=-])")
LETTER_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
NUMERATOR = re.compile(r"-?\\[dtc]?frac\{(-?[0-9.,]{1,1000})\}\{\Z")


def has_box(text: str) -> bool:
    """Whether a box is opened."""
    return BOX.search(text) is not None


def braced(text: str, start: int) -> str | None:
    r"""Content of the brace at `start`, or None if it is not closed; \{ and \} are no braces."""
    depth = 0
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[start + 1 : match.start()]
    return None


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{}; of `\boxed 5`, up to a space or `$`.

    None where there is none, or the last is not closed.
    """
    ends = [match.end() for match in BOX.finditer(text)]
    if not ends:
        return None
    end = ends[-1]
    while text[end : end + 1].isspace():
        end += 1
    if text[end : end + 1] == "{":
        inner = braced(text, end)
        return inner if inner is None else inner.strip()
    words = re.split(r"[\s$]", text[end:], maxsplit=1)
    return words[0].rstrip(".,;") or None


def answer_tag(text: str) -> str | None:
    """What stands between the last <answer> and </answer>; None where there is none, or it is not closed."""
    start, end = text.rfind("<answer>"), text.rfind("</answer>")
    return text[start + len("<answer>") : end].strip() if 0 <= start < end else None


def last_line(text: str) -> str:
    """The last line that is more than spaces; empty where there is none."""
    return text.rstrip().rpartition("\n")[2].strip()


def last_number(text: str) -> str | None:
    r"""The last number as it is written: with its sign, separators, denominator, exponent and percent sign.

    None where there is no digit.
    """
    end = len(text)
    while end and text[end - 1] not in "0123456789":
        end -= 1
    start = run_start(text, end, "0123456789.,")
    if start == end:
        return None
    run = text[start:end]
    if not THOUSANDS.fullmatch(run):
        run = run.rpartition(",")[2]
        run = run if run.count(".") <= 1 else run.rpartition(".")[2]
        start = end - len(run)
    over = text[max(0, start - 1100) : start]
    fraction = NUMERATOR.search(over) if over.endswith("}{") else None
    if fraction:
        run, start = f"{fraction[0]}{run}}}", start - len(fraction[0])
    elif over.endswith(("/", "e", "E", "e-", "E-", "e+", "E+")):
        middle = start - (1 if over[-1] in "/eE" else 2)
        first = run_start(text, middle, "0123456789.,")
        if first < middle:
            run, start = text[first:end], first
    if text[start - 1 : start] in ("-", "\u2212") and not text[start - 2 : start - 1].isalnum():
        run = "-" + run
    return run + ("%" if text[end : end + 2].lstrip("\\").startswith("%") else "")


def run_start(text: str, end: int, characters: str) -> int:
    """Find the beginning of the run of `characters` that ends at `end`."""
    start = end
    while start and text[start - 1] in characters:
        start -= 1
    return start


def last_claim(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its sentence; None without one.

    Behind a formula it ends with it, unless the sentence goes on with "or" or "and".
    """
    ends = [match.end() for match in CLAIM.finditer(text)]
    if not ends:
        return None
    opening = OPENING.match(text, ends[-1])
    line = text[opening.end() if opening else ends[-1] :].partition("\n")[0]
    formula, _, rest = line.partition("$")
    if opening and opening[0].endswith("$") and not re.match(r"\s*,?\s*(?:or|and)(?![a-z])", rest):
        return formula.strip(" *.") or None
    return re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip(" *.") or None


def last_formula(text: str) -> str | None:
    """What stands between the last two dollar signs; None without them, or if the last is one of money."""
    end = text.rfind("$")
    start = text.rfind("$", 0, max(end, 0))
    money = text[end - 1 : end] == "\\" or text[end + 1 : end + 2].isdigit()
    return text[start + 1 : end].strip() or None if 0 <= start < end and not money else None


def choice_letter(text: str) -> str | None:
    """The capital letter that is chosen, or None.

    A box decides alone. Otherwise the last "answer is B"; else a last line that is "B." or starts with it;
    else the last "(B)".
    """
    if has_box(text):
        return leading(CHOICE, last_box(text) or "")
    claims = [match.end() for match in CLAIM.finditer(text)]
    if claims:
        return leading(CLAIMED, text[claims[-1] :])
    letters = LETTER_IN_BRACKETS.findall(text)
    return leading(CHOICE, last_line(text)) or (letters[-1] if letters else None)


def leading(pattern: re.Pattern[str], text: str) -> str | None:
    r"""The letter that a text is or begins with, as in `\text{(B)}` or `B) 42`."""
    match = pattern.match(text.lstrip()[:40])
    return match[1] if match else None
