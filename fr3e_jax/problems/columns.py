"""Questions and answers out of rows: which columns they are in, and what the columns hold."""

import decimal
from collections.abc import Iterator
from typing import Any, NamedTuple

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.datasets import DataSet
from fr3e_jax.problems.own_task import is_own, own_scorer
from fr3e_jax.problems.rows import Row, Rows
from fr3e_jax.rewards.extract import last_box
from fr3e_jax.types import Problem, Turns

QUESTIONS = ("question", "problem", "prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "final_answer", "solution")
SOLUTION = "solution"
ROLES = {"human": "user", "gpt": "assistant"}  # other names that chats have for them


class Columns(NamedTuple):
    """Names of the columns that a problem is read from, and of its scorer.

    solution: None where none is read. by_row: whether the scorer is the user's own and sees the whole row.
    """

    prompt: str
    answer: str
    solution: str | None
    scorer: str
    by_row: bool = False


class BadRow(ConfigError):
    """A row that holds no problem; the message says which and why."""


def problems_of(
    source: SourceConfig, data: DataSet | None, rows: Rows, solutions: bool = False
) -> Iterator[Problem | BadRow]:
    """Read the problems that rows hold; in place of one, why a row holds none.

    Args:
      source, data: say how rows are read.
      rows: in their order.
      solutions: read the column of the solution too.

    Raises:
      ConfigError: the first row lacks a column, or a column holds something else than is asked for.
    """
    where = {column: {str(value) for value in values} for column, values in source.where.items()}
    columns: Columns | None = None
    first = True
    problem: Problem | BadRow | None
    for place, row in rows:
        try:
            if any(as_text(value_at(row, c, place, "where"), c, place) not in where[c] for c in where):
                continue
            # By the first row: a later one without the column is an error, not read from another.
            columns = columns or columns_of(source, row, solutions)
            problem = problem_of(source, data, row, place, columns)
        except ConfigError as error:
            if first and not isinstance(error, BadRow):  # a wrong setting
                raise
            problem = BadRow(str(error))
        first = False
        if problem is not None:
            yield problem


def columns_of(source: SourceConfig, row: Row, solutions: bool) -> Columns:
    """Choose the columns of a source: those that it names, else the usual ones that its first row has.

    Raises:
      ConfigError: its scorer is a file that cannot be imported, or has no function to score with.
    """
    prompt = source.prompt or next((name for name in QUESTIONS if name in row), QUESTIONS[0])
    answer = source.answer or next((name for name in ANSWER_COLUMNS if name in row), ANSWER_COLUMNS[0])
    solution = (source.solution or SOLUTION) if solutions else None
    scorer = source.scorer or "math"
    return Columns(prompt, answer, solution, *(own_scorer(scorer) if is_own(scorer) else (scorer,)))


def problem_of(
    source: SourceConfig, data: DataSet | None, row: Row, place: str, columns: Columns
) -> Problem | None:
    """Read the problem of a row; None where a data set is known to leave some unanswered.

    Args:
      source, data: say how it is read.
      row: column -> value.
      place: where the row stands, for messages.
      columns: which are read.

    Raises:
      BadRow: the question or the answer is empty, or cannot be had out of its column.
      ConfigError: it lacks a column, or one holds something else than is asked for.
    """
    prompt, answer = columns.prompt, columns.answer
    asked = turns_of(value_at(row, prompt, place, "prompt"))
    refuse_other_turn(row, prompt, place)
    before: Turns = ()
    if is_chat(asked):
        asked, before = chat_of(asked, prompt, place)
    if asked is None or asked != asked:  # how tables write that there is none
        asked = ""
    if not isinstance(asked, str):
        raise ConfigError(
            f'{place}: column {prompt!r} is neither text nor a chat, [{{"role": ..., "content": ...}}]; set '
            "prompt to the text in it, such as extra_info.question"
        )
    question = checked(asked.strip(), "question", prompt, place)
    if data and data.choices:
        question += choices_of(value_at(row, data.choices, place, "choices"), data.choices, place)
    written = as_text(answer_of(value_at(row, answer, place, "answer")), answer, place)
    if not written and data and data.unanswered:
        return None
    return Problem(
        question.strip(),
        checked(answer_in(written, source.answer_is, answer, place), "answer", answer, place),
        columns.scorer,
        source.name,
        facts=row if columns.by_row else None,
        before=before,
        place=place,
        solution=solution_of(row, columns.solution, place) if columns.solution else "",
    )


def solution_of(row: Row, column: str, place: str) -> str:
    """The worked solution of a row, as text that is not empty.

    Raises:
      BadRow: it is empty.
      ConfigError: there is no such column.
    """
    value = answer_of(value_at(row, column, place, "solution"))
    return checked(as_text(value, column, place), "solution", column, place)


def turns_of(value: Any) -> Any:
    """A chat with `from` and `value` in its turns as one with `role` and `content`; other values as is."""
    if isinstance(value, list) and all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in value):
        return [{"role": ROLES.get(t["from"], t["from"]), "content": t["value"]} for t in value]
    return value


