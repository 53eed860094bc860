"""Files of a run in a directory, or in a bucket (`gs://BUCKET/PATH`)."""

import shutil
from pathlib import Path

from etils import epath

from fr3e_jax.config import ConfigError

BUCKET = "gs://"


def location(path: str) -> epath.Path:
    """A directory, or a place in a bucket.

    Raises:
      ConfigError: a bucket, and what reads them is not installed; or another kind of address.
    """
    scheme, colon, _ = path.partition("://")
    if not colon:
        return epath.Path(path)
    if scheme != "gs":
        raise ConfigError(f"{path}: a directory, or {BUCKET}BUCKET/PATH")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs gcsfs: pip install 'fr3e_jax[tpu]'") from None
    return epath.Path(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place whatever the working directory is."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def in_bucket(path: epath.PathLike) -> bool:
    """Whether it is a place in a bucket."""
    return str(path).startswith(BUCKET)


def write_atomically(file: epath.PathLike, text: str) -> None:
    """Replace a file so that a kill leaves the old or the new one."""
    file = epath.Path(file)
    if in_bucket(file):  # where a file appears whole
        file.write_text(text)
        return
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def upload(source: Path, target: epath.Path) -> None:
    """Copy a file, or a directory and all in it, to a bucket."""
    if source.is_dir():
        for each in sorted(source.iterdir()):
            upload(each, target / each.name)
        return
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)
