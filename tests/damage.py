"""Damaged run directories: copies of a run in which a byte, a file, a folder or a key is not as it was."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

NEWEST, OLDER = "checkpoints/4", "checkpoints/2"

Damage = Callable[[Path], None]


def linked_copy(run: Path, to: Path) -> Path:
    """A copy of a run that shares its files, of which none may be written in place."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(run, to, copy_function=os.link, symlinks=True))


def write(file: Path, content: bytes) -> None:
    """Give a file another content, and not the file that it shares."""
    remove(file)
    file.write_bytes(content)


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def of_bytes(change: Callable[[bytearray], object], name: str) -> Damage:
    """What changes the content of a file."""

    def damage(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        change(content)
        write(run / name, bytes(content))

    return damage


def flip(content: bytearray, rng: random.Random) -> None:
    """Change bits of one byte."""
    if content:
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)


def zero(content: bytearray, rng: random.Random, count: int = 64) -> None:
    """Zero bytes in a row, as a lost sector does."""
    start = rng.randrange(max(1, len(content) - count))
    content[start : start + count] = bytes(len(content[start : start + count]))


def exchange(one: str, other: str) -> Damage:
    """What makes two files or folders trade places."""

    def damage(run: Path) -> None:
        (run / one).rename(run / "moved")
        (run / other).rename(run / one)
        (run / "moved").rename(run / other)

    return damage


def of_files(run: Path, rng: random.Random) -> Iterator[tuple[str, Damage]]:
    """Each file of the newest checkpoint, and of the run: lost, empty, cut, changed, a folder."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file()]
    names = [str(file.relative_to(run)) for file in files]
    for name in [n for n in names if not n.startswith((OLDER, "model/"))]:
        yield f"rm {name}", lambda run, name=name: remove(run / name)
        yield f"empty {name}", of_bytes(lambda x: x.clear(), name)
        yield f"half of {name}", of_bytes(lambda x: x.__delitem__(slice(len(x) // 2, None)), name)
        yield f"longer {name}", of_bytes(lambda x: x.extend(b"\0{}\n"), name)
        for number in range(6):
            own = random.Random(rng.random())
            yield f"byte {number} of {name}", of_bytes(lambda x, own=own: flip(x, own), name)
        own = random.Random(rng.random())
        yield f"64 zeros in {name}", of_bytes(lambda x, own=own: zero(x, own), name)

        def folder(run: Path, name: str = name) -> None:
            remove(run / name)
            (run / name).mkdir()

        yield f"folder {name}", folder


def of_folders(run: Path) -> Iterator[tuple[str, Damage]]:
    """Each folder of a checkpoint: lost, empty, a file, that of another checkpoint; and folders too many."""
    folders = [path for path in sorted((run / NEWEST).rglob("*")) if path.is_dir()]
    names = [NEWEST, *(str(folder.relative_to(run)) for folder in folders), "checkpoints"]
    for name in names:
        yield f"rm -r {name}", lambda run, name=name: remove(run / name)

        def empty(run: Path, name: str = name) -> None:
            remove(run / name)
            (run / name).mkdir()

        def file(run: Path, name: str = name) -> None:
            remove(run / name)
            (run / name).write_text("a file")

        yield f"empty folder {name}", empty
        yield f"file {name}", file
    for item in ("params", "optimizer", "carried", "progress"):
        yield f"{item} of another step", exchange(f"{NEWEST}/{item}", f"{OLDER}/{item}")
        if item != "params":
            yield f"params as {item}", exchange(f"{NEWEST}/{item}", f"{NEWEST}/params")
    yield "checkpoints that trade places", exchange(NEWEST, OLDER)
    for name in ("99", "0", "007", "-3", "4x", "99999999999999", "4.orbax-checkpoint-tmp", "step_9", "٣"):
        yield f"mkdir checkpoints/{name}", lambda run, name=name: (run / "checkpoints" / name).mkdir()
        yield f"touch checkpoints/{name}", lambda run, name=name: (run / "checkpoints" / name).touch()

        def copy(run: Path, name: str = name) -> None:
            shutil.copytree(run / OLDER, run / "checkpoints" / name, copy_function=os.link)

        yield f"cp checkpoints/2 checkpoints/{name}", copy
    yield "a link to itself", lambda run: (run / "checkpoints/99").symlink_to("99")


def paths_of(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key in nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths_of(inner, (*path, key))


def changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [] if isinstance(value, dict) else 7


def of_keys(run: Path) -> Iterator[tuple[str, Damage]]:
    """Each key of config.yaml and of every JSON file of a checkpoint: lost, changed, renamed."""
    documents = {"config.yaml": (yaml.safe_load, yaml.safe_dump)}
    for file in sorted((run / NEWEST).rglob("*")):
        if file.is_file() and file.read_bytes()[:1] == b"{":
            documents[str(file.relative_to(run))] = (json.loads, json.dumps)
    for name, (load, dump) in documents.items():
        for number, path in enumerate(paths_of(load((run / name).read_text()))):
            if len(path) > 2 and number % 7:
                continue  # a few of the many arrays
            for what in ("lost", "changed", "renamed"):

                def damage(
                    run: Path, name: str = name, load=load, dump=dump, path: tuple = path, what: str = what
                ) -> None:
                    whole = load((run / name).read_text())
                    inner = whole
                    for key in path[:-1]:
                        inner = inner[key]
                    value = inner.pop(path[-1])
                    if what == "changed":
                        inner[path[-1]] = changed(value)
                    elif what == "renamed":
                        inner[f"{path[-1]}_"] = value
                    write(run / name, dump(whole).encode())

                yield f"{what} {'.'.join(map(str, path))} of {name}", damage
    for text in (
        "",
        "\n",
        "{}",
        "[]",
        "3",
        "a: [",
        "a: &a {b: *a}",
        "? {a: 1}\n: 2",
        "1: 2",
        "\x00",
        "a: 2001-99-99",
    ):
        yield f"config.yaml {text!r}", lambda run, text=text: write(run / "config.yaml", text.encode())


def damages(run: Path) -> list[tuple[str, Damage]]:
    """(name, what does it to a copy) of every damage."""
    rng = random.Random(0)
    return [*of_files(run, rng), *of_folders(run), *of_keys(run)]
