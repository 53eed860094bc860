"""Keeps tracebacks of errors off stderr that users are shown in one line."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet_orbax() -> None:
    """Keep orbax from printing the errors of failed saves, which it raises as well.

    It logs tracebacks. And it gives up at the first write that fails while others are under way: these end in
    threads and coroutines of their own, whose errors can only be kept from being printed. Errors of other
    code are printed as before.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    print_error = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        # Of tensorstore, which reports to a loop that orbax has closed.
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (of_orbax or late):
            print_error(unraisable)

    sys.unraisablehook = hook
