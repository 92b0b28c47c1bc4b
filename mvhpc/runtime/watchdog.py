"""Stopping a run from outside (a stop file), and ending it when it hangs (a watchdog timer)."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STOP_FILE = "MVHPC_STOP_FILE"  # environment variable
PERIOD_S = 1.0  # seconds between polls, approximately


class Interrupted(RuntimeError):
    """A stage stopped on request after it wrote a checkpoint; the same command resumes it."""


_requested = threading.Event()


def stop_requested() -> bool:
    """Whether the file that ``MVHPC_STOP_FILE`` names exists, or :func:`request_stop` was called in this process."""
    name = os.environ.get(STOP_FILE)
    return _requested.is_set() or (bool(name) and Path(str(name)).exists())


def request_stop() -> None:
    """Ask this process, and those that share its stop file, to stop with a checkpoint."""
    _requested.set()
    if name := os.environ.get(STOP_FILE):
        with contextlib.suppress(OSError):
            Path(name).touch()


@contextlib.contextmanager
def stop_file(path: Path) -> Iterator[None]:
    """Inside, the stop file is that of the environment, else ``path``, which is removed before and after."""
    _requested.clear()
    if STOP_FILE in os.environ:
        yield
        return
    path.unlink(missing_ok=True)
    os.environ[STOP_FILE] = str(path.absolute())
    try:
        yield
    finally:
        del os.environ[STOP_FILE]
        _requested.clear()
        path.unlink(missing_ok=True)


class PollInterval:
    """After how many steps the workers exchange their states, so that they do about once a second.

    Attributes:
        next: the step after which they do so next.
    """

    def __init__(self, start: int) -> None:
        self.next = start + 1
        self._start = self._done = start
        self._mark = time.monotonic()

    def suggest(self, done: int) -> int:
        """Steps until the next poll, from the rate of this worker up to step ``done``; after the first step, 1."""
        now = time.monotonic()
        if self._done == self._start:  # the first step says little: it is slower than the others
            self._done, self._mark = done, now
            return 1
        rate = (done - self._done) / max(now - self._mark, 1e-3)
        self._done, self._mark = done, now
        return max(1, round(rate * PERIOD_S))


class Watchdog:
    """Writes the stacks of all threads to standard error and ends the process when it has not been reset in time.

    A thread of :mod:`faulthandler` does so without the interpreter, hence also when a call never returns. The launcher
    restarts the process.

    Args:
        minutes: between two calls of :meth:`arm`; 0 turns it off.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def arm(self) -> None:
        """Start, or reset, the timer."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """The timer runs inside."""
        self.arm()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The timer is off inside, and is reset afterwards."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self.arm()
