"""Progress within a training step: which round it is, how many states there are, what is being sampled."""

import time
from collections.abc import Callable

EVERY = 60.0  # seconds between two lines where there is no terminal
LONG = 4  # rounds from which each is told in a line of its own


class StepProgress:
    """Shows how far a step is: always anew on a terminal, elsewhere in a line a minute.

    Calls come in this order: `begin`, then for each round `round`, `rows` as it is sampled, and `states`; at
    last `end`. From the LONG-th round of a step on, each round is a line of its own everywhere.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        show: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show progress.

        Args:
          say: shows a line that stays.
          show: shows a text in the place of the one before, and nothing for an empty one; None where there is
            no terminal.
          clock: seconds.
        """
        self._say, self._show, self._clock = say, show, clock
        self._last = clock()
        self._step = self._states = self._wanted = 0
        self._round, self._most_rounds = 0, 0
        self._sampled = ""
        self._begun = False

    def begin(self, step: int, states: int, wanted: int) -> None:
        """A step begins.

        Args:
          step: its number.
          states: that carry a gradient and are there already.
          wanted: states that fill the batch.
        """
        self._step, self._states, self._wanted = step, states, wanted
        self._round, self._sampled = 0, ""
        self._last = self._clock()
        self._begun = True
        self._update()

    def round(self, number: int, most: int) -> None:
        """The `number`-th round begins, from 1, of at most `most`."""
        self._round, self._most_rounds, self._sampled = number, most, ""
        self._update()

    def rows(self, running: int, rows: int, tokens: int) -> None:
        """Sampling goes on.

        Args:
          running: answers that are not at their end.
          rows: answers that are sampled at a time.
          tokens: that those which run have drawn.
        """
        if self._begun:  # an evaluation samples too
            self._sampled = f"{running} of {rows} rows running at token {tokens:,}"
            self._update()

    def states(self, states: int) -> None:
        """A round is done, and there are so many states that carry a gradient."""
        self._states = states
        if self._round >= LONG:
            self._sampled = ""
            self._tell()
        self._update()

    def end(self) -> None:
        """The step is done, or ended by an error."""
        self._begun = False
        if self._show is not None:
            self._show("")

    def __str__(self) -> str:
        parts = [f"step {self._step}"]
        if self._round:
            parts.append(f"round {self._round} of at most {self._most_rounds}")
        parts.append(f"{self._states} of {self._wanted} states that carry a gradient")
        return ", ".join([*parts, self._sampled] if self._sampled else parts)

    def _update(self) -> None:
        if self._show is not None:
            self._show(str(self))
        elif self._clock() - self._last >= EVERY:
            self._tell()

    def _tell(self) -> None:
        self._last = self._clock()
        self._say(str(self))
