"""Rows of files: JSON lines, CSV, TSV or parquet.

What is wrong in a file is an error that names it and the line.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fr3e_jax.config import ConfigError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""(Where a row stands, for messages; the row)."""


def lines_of(path: Path, shown: str) -> Iterator[str]:
    """Yield the lines of a text file.

    Raises:
      ConfigError: one is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # A file may begin with a byte order mark.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ConfigError(f"{shown}, line {number}: is not UTF-8; convert the file") from None


def json_rows(path: Path, shown: str) -> Rows:
    """The rows of a file with a JSON object on each line; empty lines are none.

    Raises:
      ConfigError: a line is something else.
    """
    for number, line in enumerate(lines_of(path, shown), 1):
        if line.strip():
            place = f"{shown}, line {number}"
            yield place, an_object(parse_json(line, place), place)


def json_list_rows(path: Path, shown: str) -> Rows:
    """The rows of a file that is one JSON list, or has an object on each line.

    Raises:
      ConfigError: it is neither.
    """
    text = "".join(lines_of(path, shown))
    if not text.lstrip().startswith("["):
        yield from json_rows(path, shown)
        return
    for number, row in enumerate(parse_json(text, shown), 1):
        place = f"{shown}, row {number}"
        yield place, an_object(row, place)


def parse_json(text: str, place: str) -> Any:
    """Parse JSON text.

    Raises:
      ConfigError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: is not JSON ({error}); correct it") from None


def an_object(row: Any, place: str) -> Row:
    """Return what was parsed, if it is a row.

    Raises:
      ConfigError: it is not a JSON object.
    """
    if not isinstance(row, dict):
        raise ConfigError(f'{place}: is not an object {{"column": value, ...}}; correct it')
    return row


def csv_rows(path: Path, shown: str) -> Rows:
    """The rows of a CSV file whose first line names the columns.

    Columns are separated by what the first line has most of: commas, semicolons or tabs.

    Raises:
      ConfigError: a row has more or fewer columns, or is no CSV.
    """
    first = next(lines_of(path, shown), "")
    unquoted = re.sub(r'"[^"]*"', "", first)
    return separated_rows(path, shown, max(",;\t", key=unquoted.count))


def tsv_rows(path: Path, shown: str) -> Rows:
    """The rows of a file whose columns are separated by tabs, and whose first line names them.

    Raises:
      ConfigError: a row has more or fewer columns, or cannot be read.
    """
    return separated_rows(path, shown, "\t")


def separated_rows(path: Path, shown: str, separator: str) -> Rows:
    """The rows of a file whose columns are separated by a character, and whose first line names them.

    Raises:
      ConfigError: a row has more or fewer columns, or cannot be read.
    """
    kind = "TSV" if path.suffix == ".tsv" else "CSV"
    reader = csv.reader(lines_of(path, shown), strict=True, delimiter=separator)
    header: list[str] | None = None
    while True:
        place = f"{shown}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{place}: is not {kind} ({error}); correct it") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if len(set(header)) < len(header):
                raise ConfigError(f"{place}: two columns have one name; rename one")
            continue
        if len(row) != len(header):
            raise ConfigError(
                f"{place}: has {len(row)} columns, but the first line names {len(header)}; correct it"
            )
        yield place, dict(zip(header, row, strict=True))


def parquet_rows(path: Path, shown: str) -> Rows:
    """The rows of a parquet file.

    Raises:
      ConfigError: it is damaged.
    """
    import pyarrow.parquet  # most runs read none, and it takes a while

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{shown}, after row {number}: is damaged ({cause}); get the file again") from None


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".parquet": parquet_rows,
    ".jsonl": json_rows,
    ".json": json_list_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
