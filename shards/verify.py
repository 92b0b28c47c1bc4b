"""Verifying a packed data set."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, IntegrityError
from shards.files import sha256
from shards.header import NAME, read_header
from shards.progress import progress


def verify(folder: str | Path) -> Iterator[str]:
    """Compare every file and every volume with the checksums in the index, and the index with its own.

    Yields:
        One line per damaged member: file, member, what is wrong. Nothing where the data set is intact.

    Raises:
        DataError: no packed data set in the folder.
    """
    folder = Path(folder)
    try:
        header = read_header(folder)
    except IntegrityError:
        yield f"{NAME}: damaged (its own checksum does not match)"
        return
    if damaged := list(_damaged_tables(folder, header.get("tables", {}))):
        yield from damaged
        return
    dataset = open_dataset(folder)
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


def _damaged_tables(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The files of the index itself."""
    for entry in tables.values():
        path = folder / entry["file"]
        if not path.is_file():
            yield f"{path.name}: missing"
        elif sha256(path) != entry["sha256"]:
            yield f"{path.name}: damaged"


def _unreadable(dataset: Dataset) -> Iterator[str]:
    """Volumes that cannot be read."""
    for record in progress(dataset.index.records, "checking volumes", unit="volume"):
        for variable in record.checksums:
            try:
                dataset.read(record.key, variable)
            except DataError as error:
                yield str(error)
