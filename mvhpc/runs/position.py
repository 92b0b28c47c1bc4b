"""Where training is: ``position.json`` in the run folder, replaced about once a second and removed at its end.

The journal keeps the metrics; this file alone says what happened since the last of them.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "position.json"


@dataclass(frozen=True)
class Position:
    """Steps done of all steps, and the seconds that are left; None before two steps were done."""

    step: int
    total: int
    seconds_left: float | None


def write_position(folder: Path, position: Position) -> None:
    """Replace the file; where the storage cannot be written, it stays as it is."""
    part = folder / f".{FILE}"
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(asdict(position)))
        part.replace(folder / FILE)


def read_position(folder: Path) -> Position | None:
    """What the file says; None where training is not under way."""
    try:
        return Position(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def remove_position(folder: Path) -> None:
    """Training ended, or begins anew."""
    for name in (FILE, f".{FILE}"):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``7.5 h`` or ``3 days``."""
    for least, unit, word in ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            value = seconds / unit
            return f"{value:.1f} {word}" if value < 10 and word != "min" else f"{value:.0f} {word}"
    return f"{seconds:.0f} s"
