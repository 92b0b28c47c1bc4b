"""Progress of work that takes more than two seconds: a bar on a terminal, a plain line every 15 s in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 15.0


class Progress:
    """A counter with rate and time left.

    A tqdm bar on a terminal; elsewhere a plain line every 15 seconds and one at the end, so that a log file stays
    readable. Used as a context manager.

    Args:
        label: shown before the count.
        total: number of items; None where unknown.
        unit: name of one item.
        initial: items done before, in a resumed run.
    """

    def __init__(self, label: str, total: int | None, unit: str = "it", initial: int = 0) -> None:
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.done = initial
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._printed = -1
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, unit=unit, initial=initial, dynamic_ncols=True, leave=True, delay=0.5
            )

    def update(self, n: int = 1, note: str | None = None) -> None:
        """Count ``n`` more items; ``note`` (such as a loss) is shown after the rate."""
        self.done += n
        self.note = self.note if note is None else note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        if self._printed == self.done:
            return
        self._last_line, self._printed = time.monotonic(), self.done
        text = tqdm.format_meter(
            self.done,
            self.total or 0,
            self._last_line - self._start,
            prefix=self.label,
            unit=self.unit,
            initial=self.initial,
            postfix=self.note,
            bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
            if self.total
            else None,
        )
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, or write the last line where the work took more than two seconds."""
        if self._bar is not None:
            self._bar.close()
        elif time.monotonic() - self._start > 2:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield ``items``, counting them with a :class:`Progress`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
