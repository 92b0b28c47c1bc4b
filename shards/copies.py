"""Records that hold the same volume, bit for bit."""

from collections.abc import Iterable, Sequence

from shards.index import Record


def copies(records: Iterable[Record], volumes: Sequence[str]) -> dict[str, tuple[str, Record]]:
    """Of each record with a volume that an earlier one has too, its key -> that volume and the first such record.

    Args:
        records: of one data set.
        volumes: names of the variables to compare.
    """
    first: dict[tuple[str, str], Record] = {}
    found: dict[str, tuple[str, Record]] = {}
    for record in records:
        for name in volumes:
            if name in record.checksums:
                other = first.setdefault((name, record.checksums[name]), record)
                if other is not record:
                    found.setdefault(record.key, (name, other))
    return found
