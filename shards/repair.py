"""Repairing a packed data set: what is damaged is converted again from the source, to the bytes that were written."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shards.convert import convert, map_rows
from shards.cpus import available_cores
from shards.errors import DataError, IntegrityError
from shards.files import atomic_file, sha256, write_bytes
from shards.index import Index
from shards.inside import inside
from shards.participants import Row, read_table
from shards.pieces import Piece, read_pieces
from shards.places import Places
from shards.preprocess.recipe import read_derivative
from shards.pseudonyms import fingerprint, pseudonymised, read_key
from shards.record_table import Records
from shards.records import Record
from shards.shard_writer import ShardWriter
from shards.verify import Damage, verify
from shards.zarr_coordinates import store_files
from shards.zarr_store import chunk_table, shard_path


def repair(
    folder: str | Path,
    source: str | Path,
    *,
    files_root: str | Path | None = None,
    pseudonymise: str | Path | None = None,
    workers: int = 0,
) -> Iterator[tuple[Damage, str]]:
    """Verify a data set, and write the damaged files again, with the bytes that they had.

    Volumes that are intact are copied; the others are converted from the source with the arguments that the index
    records, and compared with their checksums. A file is replaced when all of it has its recorded SHA-256, and stays as
    it is otherwise. Files that do not belong to the data set are not touched.

    Args:
        folder: of the data set.
        source: what it was packed from.
        files_root: see :func:`shards.participants.read_table`.
        pseudonymise: key file of a data set with pseudonyms.
        workers: processes; 0 for one per core.

    Yields:
        Each damage, and why it was not repaired; '' where it was.

    Raises:
        DataError: no packed data set, one that another process writes, or arguments that cannot be used.
        IntegrityError: the index itself is damaged.
    """
    folder, workers = Path(folder), workers or available_cores()
    with _lock(folder):
        damaged: dict[str, list[Damage]] = {}
        for damage in verify(folder, workers):
            damaged.setdefault(damage.file, []).append(damage)
        if not damaged:
            return
        index = _load(folder, damaged)
        conversion = _Conversion(index, Path(source), files_root, pseudonymise, workers)
        places = Places(index)
        for file, found in damaged.items():
            try:
                _restore(folder, file, places, conversion)
            except (DataError, OSError) as error:
                yield from ((damage, str(error)) for damage in found)
            else:
                yield from ((damage, "") for damage in found)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of :class:`shards.writer.DatasetWriter`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder}: no packed data set here ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"{folder} is being written by another process") from None
    finally:
        os.close(descriptor)


def _load(folder: Path, damaged: Iterable[str]) -> Index:
    try:
        index = Index.load(folder)
        if own := set(damaged) - set(index.files):
            raise IntegrityError(f"{folder}: {min(own)}: damaged; restore it or pack again")
    except IntegrityError as error:
        raise IntegrityError(f"{error}; a repair needs the index") from error
    if index.kind != "volumes":
        raise DataError(f"{folder} holds {index.kind}: make them again from their volumes")
    if not index.per_shard:
        raise DataError(f"{folder}: of version 1, which cannot be repaired; restore its files or pack again")
    return index


class _Conversion:
    """Converts rows of the source as they were when they were packed."""

    def __init__(
        self,
        index: Index,
        source: Path,
        files_root: str | Path | None,
        pseudonymise: str | Path | None,
        workers: int,
    ) -> None:
        self.index, self.source, self.workers = index, source, workers
        given = index.provenance["arguments"]
        key = read_key(pseudonymise) if pseudonymise else b""
        if (fingerprint(key) if key else None) != given.get("pseudonyms"):
            raise DataError(f"{source}: give the key that the data set was packed with, if any, by --pseudonymise")
        choice: dict[str, Any] = {name: given.get(name) for name in ("entities", "rename")}
        table = read_table(source, index.schema, files_root=files_root or None, **choice)
        table = pseudonymised(table, key) if key else table
        self.rows = {row.key: row for row in table.rows if isinstance(row, Row)}
        _, space = read_derivative(source) or (None, None)
        self._convert = partial(
            convert,
            spacing=index.grid["spacing"],
            shape=tuple(index.grid["shape"]),
            space=space,
            dtype=given.get("dtype", "float16"),
        )

    def stored(self, wanted: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, bytes]]:
        """Key, variable and stored bytes of the variables that are wanted of each key.

        Raises:
            DataError: the source does not give what was packed.
        """
        if missing := [key for key in wanted if key not in self.rows]:
            raise DataError(f"{missing[0]}: {self.source} has no such row any more")
        rows = [self.rows[key] for key in wanted]
        for row, outcome in map_rows(self._convert, rows, min(self.workers, len(rows)) or 1):
            if isinstance(outcome, str):
                raise DataError(f"{row.key}: {outcome}")
            arrays: dict[str, Any] = {name: volume.voxels for name, volume in outcome.items()}
            arrays |= {f"{name}_{label}": a for name, volume in outcome.items() for label, a in volume.maps.items()}
            record = _record(self.index, row.key)
            for variable in wanted[row.key]:
                yield row.key, variable, _encode(self.index, record, variable, arrays)


def _record(index: Index, key: str) -> Record:
    assert isinstance(index.records, Records)
    return index.records[index.records.row(key)]


def _encode(index: Index, record: Record, variable: str, arrays: Mapping[str, Any]) -> bytes:
    """The bytes that one volume is stored as, compared with its checksums."""
    name = f"{record.key} {variable}"
    if variable not in arrays:
        raise DataError(f"{name}: the source has none any more")
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), index.storage, 0, {variable: index.arrays[variable]}, 1)
        stored = writer.add(record.key, record.subject, {}, {variable: arrays[variable]}, {})
        writer.close()
        file = Path(folder) / (stored.shard or shard_path(variable, 0, arrays[variable].ndim))
        raw = file.read_bytes()[stored.offsets[variable] :][: stored.sizes[variable]]
    if stored.checksums[variable] != record.checksums[variable]:
        raise DataError(
            f"{name}: the source gives other voxels than were packed: its file has changed, or the program that "
            "converts it; pack again"
        )
    if stored.crcs[variable] != record.crcs[variable]:
        raise DataError(f"{name}: this version compresses the same voxels to other bytes; pack again")
    return raw


def _restore(folder: Path, file: str, places: Places, conversion: _Conversion) -> None:
    """Write a file with the bytes that it had.

    Raises:
        DataError: that is not possible.
    """
    path, known = inside(folder, file), places.index.files[file]
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = places.layout(file, known["bytes"])
    if not pieces:
        content = _derived(places.index).get(file, b"")
        if hashlib.sha256(content).hexdigest() != known["sha256"]:
            raise DataError("does not follow from the records; restore it or pack again")
        write_bytes(path, content)
        return
    with atomic_file(path) as part:
        with part.open("wb") as target:
            damaged = _copy(path, pieces, target)
            wanted: dict[str, list[str]] = {}
            for piece in damaged.values():
                wanted.setdefault(piece.key, []).append(piece.variable)
            for key, variable, raw in conversion.stored(wanted):
                target.seek(damaged[key, variable].offset)
                target.write(raw)
        if pieces[-1].sealed:
            _write_chunk_table(part, file, pieces[-1], places)
        if sha256(part) != known["sha256"]:
            raise DataError("bytes between its volumes are lost; restore it or pack again")


def _copy(path: Path, pieces: Sequence[Piece], target: Any) -> dict[tuple[str, str], Piece]:
    """Copy the pieces that are intact, write those that the index tells, and return the damaged volumes."""
    damaged = {}
    with contextlib.ExitStack() as stack:
        descriptor = -1  # of a file that is missing: none of its pieces can be read
        if path.exists():
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
        for piece, raw in read_pieces(descriptor, pieces):
            if raw is None and piece.key:
                damaged[piece.key, piece.variable] = piece
            target.seek(piece.offset)
            target.write(raw or piece.fixed or bytes(piece.size))
    return damaged


def _write_chunk_table(part: Path, file: str, table: Piece, places: Places) -> None:
    """Write the table of the chunks of a Zarr shard, which follows from the volumes."""
    content, per_shard = places.files[file], places.index.per_shard
    with part.open("r+b") as target:
        stored = {}
        for row, offset, size in zip(content.rows, content.offsets, content.sizes):
            target.seek(int(offset))
            stored[places.records[int(row)].slot % per_shard] = int(offset), target.read(int(size))
        target.seek(table.offset)
        target.write(chunk_table(stored, per_shard, table.size))


def _derived(index: Index) -> dict[str, bytes]:
    """The files whose content follows from the index."""
    if index.storage != "zarr":
        return {}
    assert isinstance(index.records, Records)
    places = 1 + max(index.records.column("slot"), default=-1)
    return store_files(index.arrays, index.grid, index.schema, index.records, places, index.per_shard)
