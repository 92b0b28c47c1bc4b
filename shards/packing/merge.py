"""The end of a packing: complete shards become a data set, in one step; what it no longer needs is removed."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import IntegrityError
from shards.files import sha256, sync, write_bytes
from shards.index import Index, Record, Split
from shards.packing.journal import PARTIAL, Journal
from shards.packing.make import Job, Shard
from shards.packing.places import Place, digest, read_places, stored_values, write_places
from shards.participant_rows import Row
from shards.schema import Schema
from shards.split import draw_folds, draw_fractions
from shards.tables import remove_others
from shards.tar_shards import shard_path as tar_path
from shards.zarr_coordinates import store_files
from shards.zarr_store import shard_path as zarr_path

PLACES = "packing-"  # and a hash, so that an index and its places are replaced together
FILES = "files.json"  # lists all files of the data set that is there and of the new one, before the first is moved


def old_places(folder: Path, index: Index) -> list[Place] | None:
    """The places of a data set; None where it was not made by this program's packing.

    Raises:
        IntegrityError: they are damaged.
    """
    name = index.provenance.get("packing", {}).get("places")
    if name is None:
        return None
    path = folder / name
    if not path.is_file() or sha256(path) != index.files[name]["sha256"]:
        raise IntegrityError(f"{path}: damaged or missing; restore it, or remove {folder} and pack again")
    return read_places(path.read_bytes())


def collect(
    rows: Sequence[Row],
    groups: Mapping[str, str],
    schema: Schema,
    shards: Iterable[Shard],
    kept: Sequence[Place],
    old: Index | None,
) -> tuple[list[Record], list[Place]]:
    """The records and the places of a table, in its order.

    Args:
        rows: of the table.
        groups: subject -> its group.
        schema: the variables.
        shards: that were made.
        kept: places in the shards of the old data set that stay.
        old: the index of the old data set.
    """
    places = {place.key: place for place in kept}
    stored: dict[str, Record] = {}
    if old is not None and kept:
        wanted = {place.key for place in kept if not place.reason}
        stored = {record.key: record for record in old.records if record.key in wanted}
    for shard in shards:
        places |= {place.key: place for place in shard.places}
        stored |= {record.key: record for record in shard.records}
    records = []
    for row in rows:
        if not places[row.key].reason:
            record, values = stored[row.key], stored_values(row, schema)
            records.append(dataclasses.replace(record, subject=row.subject, group=groups[row.subject], values=values))
    return records, [places[row.key] for row in rows]


def write_dataset(
    journal: Journal,
    job: Job,
    old: Index | None,
    records: Sequence[Record],
    places: Sequence[Place],
    splits: Mapping[str, Split],
    group: str,
    provenance: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Index:
    """Move the new shards to their place, and replace the index; an old data set can be read until then.

    Args:
        journal: of the packing.
        job: of the packing.
        old: the index that is replaced.
        records, splits, group, provenance: see :class:`shards.index.Index`.
        places: of all rows.
        files: further small files of the data set, by name.
    """
    folder = journal.folder
    shards = sorted({record.slot // job.per_shard for record in records})
    paths = [path for number in shards for path in _paths(job, number)]
    made = {name: entry for shard in journal.shards.values() for name, entry in shard.files.items()}
    known = {**(dict(old.files) if old is not None else {}), **made}
    entries = {path: known[path] for path in paths if path in known}
    small = dict(files)
    if job.storage == "zarr":
        places_used = max(record.slot for record in records) + 1
        small |= store_files(job.arrays, job.grid, job.schema, records, places_used, job.per_shard)
    table = write_places(places)
    name = f"{PLACES}{digest(table.decode())[:12]}.tsv"
    small[name] = table
    write_bytes(journal.partial / FILES, json.dumps(sorted({*known, *small})).encode())
    for path in entries:
        if old is None or path not in old.files:
            _move(journal, path)
    for path, content in small.items():
        put(journal, path, content)
        entries[path] = {"bytes": len(content), "sha256": sha256(folder / path)}
    for parent in {(folder / path).parent for path in entries}:
        sync(parent)
    index = Index(
        kind="volumes",
        storage=job.storage,
        schema=job.schema,
        arrays=job.arrays,
        grid=job.grid,
        records=records,
        group=group,
        files=dict(sorted(entries.items())),
        splits=dict(splits),
        provenance={**provenance, "packing": {**provenance["packing"], "places": name}},
        per_shard=job.per_shard,
    )
    index.save(folder)
    _remove_unnamed(folder, index.files)
    return index


def put(journal: Journal, name: str, content: bytes) -> None:
    """Write a small file of the data set in one step; a process that is killed leaves nothing of it there."""
    for folder in (journal.partial, journal.folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(journal.partial / name, content)
    (journal.partial / name).replace(journal.folder / name)


def clean(folder: Path, index: Index | None, kept: Collection[str] = ()) -> None:
    """Remove the files of data sets before this one, and what an interrupted end has left, of any options.

    Args:
        folder: of the data set.
        index: of the data set that is there; None for none.
        kept: files of complete shards that are still to become a data set.
    """
    if index is not None or (folder / PARTIAL / FILES).is_file():
        remove_others(folder, index.tables.values() if index is not None else ())
    _remove_unnamed(folder, [*kept, *(index.files if index is not None else ())])


def _remove_unnamed(folder: Path, kept: Collection[str]) -> None:
    """Remove those of the listed files that are not kept, and folders that are empty then."""
    path = folder / PARTIAL / FILES
    listed = json.loads(path.read_bytes()) if path.is_file() else ()
    for file in set(listed).difference(kept):
        (folder / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # one that is not empty
            for parent in (folder / file).parents:
                parent.rmdir()


def _paths(job: Job, number: int) -> list[str]:
    """The files of a shard."""
    if job.storage == "webdataset":
        return [tar_path(number)]
    return [zarr_path(variable, number, len(spec["shape"])) for variable, spec in job.arrays.items()]


def _move(journal: Journal, name: str) -> None:
    source, target = journal.find(name), journal.folder / name
    if source is None:
        raise IntegrityError(f"{journal.partial / name}: missing; run the same command again")
    if source != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


def draw_again(old: Index, records: Sequence[Record], splits: Mapping[str, Split], group: str) -> dict[str, Split]:
    """The further splits that were recorded in a data set, drawn for its new rows."""
    found: dict[str, Split] = {}
    for name, split in old.splits.items():
        if name in splits or name in found:
            continue
        if split.method == "fractions":
            found[name] = draw_fractions(records, split.fractions, split.seed, group)
        elif split.method == "folds":
            prefix = name.removesuffix(f"-{split.folds[0]}-of-{split.folds[1]}")
            found |= draw_folds(records, split.folds[1], split.seed, group, prefix)
    return {name: split for name, split in found.items() if name not in splits}
