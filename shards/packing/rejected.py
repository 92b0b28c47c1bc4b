"""The tables of rejected rows, of a packing and of a derivative."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from shards.packing.places import Place
from shards.participant_rows import NO_FILE, Reject, Row, Table
from shards.sheets import read_sheet

REJECTED = "rejected.tsv"


def read_rejected(folder: Path) -> list[tuple[str, str]]:
    """Key and reason of the rejected rows of a derivative or a packed data set, in the order of its table."""
    path = folder / REJECTED
    return [(cells["key"], cells["reason"]) for _, cells in read_sheet(path).rows] if path.is_file() else []


def with_reasons(table: Table, derivative: Path) -> Table:
    """The table of a derivative; a row without a file has the reason for which the preprocessing rejected its scans."""
    reasons: dict[str, dict[str, None]] = {}  # ordered; those of sessions are the subject's, too
    for key, reason in read_rejected(derivative):
        for name in {key, key.partition("_ses-")[0]}:
            reasons.setdefault(name, {})[reason] = None

    def explained(row: Row | Reject) -> Row | Reject:
        key = " ".join(row.key.split())
        if isinstance(row, Row) or key not in reasons or not row.reason.startswith(NO_FILE):
            return row
        return replace(row, reason=f"preprocessing: {'; '.join(reasons[key])}")

    return replace(table, rows=list(map(explained, table.rows)))


def write_rejected(rows: Sequence[Row | Reject], places: Iterable[Place]) -> bytes:
    """The content of ``rejected.tsv``: line in the source, key and reason of each rejected row.

    Args:
        rows: of the source.
        places: of those that could be read, with the reasons for which their volumes were rejected.
    """
    reasons = {place.key: place.reason for place in places if place.reason}
    lines = ["line\tkey\treason\n"]
    for row in rows:
        reason = row.reason if isinstance(row, Reject) else reasons.get(row.key)
        if reason:
            lines.append(f"{row.line}\t{' '.join(row.key.split())}\t{' '.join(reason.split())}\n")
    return "".join(lines).encode()
