"""Files of a run in a directory, or in a bucket (`gs://BUCKET/PATH`)."""

import errno
import functools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.waiting import HostError

BUCKET = "gs://"


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Texts of tensorstore and safetensors for errors of the operating system.
FROM_SYSTEM = re.compile(r"\[os_error_code=|\[OS error|Os \{ code")
DETAILS = re.compile(r"\s*\[(source locations|tensorstore_spec)=.*", re.DOTALL)


class StorageError(RuntimeError):
    """A disk or a bucket refused a write, or cannot be read now; the message says which and why."""


def location(path: str) -> epath.Path:
    """Parse the name of a directory, or of a place in a bucket.

    Raises:
      ConfigError: a bucket that cannot be used from here, or another kind of address.
    """
    scheme, colon, rest = path.partition("://")
    if not colon:
        return epath.Path(path)
    bucket, _, inside = rest.partition("/")
    if scheme != "gs" or not bucket or not inside.strip("/"):
        raise ConfigError(f"{path} is neither a directory nor of the form {BUCKET}BUCKET/PATH")
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} needs gcsfs: pip install 'gcsfs>=2025.3'") from None
    # A listing that is kept does not show what other hosts and tensorstore write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    refuse_unusable(bucket)
    return epath.Path(path)


@functools.cache
def refuse_unusable(bucket: str) -> None:
    """Refuse a bucket that is not there or not open to this account, with the request that orbax makes too.

    Raises:
      ConfigError: with what to do.
    """
    from google.api_core.exceptions import Forbidden, NotFound, Unauthorized
    from google.auth.exceptions import DefaultCredentialsError, RefreshError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    place = BUCKET + bucket
    try:
        storage.Client().get_bucket(bucket, retry=DEFAULT_RETRY.with_timeout(30))
    except NotFound:
        raise ConfigError(
            f"there is no bucket {place}: `gcloud storage buckets create {place}`, or name another"
        ) from None
    except (DefaultCredentialsError, RefreshError, Unauthorized):
        raise ConfigError(
            f"no credentials for {place}: run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account"
        ) from None
    except Forbidden as error:
        raise ConfigError(
            f"{place} may not be used by this account, which needs roles/storage.objectUser and "
            f"roles/storage.legacyBucketReader there ({error})"
        ) from None
    except Exception as error:  # of the network, or of credentials that name no project
        raise ConfigError(f"{place} cannot be reached: {type(error).__name__}: {error}") from None


class ChangedError(Exception):
    """Another process has written a file since it was read or written here."""


@contextmanager
def writing(place: epath.PathLike) -> Iterator[None]:
    """Turn errors of a block that writes at a place into one kind, with what to do.

    Raises:
      StorageError: it was not written, such as where a disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError | HostError | ChangedError):
            raise
        # Of buckets, gcsfs, tensorstore, aiohttp and google.auth each have their own errors.
        if not in_bucket(place) and not of_system(error):
            raise
        raise StorageError(
            f"{place} could not be written; when {'the bucket' if in_bucket(place) else 'the disk'} takes "
            f"files again, the same command goes on from the last checkpoint ({brief(innermost(error))})"
        ) from error


def of_system(error: BaseException) -> bool:
    """Decide whether an error comes from the operating system, such as that of a full disk."""
    root = innermost(error)
    return isinstance(root, OSError) or FROM_SYSTEM.search(str(root)) is not None


def innermost(error: BaseException) -> BaseException:
    """Return the error that an error was raised from, at the end of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def brief(error: BaseException) -> str:
    """Write an error in one line, without the details that libraries add about themselves."""
    text = " ".join(DETAILS.sub("", str(error)).split())
    return f"{type(error).__name__}: {text[:400]}"


def absolute(path: epath.PathLike) -> epath.Path:
    """Return the place by a name that does not depend on the working directory."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def in_bucket(path: epath.PathLike) -> bool:
    """Decide whether a path names a place in a bucket."""
    return str(path).startswith(BUCKET)


def write_atomically(file: epath.PathLike, content: str | bytes) -> None:
    """Replace a file so that a kill leaves the old or the new one; text is written as UTF-8."""
    file = epath.Path(file)
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(file):  # where a file appears whole
        with writing(file):
            file.write_bytes(content)
        return
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def upload(source: Path, target: epath.Path) -> None:
    """Copy a file, or a directory with its files, to a bucket; what lies there is replaced."""
    if source.is_dir():
        with writing(target):
            target.rmtree(missing_ok=True)
        for each in sorted(source.iterdir()):
            upload(each, target / each.name)
        return
    with writing(target), source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)


def move(source: epath.Path, target: epath.Path) -> None:
    """Move a directory in one rename; in a bucket file by file, deleting the source at the end."""
    if not in_bucket(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    with writing(target):
        copy_folder(source, target)
        source.rmtree()


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copy all files of a folder within a bucket, without reading them here."""
    for each in source.iterdir():
        if each.is_dir():
            copy_folder(each, target / each.name)
        else:
            each.copy(target / each.name)
