"""Verdicts of people on records: a table of ``key``, ``verdict`` (accept or reject) and ``reason``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import DataError, nearest
from shards.participant_rows import Reject, Row
from shards.sheets import read_sheet

KEY, VERDICT, REASON = "key", "verdict", "reason"
ACCEPT, REJECT = "accept", "reject"
NAMED = 10  # keys in one note


def read_exclusions(path: str | Path) -> dict[str, str]:
    """Key -> reason for leaving it out, of each record that the table rejects.

    Args:
        path: TSV (or CSV) with the columns ``key`` and ``verdict``; ``reason`` is optional.

    Raises:
        DataError: the file cannot be read, lacks a column, has another verdict, or two verdicts on one key.
    """
    path = Path(path)
    sheet = read_sheet(path)
    for column in (KEY, VERDICT):
        if column not in sheet.columns:
            raise DataError(f"{path}: no column {column!r}; expected key, verdict and reason, as of shards audit")
    verdicts: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line, cells in sheet.rows:
        key, verdict = cells[KEY].strip(), cells[VERDICT].strip().lower()
        if verdict not in (ACCEPT, REJECT):
            raise DataError(f"{path}: line {line}: {nearest(verdict, (ACCEPT, REJECT), 'verdict')}")
        if not key:
            raise DataError(f"{path}: line {line}: no key")
        if verdicts.setdefault(key, verdict) != verdict:
            raise DataError(f"{path}: line {line}: {key} is accepted and rejected; keep one of the lines")
        if verdict == REJECT:
            reason = " ".join(cells.get(REASON, "").split())
            reasons[key] = f"excluded by {path.name}" + (f": {reason}" if reason else "")
    return reasons


def exclude(rows: Sequence[Row | Reject], reasons: Mapping[str, str]) -> list[Row | Reject]:
    """The rows, in which a reason for rejection stands for each that is excluded.

    Args:
        rows: of the table.
        reasons: see :func:`read_exclusions`.
    """
    return [
        Reject(row.line, row.key, reasons[row.key]) if isinstance(row, Row) and row.key in reasons else row
        for row in rows
    ]


def unknown_note(rows: Sequence[Row | Reject], reasons: Mapping[str, str], pseudonyms: bool) -> list[str]:
    """A note on excluded keys that no row has; none without any.

    Args:
        rows: of the table.
        reasons: see :func:`read_exclusions`.
        pseudonyms: the rows have pseudonyms; unknown keys may be ids then, and are not named.
    """
    unknown = sorted(set(reasons) - {row.key for row in rows})
    if not unknown:
        return []
    if pseudonyms:
        return [f"{len(unknown)} keys to exclude are in no row of the table; they have to be pseudonyms"]
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    return [f"{len(unknown)} keys to exclude are in no row of the table: {', '.join(unknown[:NAMED])}{more}"]
