"""Parts of the page's data: a head of JSON and arrays, compressed, as `page/parts.js` reads them."""

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

NO_NUMBER = 65535
"""Stands for a number that is missing, or not finite, among thousandths."""


def pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Compress a part (zlib): length of the head as a little-endian uint32, the head, the arrays.

    Args:
      head: what JSON can say; without NaN.
      arrays: name -> one-dimensional array of uint16, int32 or uint32. The head's `arrays` says
        name -> (dtype, offset in bytes behind the head, count).
    """
    places: dict[str, tuple[str, int, int]] = {}
    blocks: list[bytes] = []
    offset = 0
    for name, array in (arrays or {}).items():
        block = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        block += b"\0" * (-len(block) % 4)
        places[name] = (array.dtype.name, offset, len(array))
        blocks.append(block)
        offset += len(block)
    text = json.dumps({**head, "arrays": places}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    encoded = text.encode("utf-8", "replace")  # half of a surrogate pair, which no UTF-8 holds, becomes "?"
    encoded += b" " * (-len(encoded) % 4)
    return zlib.compress(struct.pack("<I", len(encoded)) + encoded + b"".join(blocks), 6)


def in_base64(part: bytes) -> str:
    """Write a packed part in base64, which holds nothing that means something to HTML or JavaScript."""
    return base64.b64encode(part).decode()


def thousandths(values: np.ndarray) -> np.ndarray:
    """Round the sizes of numbers to uint16 thousandths, at most 65.534; `NO_NUMBER` if not finite."""
    values = np.abs(np.asarray(values, np.float32))
    scaled = np.minimum(np.round(np.where(np.isfinite(values), values, 0.0) * 1000), NO_NUMBER - 1)
    return np.where(np.isfinite(values), scaled, NO_NUMBER).astype(np.uint16)


def safe_json(value: Any) -> str:
    """Write JSON that may stand inside of a script element."""
    text = json.dumps(value, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def cut_short(text: str, length: int) -> str:
    """Cut a text to a number of characters, the last of which is then `…`."""
    return text if len(text) <= length else text[: length - 1] + "…"
