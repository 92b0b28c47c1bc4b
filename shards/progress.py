"""Progress of work that takes more than two seconds: a bar on a terminal, a plain line every 15 s in a log."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 15.0
BAR, LEAST_BAR = 30, 8  # columns of the bar itself
IRREGULAR = {"person": "people", "batch": "batches"}


def plural(unit: str) -> str:
    """``scans`` of ``scan``, ``people`` of ``person``."""
    return IRREGULAR.get(unit, f"{unit}s")


def compose(state: dict[str, Any], notes: Sequence[str], width: int | None) -> str:
    """One line of at most ``width`` columns: what matters most first, and what does not fit is left out.

    Args:
        state: tqdm's ``format_dict``: ``prefix``, ``n``, ``total``, ``elapsed``, ``rate`` (None: unknown), ``unit``.
        notes: shown after the rate, the first ones first.
        width: columns; None: any number.
    """
    n, total, elapsed = state["n"], state["total"], state["elapsed"]
    rate = state["rate"]
    count = f"{n}/{total}" if total else f"{n}"
    label = f"{state['prefix']}: "
    if width is not None and len(label) + len(count) > width:
        label = ""
    text = f"{label}{count}"[:width]
    unit, units = state["unit"], plural(state["unit"])
    parts = [f" {unit if (total or n) == 1 else units}"]
    if rate and total:
        parts.append(f", {tqdm.format_interval((total - n) / rate)} left")
    if total:
        parts.append(f", {100 * n // total} %")
    if rate:
        slow = rate < 1
        parts.append(f", {1 / rate if slow else rate:.3g} {'s/' + unit if slow else units + '/s'}")
    parts.append(f", {tqdm.format_interval(elapsed)} so far")
    for part in [*parts, *(f", {note}" for note in notes)]:
        if width is None or len(text) + len(part) <= width:
            text += part
    if width is None or not total:
        return text
    bar = min(BAR, width - len(text) - 3)
    filled = round(bar * n / total)
    return f"{text} [{'#' * filled}{'.' * (bar - filled)}]" if bar >= LEAST_BAR else text


class _Bar(tqdm):
    """A tqdm bar whose line :func:`compose` writes."""

    notes: Sequence[str] = ()
    known_rate: float | None = None

    def __str__(self) -> str:
        columns = shutil.get_terminal_size().columns - 1  # the last one would begin a new line on some terminals
        return compose({**self.format_dict, "rate": self.known_rate}, self.notes, max(1, columns))


class Progress:
    """A counter with rate and time left.

    A bar on a terminal; elsewhere a plain line every 15 seconds and one at the end, so that a log file stays readable.
    Used as a context manager.

    Args:
        label: shown before the count.
        total: number of items; None where unknown.
        unit: name of one item.
        initial: items done before, in a resumed run.
        at_once: show it before the first item is done, and no rate but the one that is given; otherwise only work that
            takes a while is shown, with the rate measured here.
    """

    def __init__(
        self, label: str, total: int | None, unit: str = "item", initial: int = 0, at_once: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.done = initial
        self.notes: Sequence[str] = ()
        self.rate: float | None = None
        self._measure = not at_once
        self._start = self._last_line = time.monotonic()
        self._printed = -1
        self._bar: _Bar | None = None
        if sys.stderr.isatty():
            delay = 0.0 if at_once else 0.5
            self._bar = _Bar(desc=label, total=total, unit=unit, initial=initial, leave=True, delay=delay)
        elif at_once:
            self._line()

    def update(self, n: int = 1, note: str | Sequence[str] | None = None, rate: float | None = None) -> None:
        """Count ``n`` more items.

        Args:
            n: how many.
            note: such as a loss, shown after the rate; None: as before.
            rate: items per second, from which the time left follows; None: as before, or as measured here.
        """
        self.done += n
        if note is not None:
            self.notes = [note] if isinstance(note, str) else note
        elapsed = time.monotonic() - self._start
        self.rate = rate or ((self.done - self.initial) / elapsed if self._measure and elapsed > 0 else self.rate)
        if self._bar is not None:
            self._bar.notes, self._bar.known_rate = self.notes, self.rate
            self._bar.update(n)
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._line()

    def refresh(self) -> None:
        """Draw the bar again, with the time that has gone by."""
        if self._bar is not None:
            self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        if self._printed == self.done:
            return
        self._last_line, self._printed = time.monotonic(), self.done
        state = {"prefix": self.label, "n": self.done, "total": self.total, "unit": self.unit, "rate": self.rate}
        state |= {"elapsed": self._last_line - self._start}
        print(compose(state, self.notes, None), file=sys.stderr, flush=True)

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


def progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "item") -> Iterator[T]:
    """Yield ``items``, counting them with a :class:`Progress`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
