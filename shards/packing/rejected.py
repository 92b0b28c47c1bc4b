"""The table of rejected rows."""

from collections.abc import Iterable, Sequence

from shards.packing.places import Place
from shards.participant_rows import Reject, Row

REJECTED = "rejected.tsv"


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
