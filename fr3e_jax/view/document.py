"""The HTML file: markup, style and script of `page/` in one, with the chart library and the data."""

import base64
import functools
import hashlib
import html
import importlib.resources
import re
from collections.abc import Iterable

from fr3e_jax.view.packing import in_base64, safe_json

SCRIPTS = "text parts state charts run tables tokens tree forks compare find main".split()
"""Files of JavaScript in `page/`, in the order in which they stand on the page."""
WITHIN, BESIDE, SERVED = "inline", "beside", "served"
"""Where the parts are: in the page, in a folder of scripts beside it, or with the page's server."""


@functools.cache
def page_file(name: str) -> str:
    """The text of a file that the browser runs or lays out, by its name in `page/`."""
    return (importlib.resources.files("fr3e_jax.view") / "page" / name).read_text(encoding="utf-8")


def page_script() -> str:
    """Join what the browser runs: the chart library with its licence, and the page's own files."""
    licence = page_file("uPlot.LICENSE").strip()
    own = "\n".join(page_file(f"{name}.js") for name in SCRIPTS)
    return f"/*\n{licence}\n*/\n{page_file('uPlot.min.js')}\n(() => {{\n'use strict';\n{own}\n}})();\n"


def make_document(title: str, where: str, folder: str, parts: Iterable[tuple[str, bytes]]) -> Iterable[str]:
    """Write the page, piece by piece.

    Args:
      title: names the runs.
      where: the parts are that are not given here: `WITHIN`, `BESIDE` or `SERVED`.
      folder: of these parts, relative to the page.
      parts: (name, packed part) that stand in the page.
    """
    code = page_script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    # What the browser may load: this script, and where parts are apart, scripts of the page's own place.
    apart = {WITHIN: "", BESIDE: " file: 'self'", SERVED: " 'self'"}[where]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{apart}"
    )
    facts = {"where": where, "folder": folder}
    values = {
        "title": html.escape(title),
        "policy": html.escape(policy),
        "style": page_file("uPlot.min.css") + page_file("page.css"),
        "facts": safe_json(facts),
        "script": code,
    }
    before, after = page_file("page.html").split("{{parts}}\n")
    yield fill_in(before, values)
    for part_name, part in parts:
        yield f'<script type="text/plain" data-part="{part_name}">{in_base64(part)}</script>\n'
    yield fill_in(after, values)


def fill_in(template: str, values: dict[str, str]) -> str:
    """Put values into the places `{{NAME}}` of a template, in one pass: a value holds no place."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], template)


def parts_script(parts: Iterable[tuple[str, bytes]]) -> str:
    """Write parts, name and packed part, as a script, which hands them to the page that loads it."""
    return "".join(f'fr3eViewPart("{name}","{in_base64(part)}")\n' for name, part in parts)
