"""What the command does: read runs, and write their page or serve it."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Console

from fr3e_jax.config import ConfigError
from fr3e_jax.config.values import Bounds, Name, PositiveNumber
from fr3e_jax.progress import bars
from fr3e_jax.run.storage import in_bucket, writing
from fr3e_jax.view.document import BESIDE, WITHIN, make_document, parts_script
from fr3e_jax.view.parts import RUNS_PART, PageParts, PartsOfScript
from fr3e_jax.view.runs import read_run, run_names
from fr3e_jax.view.server import PageServer

LARGE = 2e9  # bytes of rollouts whose page takes minutes to write
Port = Annotated[int, Bounds(least=0, most=65535)]
"""A port of TCP; 0 for a free one."""


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """Show runs on a page: charts over steps, the tree of each question, and a search over all rollouts."""

    runs: list[Name] = dataclasses.field(default_factory=list)
    """Run directories, here or gs://BUCKET/PATH; may stand first without `--runs`. Several are compared."""
    out: Name | None = None
    """The page to write; by default view.html in the first run, or here where that is in a bucket."""
    serve: bool = False
    """Serve the page on this machine instead of writing it; it shows each run as it is when it is opened."""
    port: Port = 8421
    """Where --serve listens, on 127.0.0.1 alone; 0 for a free port."""
    page_mb: PositiveNumber = 64.0
    """Most rollouts that are in the page itself; more lie in a folder beside it."""


def with_named_runs(argv: Sequence[str]) -> list[str]:
    """Arguments with `--runs` before run directories that stand first."""
    count = next((i for i, one in enumerate(argv) if one.startswith("-")), len(argv))
    return ["--runs", json.dumps(list(argv[:count])), *argv[count:]] if count else list(argv)


def view(options: ViewOptions, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Write or serve the page.

    Args:
      say: shows a line of results. warn: shows a line of what is missing.

    Raises:
      ConfigError: a run or an option is mistaken.
      StorageError: the page cannot be written.
    """
    if not options.runs:
        raise ConfigError("name a run directory, such as runs/quickstart-20260101-120000")
    if options.serve and options.out is not None:
        raise ConfigError("--out writes a page and --serve serves it; choose one")
    names = run_names(options.runs)
    title = ", ".join(names)

    def read() -> PageParts:
        return PageParts([read_run(path, name) for path, name in zip(options.runs, names, strict=True)])

    if options.serve:
        serve_page(PageServer(options.port, read, title), say, warn)
        return
    parts, page = read(), page_of(options)
    if (size := parts.rollout_bytes()) > LARGE:
        warn(
            f"warning: the page is of {size / 1e9:.0f} GB of rollouts and will be as large; --serve writes "
            "nothing"
        )
    console = Console(stderr=True)
    with bars(console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("steps of rollouts", total=sum(map(len, parts.steps)))
        written = write_page(parts, page, title, options.page_mb, lambda: progress.advance(bar))
    for line in messages_on(parts):
        warn(line)
    say(f"page: {written}")


def messages_on(parts: PageParts) -> list[str]:
    """List, for people, what of the runs is not on the page."""
    none = [
        f"{run.place} keeps no rollouts, and its page has charts alone; a run with --record.every 1 keeps "
        "those of every step"
        for run, steps in zip(parts.runs, parts.steps, strict=True)
        if not steps
    ]
    return [*parts.warnings, *none]


def page_of(options: ViewOptions) -> Path:
    """Tell where the page is written.

    Raises:
      ConfigError: in a bucket, or where no file can be.
    """
    first = options.runs[0]
    out = options.out or ("view.html" if in_bucket(first) else str(Path(first, "view.html")))
    if in_bucket(out):
        raise ConfigError(f"out {out} is in a bucket; write to a file here")
    if Path(out).is_dir():
        raise ConfigError(f"out {out} is a directory; name a file, such as {out.rstrip('/')}/view.html")
    if not Path(out).parent.is_dir():
        raise ConfigError(f"out {out} is in a directory that is not there; make it, or name another file")
    return Path(out)


def write_page(
    parts: PageParts, page: Path, title: str, page_mb: float, step_done: Callable[[], None]
) -> str:
    """Write the page: one file if it is small enough, else with a folder of parts beside it.

    Args:
      parts: of the page.
      page: file to write.
      title: names the runs.
      page_mb: most rollouts that are in the page itself.
      step_done: is called when a step is packed.

    Returns:
      What was written, for people.

    Raises:
      StorageError: the disk is full.
    """
    beside = page.with_name(f"{page.name}.parts")
    scripts = parts.all_scripts(step_done)
    with writing(page):
        within, whole = first_of(scripts, page_mb * 1e6)
        if whole:
            runs = (RUNS_PART, parts.pack_runs())
            inside = itertools.chain([runs], itertools.chain.from_iterable(within))
            replace_file(page, make_document(title, WITHIN, "", inside))
            shutil.rmtree(beside, ignore_errors=True)  # of an earlier page
            return str(page)
        shutil.rmtree(beside, ignore_errors=True)
        for script in itertools.chain(within, scripts):
            file = beside / f"{script[0][0]}.js"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(parts_script(script), encoding="utf-8")
        replace_file(page, make_document(title, BESIDE, beside.name, [(RUNS_PART, parts.pack_runs())]))
    return f"{page}, with its rollouts in {beside}"


def first_of(scripts: Iterator[PartsOfScript], most: float) -> tuple[list[PartsOfScript], bool]:
    """Take scripts until their parts come to more than `most` bytes on the page.

    Returns:
      (scripts, whether these are all).
    """
    taken, size = [], 0.0
    for script in scripts:
        taken.append(script)
        size += sum(4 / 3 * len(part) for _, part in script)  # in base64
        if size > most:
            return taken, False
    return taken, True


def replace_file(file: Path, pieces: Iterable[str]) -> None:
    """Write a file piece by piece beside its place, and move it there when it is whole."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as opened:
            opened.writelines(pieces)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def serve_page(server: PageServer, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C."""
    for line in messages_on(server.parts):
        warn(line)
    say(f"{server.address} (Ctrl-C ends it)")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
