"""What a run reports while it goes on: one JSON object a line, appended by rank 0, followed by whoever shows it.

The training loop writes and knows no reader; progress bars and MLflow read and may die, lag or be replayed without
touching the run. Events: ``start`` (step, total), ``metrics`` (step, metrics), ``artifact`` (path relative to the
folder), ``trouble`` (text: one sentence on what went wrong and was survived), ``end`` (step).
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE = "journal.jsonl"
POLL_S = 0.2


class Journal:
    """Appends events to ``folder/journal.jsonl``.

    Each line leaves in one ``write`` call on a file opened for appending, so several processes may write and a
    killed one can only tear its own last line, which the next writer ends and readers skip. Lines that cannot be
    written, on a full disc say, stay in memory and go before the next ones.

    Args:
        folder: the run folder; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lines: list[bytes] = []  # not yet written

    def write(self, event: str, **fields: Any) -> None:
        """Append ``event`` with the time (seconds since 1970) and its ``fields`` (JSON-able)."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
        self._lines.append(line.encode())
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Append what could not be written before.

        Raises:
            OSError: it still cannot.
        """
        with self.path.open("ab+", buffering=0) as file:
            while self._lines:
                size = file.seek(0, os.SEEK_END)
                torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
                line = (b"\n" if torn else b"") + self._lines[0]
                if file.write(line) < len(line) - 1:  # the disc is full: what is there is a torn line, readers skip it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                del self._lines[0]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # torn by a kill
        return None
    return event if isinstance(event, dict) and "event" in event else None


def follow(folder: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the events of ``folder/journal.jsonl`` from its beginning, then new ones as they come.

    Ends once ``stop`` is set and everything written before has been yielded. Torn lines are skipped.
    """
    path, position, rest = folder / FILE, 0, b""
    while True:
        last = stop.is_set()  # asked before reading: what was written before it was set is still yielded
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                chunk = file.read()
            position += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if (event := _parse(line)) is not None:
                    yield event
        if last:
            return
        stop.wait(POLL_S)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of ``folder/journal.jsonl`` so far."""
    stop = threading.Event()
    stop.set()
    return list(follow(folder, stop))


def unseen(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Drop metrics that a resumed run wrote again: of each (step, name) only the first is kept."""
    seen: set[tuple[int, str]] = set()
    for event in events:
        if event["event"] != "metrics":
            yield event
            continue
        fresh = {k: v for k, v in event["metrics"].items() if (event["step"], k) not in seen}
        seen.update((event["step"], k) for k in fresh)
        if fresh:
            yield {**event, "metrics": fresh}
