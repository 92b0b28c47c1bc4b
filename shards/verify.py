"""Verifying a packed data set."""

from collections.abc import Iterator
from pathlib import Path

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, IntegrityError
from shards.files import sha256
from shards.index import NAME
from shards.progress import progress


def verify(folder: str | Path) -> Iterator[str]:
    """Compare every file and every volume with the checksums in the index, and the index with its own.

    Yields:
        One line per damaged member: file, member, what is wrong. Nothing where the data set is intact.

    Raises:
        DataError: no packed data set in the folder.
    """
    try:
        dataset = open_dataset(folder)
    except IntegrityError:
        yield f"{NAME}: damaged (its own checksum does not match)"
        return
    intact = True
    for name, known in progress(dataset.index.files.items(), "checking files", len(dataset.index.files), "file"):
        path = dataset.folder / name
        if not path.is_file():
            yield f"{name}: missing"
        elif path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
            members = dataset.damaged_members(name)
            yield from (f"{name}: {member}: damaged" for member in members)
            if not members:
                yield f"{name}: damaged"
        else:
            continue
        intact = False
    if intact:
        yield from _unreadable(dataset)


def _unreadable(dataset: Dataset) -> Iterator[str]:
    """Volumes that cannot be read."""
    for record in progress(dataset.index.records, "checking volumes", unit="volume"):
        for variable in record.checksums:
            try:
                dataset.read(record.key, variable)
            except DataError as error:
                yield str(error)
