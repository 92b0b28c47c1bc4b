"""Restoring the index of a data set, where it is damaged, from its copy."""

import tempfile
from pathlib import Path

from shards.errors import DataError
from shards.files import sha256, sync
from shards.header import NAME, read_header
from shards.index import Index, own_files
from shards.index_copy import unpack_copy


def restore_index(folder: Path, prefix: str) -> list[str]:
    """Put the files of the copy in the place of those that are damaged or missing, if all of the copy is intact.

    Args:
        folder: of the data set, which nobody else writes to.
        prefix: begins the name of a folder in it where the copy is unpacked.

    Returns:
        The files that were restored. None where nothing is damaged, or the copy is, or it is that of another index.
    """
    damaged = _damaged(folder)
    if not damaged:
        return []
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as temporary:
        place = Path(temporary)
        names = unpack_copy(folder, place)
        if not names or _damaged(place):
            return []
        if NAME not in damaged and sha256(folder / NAME) != sha256(place / NAME):
            return []  # a process was killed before it wrote the copy of the index that is there
        found = [name for name in names if not _same(folder / name, place / name)]
        for name in sorted(found, key=NAME.__eq__):  # index.json last: it names the others
            (place / name).replace(folder / name)
        sync(folder)
    return found


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and sha256(one) == sha256(other)


def _damaged(folder: Path) -> list[str]:
    """The files of an index that are not what was written: the header, else the tables that it names, else the rest."""
    try:
        header = read_header(folder)
    except DataError:
        return [NAME]
    known = {entry["file"]: entry["sha256"] for entry in header.get("tables", {}).values()}
    if wrong := _differ(folder, known):
        return wrong
    index = Index.load(folder)
    return _differ(folder, {name: index.files[name]["sha256"] for name in own_files(index) if name in index.files})


def _differ(folder: Path, known: dict[str, str]) -> list[str]:
    return [name for name, digest in known.items() if not (folder / name).is_file() or sha256(folder / name) != digest]
