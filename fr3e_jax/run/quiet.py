"""No tracebacks on stderr of what is told in one line."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet_orbax() -> None:
    """From here on, orbax says nothing of a save that fails but by raising it.

    It logs tracebacks besides. And it gives up at the first write that fails while others are under way: they
    end in threads and coroutines of their own, where what they raise can only be kept from being printed.
    Errors of anything else are printed as before.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    told = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        # Of tensorstore, which reports to a loop that orbax has closed.
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (of_orbax or late):
            told(unraisable)

    sys.unraisablehook = hook
