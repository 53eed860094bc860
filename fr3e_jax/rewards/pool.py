"""Worker processes that judge answers, each within a time limit, however long one would take.

Answers go to the workers in pieces of several, and a piece has the time that one answer may take: hundreds
of ordinary ones are judged in it. If it runs out, or the worker dies, the worker is ended and another is
started, and the answers of the piece are judged again one by one, so that an answer spoils its own verdict
alone.
A group of answers that is judged at once is a piece of its own.
Workers that end while they have nothing to do are replaced too.
"""

import collections
import contextlib
import ctypes
import functools
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from fr3e_jax.rewards.rules import INLINE, judges_groups, scorer_of
from fr3e_jax.rewards.verdict import WRONG, Facts, ScorerError, Verdict

PIECE = 16  # answers that a worker takes at a time
PIECES = 512  # after which a worker is replaced, whatever it has gathered
RENEWED = 5  # times in a row that all workers may end before one has judged anything
DEATH_SIGNAL = 1  # of Linux's prctl
# Reasons of verdicts that no scorer gave.
OUT_OF_TIME = "the scorer ran out of time"
OUT_OF_MEMORY = "the scorer ran out of memory, or nested too deeply"
WORKER_ENDED = "the process that judged it ended"


class Asked(NamedTuple):
    """An answer to judge, or the answers of a group: the arguments of a scorer, and its name."""

    scorer: str
    response: str | tuple[str, ...]
    answer: str
    facts: Facts

    def wrong(self, reason: str) -> "Verdicts":
        """The verdict without one of the scorer's: that the answer, or each of the group, is wrong."""
        verdict = WRONG._replace(reason=reason)
        return verdict if isinstance(self.response, str) else (verdict,) * len(self.response)


Verdicts = Verdict | tuple[Verdict, ...]
"""The verdict on an answer, or those on the answers of a group."""

Piece = tuple[list[int], list[Asked], ProcessFuture[list[Any]]]
"""Numbers of answers, the answers, and the future of their verdicts."""


def judge_piece(piece: Sequence[Asked]) -> list[Verdicts]:
    """Judge the answers of a piece; one that takes too much memory is wrong."""
    verdicts: list[Verdicts] = []
    for asked in piece:
        scorer: Any = scorer_of(asked.scorer)
        try:
            verdicts.append(scorer(asked.response, asked.answer, asked.facts))
        except (MemoryError, RecursionError):
            verdicts.append(asked.wrong(OUT_OF_MEMORY))
    return verdicts