def answer_of(value: Any) -> Any:
    """Of a chat what the assistant says behind the last question; other values as is."""
    turns = turns_of(value)
    if not turns or not is_chat(turns):
        return value
    asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    return next((turn["content"] for turn in turns[asked:] if turn["role"] == "assistant"), "")


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list) and all(
        isinstance(t, dict) and {"role", "content"} <= t.keys() for t in value
    )


def chat_of(turns: list[dict[str, Any]], column: str, place: str) -> tuple[str, Turns]:
    """Split a chat into the last turn of the user, which is the question, and the turns before it.

    Raises:
      BadRow: the user has no turn.
      ConfigError: a turn is no text.
    """
    asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if asked is None:
        raise BadRow(f"{place}: the chat of column {column!r} has no turn of the user; take the row out")
    for i, turn in enumerate(turns[: asked + 1]):
        if not isinstance(turn["content"], str):
            raise ConfigError(f"{place}: turn {i} of the chat of column {column!r} is not text; convert it")
    before = [
        (str(turn["role"]), checked_characters(turn["content"], "chat", place)) for turn in turns[:asked]
    ]
    return turns[asked]["content"], tuple((role, text) for role, text in before if text.strip())


def refuse_other_turn(row: Row, prompt: str, place: str) -> None:
    """Refuse a setting such as messages.0.content where that turn is not the user's.

    Raises:
      ConfigError: it is the system's, or an answer.
    """
    path = prompt.split(".")
    if prompt in row or path[-1] != "content" or len(path) < 3:
        return
    turn = value_at(row, ".".join(path[:-1]), place, "prompt")
    if isinstance(turn, dict) and turn.get("role", "user") != "user":
        chat = ".".join(path[:-2])
        raise ConfigError(
            f"{place}: {prompt} is a turn of the {turn['role']}, not the question; set prompt to {chat}, the "
            "whole chat"
        )


def choices_of(value: Any, column: str, place: str) -> str:
    """The choices of a question, each on a line of its own behind its letter.

    Raises:
      ConfigError: they are not written as {"label": [letters], "text": [choices]}.
    """
    try:
        return "".join(f"\n{a}) {b}" for a, b in zip(value["label"], value["text"], strict=True))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{place}: column {column!r} has no equally long `label` and `text`") from None


def value_at(row: Row, column: str, place: str, setting: str) -> Any:
    """The value of a column; behind dots in its name are keys of objects and numbers of list elements.

    Raises:
      ConfigError: there is none.
    """
    if column in row:
        return row[column]
    here: Any = row
    try:
        for key in column.split("."):
            here = here[int(key)] if isinstance(here, list) else here[key]
    except (LookupError, TypeError, ValueError):
        raise ConfigError(
            f"{place}: there is no column {column!r}; the columns are {', '.join(row)}; set {setting} to one"
        ) from None
    return here


def as_text(value: Any, column: str, place: str) -> str:
    """Write a value as the text that is compared: whole numbers without a point, lists with commas.

    Raises:
      ConfigError: it is an object.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return ", ".join(as_text(element, column, place) for element in value)
    if isinstance(value, (float, decimal.Decimal)):
        number = decimal.Decimal(str(value))
        if not number.is_finite():  # how tables write that there is none
            return ""
        return str(int(number)) if number == number.to_integral_value() else f"{number:f}"
    raise ConfigError(f"{place}: column {column!r} is neither text nor a number; name a value in it")


def checked(text: str, what: str, column: str, place: str) -> str:
    """Return a text if it can be a question, an answer or a solution.

    Raises:
      BadRow: it is empty, or cannot be encoded.
    """
    if not text:
        raise BadRow(f"{place}: the {what} (column {column!r}) is empty; fill it in, or take the row out")
    return checked_characters(text, what, place)


def checked_characters(text: str, what: str, place: str) -> str:
    """Return a text if it can be encoded.

    Raises:
      BadRow: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{place}: the {what} has half a surrogate pair, which is no character") from None
    return text


def answer_in(text: str, answer_is: str | None, column: str, place: str) -> str:
    """Take the answer out of a column's text.

    Raises:
      BadRow: it holds none.
    """
    if answer_is == "last_box":
        answer, what = last_box(text), "\\boxed{}"
    elif answer_is == "after_hashes":
        _, hashes, after = text.rpartition("####")
        answer, what = (after.strip() if hashes else None), "####"
    else:
        return text
    if answer is None:
        raise BadRow(
            f"{place}: column {column!r} has no {what}; correct it, take the row out, or change answer_is"
        )
    return answer
