"""Verifying a packed data set: every byte is read once, on all cores; what is damaged is named."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from shards.contents import Contents, FileContent
from shards.cpus import worker_count
from shards.errors import DataError, IntegrityError
from shards.files import sha256
from shards.header import NAME, read_header
from shards.index import Index, array_checksum, own_files
from shards.index_copy import COPY, copy_is_current
from shards.inside import inside
from shards.pieces import read_pieces
from shards.progress import progress
from shards.record_table import Records
from shards.stored_files import StoredFiles
from shards.zarr_store import FOLDER, ZarrReader

BLOCK = 2**20  # bytes that are read at once; they are hashed while they are in the processor's cache


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file, as a message: ``FILE: PLACE at byte N: WHAT``.

    Attributes:
        file: relative to the data set's folder.
        what: ``damaged``, ``missing``, ...
        place: the part of the file that is damaged; empty for the file.
        offset: byte at which the part begins, -1 where that is not known.
        key, variable: of the volume that cannot be read.
    """

    file: str
    what: str = "damaged"
    place: str = ""
    offset: int = -1
    key: str = ""
    variable: str = ""

    def __str__(self) -> str:
        at = f" at byte {self.offset:,}" if self.offset >= 0 else ""
        return f"{self.file}: {self.place}{at}: {self.what}" if self.place else f"{self.file}: {self.what}"


def verify(folder: str | Path, workers: int = 0) -> Iterator[Damage]:
    """Compare every file with its SHA-256 in the index, the place of every volume in it with its CRC-32C, and the index
    with its own checksums.

    Files that are intact are read once. Of others, the parts are compared one by one.

    Args:
        folder: of the data set.
        workers: threads; 0 for one per core.

    Yields:
        What is damaged or missing, in the order of the files. Nothing where the data set is intact.

    Raises:
        DataError: no packed data set in the folder, or an index that names files elsewhere.
    """
    folder = Path(folder)
    if (folder / COPY).is_file() and not (folder / NAME).is_file():
        yield Damage(NAME, "missing")
        return
    try:
        header = read_header(folder)
    except IntegrityError:
        yield Damage(NAME, "damaged (its own checksum does not match)")
        return
    if damaged := list(_damaged_tables(folder, header.get("tables", {}))):
        yield from damaged
        return
    index = Index.load(folder)
    contents = Contents(index)
    for file in sorted(contents.files.keys() - index.files.keys()):
        yield Damage(file, "holds volumes and is not in the list of files")
    check = partial(_check, folder, index, contents)
    own, intact = own_files(index), True
    pool = ThreadPoolExecutor(worker_count(workers), thread_name_prefix="verify")
    try:
        for found in progress(pool.map(check, index.files), "verifying", len(index.files), "file"):
            intact = intact and not any(damage.file in own for damage in found)
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)
    if intact and (folder / COPY).is_file() and not copy_is_current(folder, own):
        yield Damage(COPY, "damaged, or the copy of an earlier index")


def foreign_files(folder: str | Path) -> list[str]:
    """The files in the folder that do not belong to the data set, relative to it.

    Raises:
        DataError, IntegrityError: no packed data set in the folder, or a damaged index.
    """
    folder = Path(folder)
    index = Index.load(folder)
    own = {COPY, *own_files(index), *index.files}
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted({path.relative_to(folder).as_posix() for path in paths} - own)


def _damaged_tables(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Damage]:
    """The files of the index itself."""
    for entry in tables.values():
        path = folder / entry["file"]
        if not path.is_file():
            yield Damage(path.name, "missing")
        elif sha256(path) != entry["sha256"]:
            yield Damage(path.name)


def _check(folder: Path, index: Index, contents: Contents, file: str) -> list[Damage]:
    try:
        path = inside(folder, file)
    except ValueError as error:
        raise DataError(f"{folder / NAME}: file {file!r} {error}") from None
    known, content = index.files[file], contents.files.get(file)
    try:
        if path.stat().st_size == known["bytes"]:
            digest, matching = _scan(path, content)
            if digest == known["sha256"] and matching:
                return []
    except FileNotFoundError:
        return [Damage(file, "missing")]
    except OSError:  # a bad sector
        pass
    return _locate(path, file, known["bytes"], contents, folder) or [Damage(file)]


def _scan(path: Path, content: FileContent | None) -> tuple[str, bool]:
    """A file's SHA-256, and whether each of its volumes has its CRC-32C."""
    found, at, place = hashlib.sha256(), 0, 0
    matching, crc = True, 0
    places = [] if content is None else list(zip(*(c.tolist() for c in (content.offsets, content.sizes, content.crcs))))
    buffer = np.empty(BLOCK, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer.data):
            block = buffer[:count]
            found.update(block.data)
            while place < len(places) and (start := places[place][0]) < at + count:
                end = start + places[place][1]
                crc = google_crc32c.extend(crc, block[max(start - at, 0) : end - at])
                if end > at + count:
                    break
                matching &= crc == places[place][2]
                place, crc = place + 1, 0
            at += count
    return found.hexdigest(), matching and place == len(places)


def _locate(path: Path, file: str, size: int, contents: Contents, folder: Path) -> list[Damage]:
    """The damaged parts of a file; each member of a tar file is named once."""
    pieces = contents.layout(file, size)
    if not pieces:
        return [] if contents.index.per_shard else list(_unreadable(folder, contents.index, file))
    found: dict[str, Damage] = {}
    if (present := path.stat().st_size) != size:
        found[""] = Damage(file, f"{present:,} bytes, written with {size:,}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for piece, raw in read_pieces(descriptor, pieces):
            if raw is None and not (piece.name in found and found[piece.name].key):
                found[piece.name] = Damage(file, "damaged", piece.name, piece.offset, piece.key, piece.variable)
    finally:
        os.close(descriptor)
    return list(found.values())


def _unreadable(folder: Path, index: Index, file: str) -> Iterator[Damage]:
    """The volumes that cannot be read, of a damaged shard of a Zarr store of version 1."""
    variable, _, number = file.removeprefix(f"{FOLDER}/").partition("/c/")
    reader = ZarrReader(folder, index, StoredFiles(folder))
    assert isinstance(index.records, Records)
    for row, record in enumerate(index.records) if number else ():
        place = index.records.place(row, variable)
        try:
            if place is None or place.slot // reader.per_shard(variable) != int(number.partition("/")[0]):
                continue
            if array_checksum(reader.read(record.key, variable, place)) == record.checksums[variable]:
                continue
        except IntegrityError:
            pass
        except (OSError, ValueError, KeyError, TypeError):  # its metadata are damaged too, and named as a file
            return
        yield Damage(file, place=f"{record.key} {variable}", key=record.key, variable=variable)