def prepare(scorers: Sequence[str], memory_gb: float, command: int) -> None:
    """Make a worker ready before it is asked anything: set its limits, and import what will be needed.

    Time limits do not run yet.

    Args:
      scorers: names of those that it will be asked for.
      memory_gb: most memory that it may hold, GiB.
      command: id of the process that it works for; when that ends, the worker ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != command:
            os._exit(1)
    # Ctrl-C, or a SIGTERM to the process group, is for the command, which ends its workers.
    os.setpgid(0, 0)
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    most = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for name in scorers:
        with contextlib.suppress(ScorerError):  # it is raised again where an answer is judged
            scorer_of(name)


class Worker(SpawnProcess):
    """A process that starts without the module that was started as a command, and so without jax."""

    lock = threading.Lock()

    def start(self) -> None:
        """Start the process."""
        with self.lock, unnamed_main():
            super().start()


class Workers(SpawnContext):
    """The context that pebble takes processes from: they are `Worker`s."""

    Process = Worker


@contextlib.contextmanager
def unnamed_main() -> Iterator[None]:
    """Hide from multiprocessing, while the context lasts, what a new process would import of __main__."""
    main = sys.modules["__main__"]
    hidden = [name for name in ("__spec__", "__file__") if name in vars(main)]
    names: dict[str, Any] = {name: vars(main).pop(name) for name in hidden}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(names)


class ScoringPool:
    """Judges answers in worker processes, which start with the first answer that needs one.

    timed_out: answers so far that had no verdict within the limit, and count as wrong.
    """

    def __init__(
        self, scorers: Sequence[str], workers: int = 0, time_limit: float = 5.0, memory_gb: float = 4.0
    ) -> None:
        """Set the pool up; no process is started yet.

        Args:
          scorers: names of those that may be asked for.
          workers: processes; 0 takes one for each core but one, up to 16.
          time_limit: seconds that an answer, or a group that is judged at once, may take.
          memory_gb: most memory that a worker may hold, GiB.

        Raises:
          ValueError: there is no scorer of a name.
        """
        self.time_limit = time_limit
        self.timed_out = 0
        for name in scorers:
            scorer_of(name)
        isolated = tuple(name for name in scorers if name not in INLINE)
        self.make = functools.partial(
            ProcessPool,
            max_workers=workers or min(16, max(1, (os.cpu_count() or 1) - 1)),
            max_tasks=PIECES,
            initializer=prepare,
            initargs=(isolated, memory_gb, os.getpid()),
            context=Workers(),
        )
        self.pool, self.renewed = self.make(), 0

    def begin(self, asked: Sequence[Asked]) -> "Judging":
        """Start to judge; the caller goes on. An answer that is asked twice is judged once."""
        # Facts count by their identity: they need not have a hash.
        first: dict[tuple[str, str | tuple[str, ...], str, int], int] = {}
        place = [first.setdefault((a.scorer, a.response, a.answer, id(a.facts)), len(first)) for a in asked]
        different = dict(zip(place, asked, strict=True))
        inline = {n: judge_piece([a])[0] for n, a in different.items() if a.scorer in INLINE}
        groups = [n for n, a in different.items() if judges_groups(a.scorer)]
        others = sorted(different.keys() - inline.keys() - set(groups))
        parts = [others[start : start + PIECE] for start in range(0, len(others), PIECE)]
        pieces: collections.deque[Piece] = collections.deque()
        failed = None
        for numbers in [*parts, *([n] for n in groups)]:
            piece = [different[n] for n in numbers]
            try:
                pieces.append((numbers, piece, self.send(piece)))
            except ScorerError as error:  # raised where the verdicts are waited for, like all others
                failed = error
                break
        return Judging(self, place, inline, pieces, failed)

    def send(self, piece: list[Asked]) -> ProcessFuture[list[Any]]:
        """Hand a piece to the workers; where they have all ended, to new ones.

        Raises:
          ScorerError: workers end as soon as they start.
        """
        try:
            return self.pool.schedule(judge_piece, (piece,), timeout=self.time_limit)
        except RuntimeError:  # all had ended, and nothing was being judged
            self.close()
            self.pool, self.renewed = self.make(), self.renewed + 1
        if self.renewed > RENEWED:
            raise ScorerError(
                "the processes that judge answers end as soon as they start; raise scoring.memory_gb"
            )
        return self.pool.schedule(judge_piece, (piece,), timeout=self.time_limit)

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self.pool.stop()
        self.pool.join()


class Judging:
    """Answers that are being judged."""

    def __init__(
        self,
        pool: ScoringPool,
        place: list[int],
        verdicts: dict[int, Verdicts],
        pieces: collections.deque[Piece],
        failed: ScorerError | None = None,
    ) -> None:
        self.pool, self.place, self.verdicts, self.pieces = pool, place, verdicts, pieces
        self.failed = failed

    def result(self) -> list[Any]:
        """Wait for the verdicts, in the order that was asked; of a group the tuple of its verdicts.

        Raises:
          ScorerError: a user's own scorer failed, or workers end as soon as they start.
        """
        if self.failed is not None:
            raise self.failed
        while self.pieces:
            numbers, piece, future = self.pieces.popleft()
            try:
                self.verdicts.update(zip(numbers, future.result(), strict=True))
                self.pool.renewed = 0
            except BrokenProcessPool:
                self.pieces.append((numbers, piece, self.pool.send(piece)))
            except (TimeoutError, ProcessExpired) as error:
                if len(piece) == 1:
                    reason = OUT_OF_TIME if isinstance(error, TimeoutError) else WORKER_ENDED
                    self.verdicts[numbers[0]] = wrong = piece[0].wrong(reason)
                    self.pool.timed_out += 1 if isinstance(wrong, Verdict) else len(wrong)
                    continue
                alone = [([n], [a], self.pool.send([a])) for n, a in zip(numbers, piece, strict=True)]
                self.pieces.extend(alone)
        return [self.verdicts[n] for n in self.place]
