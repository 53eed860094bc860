"""Reads the parts of a page of runs as the page reads them."""

import base64
import json
import re
import struct
import zlib

import numpy as np


def unpacked(part):
    """(head, name -> array) of a part, read as the page reads it."""
    raw = zlib.decompress(part)
    (size,) = struct.unpack_from("<I", raw)
    head = json.loads(raw[4 : 4 + size])
    arrays = {
        name: np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"), count, 4 + size + offset)
        for name, (dtype, offset, count) in head["arrays"].items()
    }
    return head, arrays


def part_of(page, name):
    found = re.search(rf'data-part="{name}">([^<]*)</script>', page)
    return unpacked(base64.b64decode(found[1]))
