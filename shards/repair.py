"""Repairing a packed data set: what is damaged is converted again from the source, to the bytes that were written."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.contents import Contents
from shards.convert import convert
from shards.cpus import worker_count
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, IntegrityError
from shards.files import locked_folder, sync, write_bytes
from shards.index import Index, array_checksum, own_files
from shards.index_copy import COPY, write_copy
from shards.inside import inside
from shards.packing.merge import old_places
from shards.packing.pool import map_tasks
from shards.packing.rejected import REJECTED, with_reasons, write_rejected
from shards.participant_rows import Row, Table
from shards.participants import read_table
from shards.preprocess.recipe import read_derivative
from shards.pseudonyms import fingerprint, pseudonymised, read_key
from shards.record_table import Records
from shards.records import Record
from shards.repair_index import restore_index
from shards.shard_writer import ShardWriter
from shards.verify import Damage, verify
from shards.volumes import Space
from shards.zarr_coordinates import store_files

PLACE = ".repair-"  # begins the names of folders in which shards are written


def repair(
    folder: str | Path,
    source: str | Path,
    *,
    files_root: str | Path | None = None,
    pseudonymise: str | Path | None = None,
    workers: int = 0,
) -> Iterator[tuple[Damage, str]]:
    """Verify a data set, and write the damaged files again, with the bytes that they had.

    A damaged shard is written anew: its intact volumes as they are, the others converted from the source with the
    arguments that the index records, and compared with their checksums. It replaces the damaged file when it has its
    recorded SHA-256; otherwise that stays as it is. A damaged index is restored from its copy. What killed processes
    left is removed; other files that do not belong to the data set are not touched.

    Args:
        folder: of the data set.
        source: what it was packed from.
        files_root: see :func:`shards.participants.read_table`.
        pseudonymise: key file of a data set with pseudonyms.
        workers: processes; 0 for one per core.

    Yields:
        Each damage, and why it was not repaired; '' where it was.

    Raises:
        DataError: no packed data set, one that another process writes, arguments that cannot be used, or a worker
            process that was killed.
        IntegrityError: the index is damaged, and so is its copy.
    """
    folder, workers = Path(folder), worker_count(workers)
    with locked_folder(folder):
        yield from ((Damage(name, "damaged or missing"), "") for name in restore_index(folder, PLACE))
        damaged: dict[str, list[Damage]] = {}
        for damage in verify(folder, workers):
            damaged.setdefault(damage.file, []).append(damage)
        for part in folder.rglob(".*.part"):
            part.unlink()
        for place in folder.glob(f"{PLACE}*"):
            shutil.rmtree(place)
        if copy := damaged.pop(COPY, None):
            write_copy(folder, own_files(Index.load(folder)))
            yield from ((damage, "") for damage in copy)
        if not damaged:
            return
        index = _load(folder, damaged)
        table, space = _read_source(index, Path(source), files_root, pseudonymise)
        rows = {row.key: row for row in table.rows if isinstance(row, Row)}
        contents, derived = Contents(index), _derived(folder, index, table)
        tasks = [_task(folder, index, contents, derived, file, rows, space) for file in damaged]
        for file, reason in map_tasks(_restore, tasks, workers):
            yield from ((damage, reason) for damage in damaged[file])


def _load(folder: Path, damaged: Iterable[str]) -> Index:
    try:
        index = Index.load(folder)
        if own := set(damaged) - set(index.files):
            raise IntegrityError(f"{folder}: {min(own)}: damaged; restore it or pack again")
    except IntegrityError as error:
        raise IntegrityError(f"{error}; its copy cannot replace it") from error
    if index.kind != "volumes":
        raise DataError(f"{folder} holds {index.kind}: make them again from their volumes")
    if not index.per_shard:
        raise DataError(f"{folder}: of version 1, which cannot be repaired; restore its files or pack again")
    return index


def _read_source(
    index: Index, source: Path, files_root: str | Path | None, pseudonymise: str | Path | None
) -> tuple[Table, Space | None]:
    """The source, read as it was when it was packed, and the space of its volumes."""
    given = index.provenance["arguments"]
    key = read_key(pseudonymise) if pseudonymise else b""
    if (fingerprint(key) if key else None) != given.get("pseudonyms"):
        raise DataError(f"{source}: give the key that the data set was packed with, if any, by --pseudonymise")
    choice: dict[str, Any] = {name: given.get(name) for name in ("entities", "rename")}
    table = read_table(source, index.schema, files_root=files_root or None, **choice)
    recipe, space = read_derivative(source) or (None, None)
    table = with_reasons(table, source) if recipe else table
    return pseudonymised(table, key) if key else table, space


@dataclass(frozen=True)
class _Task:
    """A damaged file.

    Attributes:
        folder: of the data set.
        file: relative to it.
        content: of a file whose content follows from the index and the source's tables.
        number: of the shard; -1 for another file.
        variable: of a shard of a Zarr store; empty for a tar file.
        records: (row of the index, row of the source or None) of those in the shard.
        space: of the source's volumes.
    """

    folder: Path
    file: str
    content: bytes = b""
    number: int = -1
    variable: str = ""
    records: Sequence[tuple[int, Row | None]] = ()
    space: Space | None = None


def _task(
    folder: Path,
    index: Index,
    contents: Contents,
    derived: Mapping[str, bytes],
    file: str,
    rows: Mapping[str, Row],
    space: Space | None,
) -> _Task:
    if (content := contents.files.get(file)) is None:
        return _Task(folder, file, content=derived.get(file, b""))
    assert isinstance(index.records, Records)
    own = np.unique(content.rows).tolist()
    pairs = [(row, rows.get(index.records.key(row))) for row in own]
    return _Task(folder, file, b"", content.number, content.variable, pairs, space)


def _derived(folder: Path, index: Index, table: Table) -> dict[str, bytes]:
    """The files whose content follows from the index and the source's tables."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(IntegrityError):  # the places are damaged, too
        found[REJECTED] = write_rejected(table.rows, old_places(folder, index) or ())
    if index.storage == "zarr":
        assert isinstance(index.records, Records)
        places = 1 + max(index.records.column("slot"), default=-1)
        found |= store_files(index.arrays, index.grid, index.schema, index.records, places, index.per_shard)
    return found


