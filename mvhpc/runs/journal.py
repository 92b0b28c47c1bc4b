"""The journal of a run: one JSON object per line, appended by rank 0 and followed by the screen and MLflow.

Readers may end, lag or start again without touching the run. Events: ``start`` (step, total), ``metrics`` (step,
metrics), ``artifact`` (step, path relative to the run folder, folder in MLflow where it is another one), ``warning``
(step, text: a failure that the run went on after), ``note`` (text for the screen: what is being done), ``summary``
(metrics of the whole stage), ``end`` (step).
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE = "journal.jsonl"
POLL_S = 0.2


class Journal:
    """Appends events to ``folder/journal.jsonl``.

    Each line is written by one ``write`` call on a file opened for appending, so several processes may write. A
    process that is killed can only tear its own last line; the next writer ends that line and readers skip it. Lines
    that cannot be written, as on a full disk, stay in memory and are written before the next ones.

    Args:
        folder: the run folder; created where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / FILE
        self._lines: list[bytes] = []  # not written yet

    def write(self, event: str, **fields: Any) -> None:
        """Append ``event`` with the time (seconds since 1970) and its ``fields`` (JSON-able)."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
        self._lines.append(line.encode())
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Append the lines that could not be written before.

        Raises:
            OSError: they still cannot be written.
        """
        with self.path.open("ab+", buffering=0) as file:
            while self._lines:
                size = file.seek(0, os.SEEK_END)
                torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
                line = (b"\n" if torn else b"") + self._lines[0]
                if file.write(line) < len(line) - 1:  # the disk is full: readers skip the torn line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                del self._lines[0]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # torn by a kill
        return None
    return event if isinstance(event, dict) and "event" in event else None


class JournalTail:
    """Reads a journal piece by piece, from its beginning on.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._position, self._rest = folder / FILE, 0, b""

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call. Skips torn lines."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            chunk = file.read()
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := _parse(line)) is not None]


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of ``folder/journal.jsonl`` so far."""
    return JournalTail(folder).new()


def unseen(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Drop metrics that a resumed run wrote again: the first value of each (step, name) is kept."""
    seen: set[tuple[int, str]] = set()
    for event in events:
        if event["event"] != "metrics":
            yield event
            continue
        fresh = {k: v for k, v in event["metrics"].items() if (event["step"], k) not in seen}
        seen.update((event["step"], k) for k in fresh)
        if fresh:
            yield {**event, "metrics": fresh}
