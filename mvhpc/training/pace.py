"""How long training takes: the time left, and what makes it shorter."""

import time
from collections.abc import Sequence

from mvhpc.runs.position import duration

LONG_S = 3 * 3600.0  # training on a CPU that takes longer gets advice


class Pace:
    """The time left by the steps after the first of this start, which is slower than the others.

    Args:
        total: steps of the whole run.

    Attributes:
        known: whether the last :meth:`left` was a number.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.known = False
        self._mark: tuple[int, float] | None = None

    def left(self, done: int) -> float | None:
        """Seconds until ``total``, after ``done`` steps; None at the first call."""
        now = time.monotonic()
        if self._mark is None:
            self._mark = done, now
            return None
        self.known = True
        steps, start = self._mark
        return (self.total - done) * (now - start) / max(1, done - steps)


def advice(seconds: float, epochs: int, shorter: Sequence[str]) -> str:
    """What to do where training on a CPU takes ``seconds``: keys and their effect; empty where it is short enough.

    Args:
        seconds: of ``epochs`` epochs.
        epochs: ``training.epochs``.
        shorter: what makes a step cheaper, by the task.
    """
    if seconds <= LONG_S:
        return ""
    fewer = int(epochs * LONG_S / seconds)
    ways = [*([f"training.epochs={fewer} (about {duration(LONG_S)})"] if 0 < fewer < epochs else []), *shorter]
    return "\n  ".join(
        [
            "that is long for a CPU; Ctrl-C stops it with a checkpoint, and the same command continues. Shorter with:",
            *(f"  {way}" for way in [*ways, "a GPU"]),
        ]
    )
