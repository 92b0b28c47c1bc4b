"""Making one shard, in any process: convert or copy its rows, compress, write. Its bytes depend on its rows alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.convert import convert, row_files
from shards.dataset import Dataset, open_dataset
from shards.errors import IntegrityError
from shards.index import Record
from shards.packing.places import Place, content, stamp, stored_values
from shards.packing.plan import Item, Task
from shards.participant_rows import Row
from shards.pseudonyms import without_names
from shards.schema import Schema
from shards.shard_writer import ShardWriter
from shards.volumes import Space, place


@dataclass(frozen=True)
class Job:
    """What all shards of a packing have in common.

    Attributes:
        folder: of the data set.
        old: SHA-256 of the header of the data set that is there; empty for none.
        partial: folder that new shards are written to.
        storage, schema, arrays, per_shard: of the data set.
        dtype: of its volumes.
        grid: its grid, see :func:`shards.volumes.grid`.
        space: of registered volumes.
        keep_suspect: pack and flag scans that fail quality control.
        parameters: hash of all that decides the conversion.
    """

    folder: Path
    old: str
    partial: Path
    storage: str
    dtype: str
    schema: Schema
    arrays: dict[str, dict[str, Any]]
    per_shard: int
    grid: dict[str, Any]
    space: Space | None
    keep_suspect: bool
    parameters: str


@dataclass(frozen=True)
class Shard:
    """A shard that was made.

    Attributes:
        number: of the shard.
        places: of its rows.
        records: of the packed ones; their groups are not known here.
        files: path relative to the data set's folder -> {bytes, sha256}.
    """

    number: int
    places: list[Place]
    records: list[Record]
    files: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries."""
        places, records = map(vars, self.places), map(vars, self.records)
        return {"number": self.number, "places": [*places], "records": [*records], "files": self.files}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> "Shard":
        """The shard of :meth:`to_dict`, after JSON too."""
        places = [Place(**p | {"touches": tuple(p["touches"])}) for p in line["places"]]
        return cls(line["number"], places, [Record(**r) for r in line["records"]], line["files"])


def make_shard(task: Task, job: Job) -> Shard:
    """Make a shard in the folder for new shards.

    Raises:
        OSError: it cannot be written, as on a full disk; nothing of it is left then.
    """
    writer = ShardWriter(job.partial, job.storage, task.number, job.arrays, job.per_shard)
    try:
        made = [_add(writer, item, task.number, job) for item in task.items]
        records = [record for _, record in made if record is not None]
        if records:
            files = writer.close()
        else:
            writer.discard()
            files = {}
    except BaseException:
        writer.discard()
        raise
    return Shard(task.number, [found for found, _ in made], records, files)


def _add(writer: ShardWriter, item: Item, number: int, job: Job) -> tuple[Place, Record | None]:
    if item.before is not None:
        if item.before.reason:
            return _moved(item, number, job), None
        try:
            return _moved(item, number, job), _copy(writer, item, job)
        except (IntegrityError, LookupError):
            pass  # the old volume is lost: it is made again of its source
    return _convert(writer, item, number, job)


def _moved(item: Item, number: int, job: Job) -> Place:
    assert item.before is not None
    mark = stamp(item.row, job.parameters, job.space)
    return replace(item.before, shard=number, place=item.place, stamp=mark)


def _copy(writer: ShardWriter, item: Item, job: Job) -> Record:
    """Write a row's volumes as they are in the old data set."""
    dataset = _open_old(job.folder, job.old)
    old = dataset.record(item.row.key)
    arrays = {name: dataset.read_stored(item.row.key, name) for name in old.checksums}
    return _write(writer, item, job, arrays, old.figures, old.flags, old.affines)


@lru_cache(maxsize=1)
def _open_old(folder: Path, header: str) -> Dataset:
    """The data set that is there; ``header`` tells it from those before it, which a process may have opened."""
    return open_dataset(folder)


def close_old() -> None:
    """Let go of the data set that volumes were copied from: its files may be removed now."""
    _open_old.cache_clear()


def _convert(writer: ShardWriter, item: Item, number: int, job: Job) -> tuple[Place, Record | None]:
    row, shape = item.row, job.grid["shape"]
    mark = stamp(row, job.parameters, job.space)  # before the files are read
    found = convert(row, job.schema, job.grid["spacing"], tuple(shape), job.space, job.dtype, job.keep_suspect)
    if found.reason:
        identity = "" if found.passing else _content(row, job, {})
        reason = without_names(found.reason, row_files(row, job.space))
        return Place(number, item.place, row.key, mark, identity, reason=" ".join(reason.split())), None
    hashes = {row.files[name]: volume.sha256 for name, volume in found.volumes.items()}
    arrays: dict[str, Any] = {name: volume.voxels for name, volume in found.volumes.items()}
    for name, volume in found.volumes.items():
        arrays |= {f"{name}_{label}": values for label, values in volume.maps.items()}
    figures = {f"{name}.{f}": x for name, volume in found.volumes.items() for f, x in volume.figures.items()}
    affines = {name: place(job.grid, volume.origin) for name, volume in found.volumes.items()}
    record = _write(writer, item, job, arrays, figures, found.flags, affines)
    cropped = max(volume.cropped for volume in found.volumes.values())
    touches = tuple(sorted({side for volume in found.volumes.values() for side in volume.touches}))
    identity = _content(row, job, hashes)
    return Place(number, item.place, row.key, mark, identity, float(f"{cropped:.6g}"), touches), record


def _content(row: Row, job: Job, known: Mapping[Path, str]) -> str:
    try:
        return content(row, job.parameters, job.space, known)
    except (OSError, ValueError):
        return ""  # a file is gone already


def _write(
    writer: ShardWriter,
    item: Item,
    job: Job,
    arrays: Mapping[str, Any],
    figures: Mapping[str, float],
    flags: list[str],
    affines: Mapping[str, Any],
) -> Record:
    while writer.used < item.place:
        writer.skip()
    row = item.row
    known = stored_values(row, job.schema)
    places = {name: np.asarray(affine, float).tolist() for name, affine in affines.items()}
    stored = writer.add(row.key, row.subject, known, arrays, places)
    return Record(
        row.key, row.subject, "", known, **vars(stored), figures=dict(figures), flags=list(flags), affines=places
    )
