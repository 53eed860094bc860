"""Lists the checkpoints of a run, and reads one so that damage is noticed.

The record is JSON in the item `progress`: where the run stands, the run's settings, and a checksum of each
array and of itself. It is a part of the checkpoint, so it appears with it, in the same rename.
"""

import dataclasses
import errno
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from fr3e_jax.engine.unfinished import Unfinished
from fr3e_jax.problems.difficulty import SuccessRates
from fr3e_jax.run.arrays import read_arrays, stored_shapes
from fr3e_jax.run.checksums import Entry, checksummed, differing_entries, json_sum
from fr3e_jax.run.quiet import quiet_orbax
from fr3e_jax.run.storage import StorageError, absolute, brief, in_bucket, innermost, of_system

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a run directory that they are in
FORMAT = 1
RECORD = "progress"  # the item that holds the record
UNVERIFIED = "an earlier version wrote it without checksums, so that it is not verified"

# Beginnings of tensorstore's errors after which another try may succeed.
UNREACHABLE = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
    "ABORTED",
)
# Numbers of a run's progress that are no counts.
REAL_NUMBERS = ("seconds", "flops", "entropy_coefficient", "recent_queries", "recent_states")
ARRAYS_OF_PROGRESS = ("rates", "unfinished")  # items of their own
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message says what of it."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run beside its arrays.

    Randomness is a function of (seed, step, query, branch, position), so that `step` and the seed are the
    whole random state. `seconds` is wall time, over all resumptions. `flops` are those of the model in
    all steps since they are counted. `skipped` counts the updates that were skipped in a row up to here,
    `empty_steps` the steps in a row that found no state to train on. `entropy_coefficient` is the weight
    of the entropy bonus in the next step, where it is adapted. `problems` is the checksum of the files
    that `data_position` counts in.
    `recent_queries` and `recent_states` count the queries of the last steps and their accepted states, older
    steps with less weight; 0 before the first round.
    `rates` are the remembered success rates of questions, where they are, and `unfinished` the queries whose
    rollouts are not all there, where there are any; a checkpoint has their arrays in items of their own.
    `unreported` holds the metrics of `step` and a state to read until they are written: a run can be stopped
    in the evaluation that follows a step.
    """

    step: int = 0
    data_position: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    seed: int = 0
    skipped: int = 0
    empty_steps: int = 0
    entropy_coefficient: float | None = None
    problems: int = 0
    recent_queries: float = 0.0
    recent_states: float = 0.0
    rates: SuccessRates | None = dataclasses.field(default=None, compare=False)
    unfinished: Unfinished | None = dataclasses.field(default=None, compare=False)
    unreported: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """The description of a checkpoint that is saved with it.

    settings: text of the run's config.yaml; None where it was not saved. mesh: axis -> size, of the mesh that
    its parameters lay on, that of updates; None where it was not saved. arrays: item (`params`, `optimizer`,
    `carried`, `rates`, `unfinished`) -> path -> shape, type and checksum of the array; None in an earlier
    version's checkpoint.
    """

    progress: Progress
    settings: str | None
    arrays: dict[str, dict[str, Entry]] | None
    mesh: dict[str, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """Convert to the JSON value that is saved, with a checksum of itself."""
        progress = dataclasses.asdict(dataclasses.replace(self.progress, rates=None, unfinished=None))
        progress = {name: value for name, value in progress.items() if name not in ARRAYS_OF_PROGRESS}
        held = {"progress": progress, "settings": self.settings, "arrays": self.arrays, "mesh": self.mesh}
        record = json.loads(json.dumps({"format": FORMAT, **held}))
        return {**record, "sum": json_sum(record)}


def parse_record(raw: Any, step: int) -> Record:
    """Check the JSON value that was read as the record of the checkpoint of `step`.

    Raises:
      DamagedError: it is not as it was written, or of another step.
    """
    if not isinstance(raw, dict):
        raise DamagedError(f"{RECORD} is not a mapping")
    if "format" in raw or "sum" in raw:
        held = {name: value for name, value in raw.items() if name != "sum"}
        if raw.get("sum") != json_sum(held):
            raise DamagedError(f"the checksum of {RECORD} differs")
        if raw["format"] != FORMAT:
            raise DamagedError(f"{RECORD} is of format {raw['format']}, which a newer version wrote")
        record = Record(parse_progress(raw["progress"]), raw["settings"], raw["arrays"], raw.get("mesh"))
    else:
        record = Record(parse_progress(raw), None, None)
    if record.progress.step != step:
        raise DamagedError(f"{RECORD} is that of step {record.progress.step}")
    return record


def parse_progress(raw: Any) -> Progress:
    """Check a JSON value as progress; what an earlier version did not have takes its default.

    Raises:
      DamagedError: a value is missing, unknown or of another type.
    """
    if not isinstance(raw, dict):
        raise DamagedError(f"{RECORD} is not a mapping")
    fields = {
        field.name: field for field in dataclasses.fields(Progress) if field.name not in ARRAYS_OF_PROGRESS
    }
    if unknown := sorted(raw.keys() - fields.keys()):
        raise DamagedError(f"{RECORD} has the unknown key {', '.join(unknown)}, perhaps of a newer version")
    first = {"step", "data_position", "tokens_generated", "seconds", "seed"}  # of all versions
    if missing := sorted(first - raw.keys()):
        raise DamagedError(f"{RECORD} has no {', '.join(missing)}")
    for name, value in raw.items():
        number = type(value) is int or (name in REAL_NUMBERS and type(value) is float)
        report = isinstance(value, dict) and {"metrics", "sample"} <= value.keys()
        absent = value is None and fields[name].default is None
        if not (absent or (report if name == "unreported" else number and value >= 0)):
            raise DamagedError(f"{RECORD} has the {name} {str(value)[:80]!r}")
    return Progress(**raw)


def saved_steps(run: epath.PathLike) -> list[int]:
    """List the steps of the complete checkpoints of a run, ascending; they may be damaged.

    No process waits for another here, so that one that fails can say from where the run goes on.

    Args:
      run: directory.

    Raises:
      StorageError: they cannot be listed now.
    """
    place = absolute(run) / CHECKPOINTS
    try:
        return sorted(found.step for found in ocp.step.standard_name_format().find_all(place))
    except Exception as error:
        if not in_bucket(place) and not of_system(error):
            raise
        raise unreadable(place, innermost(error)) from error


def saved_at(run: epath.PathLike, step: int) -> "Saved":
    """Open the checkpoint of a step of a run; the errors are those of `Saved`."""
    return Saved(absolute(run) / CHECKPOINTS / str(step))


class Saved:
    """A checkpoint on disk: its record, and its arrays when they are asked for.

    Every process reads the part of an array that its devices hold; none waits for another, so that one that
    fails does not leave the others waiting.
    """

    def __init__(self, directory: epath.Path) -> None:
        """Read the record of the checkpoint in `directory`, whose name is its step.

        Raises:
          DamagedError: it has none, or it is damaged.
          StorageError: it cannot be read now.
        """
        quiet_orbax()
        self.directory = directory
        raw = attempt(directory, RECORD, ocp.JsonCheckpointHandler().restore)
        self.record = parse_record(raw, int(directory.name))

    def shapes(self, item: str, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Read path -> shape of an item's arrays; in an earlier version's item, of those in `names`.

        Raises:
          DamagedError: the item is damaged.
          StorageError: it cannot be read now.
        """
        if self.record.arrays is not None:
            return {name: tuple(entry["shape"]) for name, entry in self.record.arrays[item].items()}
        return attempt(self.directory, item, lambda place: stored_shapes(place, names))

    def read(self, item: str, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Read path -> array of an item, without verifying it.

        Args:
          item: `params`, `optimizer`, `carried`, `rates` or `unfinished`.
          like: path -> shape, type and sharding; an array without a sharding is read onto the host.

        Raises:
          DamagedError: the item is missing or damaged.
          StorageError: it cannot be read now.
        """
        return attempt(self.directory, item, lambda place: read_arrays(place, like))

    def verify(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare the checksums of arrays that were read with those that were saved.

        Every process calls this, with the same result.

        Args:
          items: item -> path -> array.

        Raises:
          DamagedError: an array is not as it was written.
        """
        if self.record.arrays is None:
            return
        read = {item: checksummed(leaves) for item, leaves in items.items()}
        for item, entries in read.items():
            if wrong := differing_entries(self.record.arrays[item], entries):
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                raise DamagedError(f"the checksum of {item}/{wrong[0]}{more} differs")


def attempt(directory: epath.Path, item: str, read: Callable[[epath.Path], T]) -> T:
    """Call `read` with the folder of an item, and sort its errors into two kinds.

    Args:
      directory: of the checkpoint.
      item: name in it.
      read: takes the folder, and returns what it holds.

    Raises:
      DamagedError: what lies there cannot be read, and will not be when it is tried again.
      StorageError: it cannot be read now, such as without leave or while the bucket does not answer.
    """
    try:
        return read(directory / item)
    except Exception as error:
        root = innermost(error)
        if isinstance(root, MemoryError | jax.errors.JaxRuntimeError):
            raise
        damaged = is_damage(root, in_bucket(directory))
    if damaged:
        raise DamagedError(f"{item} cannot be read ({brief(root)})")
    raise unreadable(directory / item, root)


def unreadable(place: epath.Path, root: BaseException) -> StorageError:
    """Make the error for what may be read another time. root: why it cannot be now."""
    return StorageError(
        f"{place} cannot be read now; nothing was changed, and the same command tries again ({brief(root)})"
    )


def is_damage(error: BaseException, bucket: bool) -> bool:
    """Decide whether an error of reading means damaged files; otherwise they are out of reach now."""
    if isinstance(error, ABSENT):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.EIO
    if str(error).startswith(UNREACHABLE):
        return False
    # Of buckets, gcsfs, aiohttp and google.auth each have errors of their own, which are not about content.
    return not bucket or type(error).__module__ == "builtins" or isinstance(error, ValueError)
