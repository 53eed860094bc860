"""Files of JSON lines: one object a line, in UTF-8, readable at whatever moment their writer is killed."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

# Ends of lines to some readers, which JSON leaves as they are.
LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


@dataclasses.dataclass(frozen=True)
class Lines:
    """The objects of a file of JSON lines.

    objects: (number of the line from 1, object) of each whole line. damaged: numbers of the lines that hold
    no object. cut: number of a last line without its end, which a killed writer leaves; None where there is
    none.
    """

    file: epath.Path
    objects: list[tuple[int, dict[str, Any]]]
    damaged: list[int]
    cut: int | None

    def warnings(self) -> list[str]:
        """A line for people on each kind of line that is skipped."""
        messages = []
        if self.cut is not None:
            messages.append(f"warning: {self.file}: the last line, {self.cut}, is cut short, and is skipped")
        if self.damaged:
            numbers = ", ".join(map(str, self.damaged[:10])) + (", ..." if len(self.damaged) > 10 else "")
            which = f"lines {numbers} are" if len(self.damaged) > 1 else f"line {numbers} is"
            messages.append(f"warning: {self.file}: {which} damaged, and skipped")
        return messages


def read_lines(file: epath.PathLike) -> Lines:
    """Read a file of JSON lines; of one that is not there, no lines.

    A last line without its end is skipped even where it is whole: a writer that goes on replaces it.
    """
    file = epath.Path(file)
    objects: list[tuple[int, dict[str, Any]]] = []
    damaged: list[int] = []
    cut = None
    # Bytes are split at \n and \r alone, which JSON never holds; text would be at other characters too.
    raw = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(raw, start=1):
        if not line.endswith(b"\n"):
            cut = number
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append((number, value))
        else:
            damaged.append(number)
    return Lines(file, objects, damaged, cut)


def to_line(value: Mapping[str, Any]) -> bytes:
    """Encode an object as one line: letters of all scripts as they are.

    What is not text, such as half of a surrogate pair, is escaped, and is read as it was.
    """
    text = json.dumps(value, ensure_ascii=False).translate(LINE_ENDS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


class LineWriter:
    """Appends objects to a file of JSON lines on this machine, behind its last whole line."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab+")
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def write(self, values: Iterable[Mapping[str, Any]], sync: bool = False) -> None:
        """Append objects, and hand them to the operating system.

        Args:
          values: objects, a line each.
          sync: wait until they are on the disk.
        """
        self.file.write(b"".join(map(to_line, values)))
        self.file.flush()
        if sync:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()
