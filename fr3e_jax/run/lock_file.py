"""The file of a lock: read, and replaced only where nobody else has replaced it since."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from etils import epath

from fr3e_jax.run.storage import BUCKET, ChangedError, in_bucket, writing

LOCK_FILE = "lock.json"


class LockFile(Protocol):
    """A file that several processes may try to write; of two that try at once one succeeds."""

    def read(self) -> bytes | None:
        """Its content; None where there is none. What is there now may be replaced by `write`."""

    def write(self, content: bytes) -> None:
        """Replace what `read` found or the last `write` wrote.

        Raises:
          ChangedError: something else is there.
        """

    def remove(self) -> None:
        """Delete what `read` found or the last `write` wrote.

        Raises:
          ChangedError: something else is there.
        """


def lock_file(place: epath.Path) -> LockFile:
    """The lock file of a directory, or of a place in a bucket."""
    return BucketLockFile(str(place)) if in_bucket(place) else DirectoryLockFile(Path(place))


class DirectoryLockFile:
    """A lock file in a directory. Looks and changes happen within a lock of the operating system."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self.known: bytes | None = None

    def read(self) -> bytes | None:
        """Read the file."""
        with self._alone():
            self.known = self._content()
        return self.known

    def write(self, content: bytes) -> None:
        """Replace the file in one rename, so that a kill leaves the old or the new one."""
        temporary = self.path.with_name(f"{LOCK_FILE}.{os.getpid()}.tmp")
        with self._alone():
            if self._content() != self.known:
                raise ChangedError
            try:
                temporary.write_bytes(content)
                temporary.replace(self.path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            self.known = content

    def remove(self) -> None:
        """Delete the file."""
        with self._alone():
            if self._content() != self.known:
                raise ChangedError
            self.path.unlink(missing_ok=True)

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other processes that change the file waiting, where the file system can."""
        import fcntl

        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            # Some network file systems lock no directories: there two starts in the same instant may both
            # succeed, and the first to write anew finds that out.
            with contextlib.suppress(OSError):
                fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


class BucketLockFile:
    """A lock file in a bucket, which replaces an object only where it has the generation that is known.

    Its methods raise StorageError where the bucket refuses or does not answer.
    """

    def __init__(self, place: str) -> None:
        from google.cloud import storage

        bucket, _, path = place.removeprefix(BUCKET).partition("/")
        self.name = f"{place.rstrip('/')}/{LOCK_FILE}"
        with writing(self.name):
            self.blob = storage.Client().bucket(bucket).blob(f"{path.rstrip('/')}/{LOCK_FILE}")
        self.generation = 0  # of an object that is not there

    def read(self) -> bytes | None:
        """Read the object.

        Raises:
          ChangedError: it was written meanwhile.
        """
        from google.api_core.exceptions import NotFound

        with writing(self.name), self._changes_noticed():
            try:
                self.blob.reload()
                generation = int(self.blob.generation)
                content = bytes(self.blob.download_as_bytes(if_generation_match=generation))
            except NotFound:
                self.generation = 0
                return None
        self.generation = generation
        return content

    def write(self, content: bytes) -> None:
        """Replace the object."""
        with writing(self.name), self._changes_noticed():
            self.blob.upload_from_string(
                content, content_type="application/json", if_generation_match=self.generation
            )
        self.generation = int(self.blob.generation)

    def remove(self) -> None:
        """Delete the object."""
        from google.api_core.exceptions import NotFound

        with writing(self.name), self._changes_noticed(), contextlib.suppress(NotFound):
            self.blob.delete(if_generation_match=self.generation)

    @contextlib.contextmanager
    def _changes_noticed(self) -> Iterator[None]:
        from google.api_core.exceptions import PreconditionFailed

        try:
            yield
        except PreconditionFailed:
            raise ChangedError from None