def _restore(task: _Task) -> tuple[str, str]:
    """Write a file with the bytes that it had; returns it, and why that is not possible, '' where it was."""
    try:
        dataset = open_dataset(task.folder)
        known, path = dataset.index.files[task.file]["sha256"], inside(task.folder, task.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.number < 0:
            if hashlib.sha256(task.content).hexdigest() != known:
                return task.file, "does not follow from the records and the source; restore it or pack again"
            write_bytes(path, task.content)
            return task.file, ""
        with tempfile.TemporaryDirectory(prefix=PLACE, dir=task.folder) as place:
            files = _write_shard(dataset, task, Path(place))
            if files[task.file]["sha256"] != known:
                return task.file, "this version writes the same volumes as other bytes; pack again"
            (Path(place) / task.file).replace(path)
            sync(path.parent)
    except (DataError, OSError) as error:
        return task.file, str(error)
    return task.file, ""


def _write_shard(dataset: Dataset, task: _Task, place: Path) -> dict[str, dict[str, Any]]:
    """Write a shard into another folder: volumes that are intact as they are, the others from the source.

    Raises:
        DataError: the source does not give what was packed.
    """
    index = dataset.index
    arrays = {task.variable: index.arrays[task.variable]} if task.variable else index.arrays
    writer = ShardWriter(place, index.storage, task.number, arrays, index.per_shard)
    for record, row in sorted(((index.records[i], row) for i, row in task.records), key=lambda pair: pair[0].slot):
        while writer.used < record.slot % index.per_shard:
            writer.skip()
        wanted = [name for name in record.checksums if name in arrays]
        try:
            volumes = {name: dataset.read_stored(record.key, name) for name in wanted}
        except IntegrityError:
            volumes = _convert(index, record, row, wanted, task.space)
        writer.add(record.key, record.subject, record.values, volumes, record.affines)
    return writer.close()


def _convert(
    index: Index, record: Record, row: Row | None, wanted: Sequence[str], space: Space | None
) -> dict[str, Any]:
    """The volumes of a record from its source, compared with their checksums.

    Raises:
        DataError: they are not what was packed.
    """
    if row is None:
        raise DataError(f"{record.key}: the source has no such row any more")
    dtype = index.provenance["arguments"].get("dtype", "float16")
    found = convert(row, index.schema, index.grid["spacing"], tuple(index.grid["shape"]), space, dtype, True)
    if found.reason:
        raise DataError(f"{record.key}: {found.reason}")
    volumes: dict[str, Any] = {name: volume.voxels for name, volume in found.volumes.items()}
    volumes |= {
        f"{name}_{label}": voxels for name, volume in found.volumes.items() for label, voxels in volume.maps.items()
    }
    for name in wanted:
        if name not in volumes or array_checksum(volumes[name]) != record.checksums[name]:
            raise DataError(
                f"{record.key} {name}: the source gives other voxels than were packed: its file has changed, or the "
                "program that converts it; pack again"
            )
    return {name: volumes[name] for name in wanted}
