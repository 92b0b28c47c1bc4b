"""What watches over a run from within: a file that asks it to stop, and a clock that ends it where it hangs."""

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator
from pathlib import Path

STOP_FILE = "MVHPC_STOP_FILE"  # environment variable
PERIOD_S = 1.0  # between polls, about


class Interrupted(RuntimeError):
    """A stage stopped on request, its state in a checkpoint; the same command goes on from there."""


def stop_requested() -> bool:
    """Whether the file that ``MVHPC_STOP_FILE`` names is there."""
    name = os.environ.get(STOP_FILE)
    return bool(name) and Path(str(name)).exists()


class Pace:
    """Every how many steps the workers talk, so that it is about once a second.

    Attributes:
        next: the step after which they do.
    """

    def __init__(self, start: int) -> None:
        self.next = start + 1
        self._done, self._mark = start, time.monotonic()

    def suggest(self, done: int) -> int:
        """Steps until the next poll, as this worker sees it after ``done`` steps."""
        now = time.monotonic()
        rate = (done - self._done) / max(now - self._mark, 1e-3)
        self._done, self._mark = done, now
        return max(1, round(rate * PERIOD_S))


class Watch:
    """Writes the stacks of all threads to standard error and ends the process once it has hung for too long.

    Done by a thread of its own below Python, so that a call that never returns does not stop it. Whoever started the
    process starts it anew.

    Args:
        minutes: without :meth:`arm`; 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def arm(self) -> None:
        """Begin to count anew."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Counting while inside."""
        self.arm()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not counting while inside; counting anew afterwards."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self.arm()
