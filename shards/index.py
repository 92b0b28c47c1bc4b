"""The index of a packed data set: records, location and checksum of each volume, splits, provenance.

``index.json`` is small. The records, their keys with the splits, and the list of files are files of their own, which it
names together with their checksums (:mod:`shards.tables`). A new index replaces an old one in one step, when
``index.json`` is renamed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import RESTORE, DataError, IntegrityError, nearest
from shards.header import NAME as NAME
from shards.header import read_header, write_header
from shards.index_copy import write_copy
from shards.record_table import PARTS as PARTS
from shards.record_table import Assignment, Records
from shards.records import Record as Record
from shards.records import digest_entry
from shards.schema import Schema
from shards.tables import Files, open_records, records_in_memory, remove_others, write_files, write_keys, write_records


@dataclass(frozen=True)
class Split:
    """The part of each record, and how it was chosen.

    Attributes:
        method: ``fractions`` or ``folds`` for a draw; ``column`` for a split that the source's table gave.
        seed: of the draw.
        fractions: train, validation and test, for ``fractions``.
        folds: [number of this fold (from 1), number of folds], for ``folds``.
        group: the table's column of groups that are not divided; empty for none.
        assignment: key -> ``train``, ``validation`` or ``test``; records without a part are left out.
    """

    method: str
    seed: int
    fractions: list[float]
    folds: list[int]
    group: str
    assignment: Mapping[str, str]


@dataclass(frozen=True)
class Index:
    """The content of an index.

    Attributes:
        kind: ``volumes`` or ``latents``.
        storage: ``zarr`` or ``webdataset``.
        schema: the variables.
        arrays: volume variable -> {shape, dtype} of one record's array; ``scale`` too where numbers of [0, 1]
            are stored as integers (:mod:`shards.quantization`).
        grid: of the volumes: {spacing (mm), shape (voxels), affine (4 x 4, voxel to RAS mm, origin at the centre)}.
        records: in the order of the table; read when they are used.
        group: the table's column of groups; empty for none.
        files: path relative to the folder -> {bytes, sha256}, of every file except those of the index.
        splits: by name.
        provenance: software versions, arguments without paths, hash of the source.
        extra: further metadata of the writer (for latents: their scale and the autoencoder's hash).
        per_shard: places per shard; 0 in data sets of version 1.
        tables: of an index that was read, the files that hold it: {file, bytes, sha256, ...} by table. See
            :mod:`shards.tables`; none in version 1.
    """

    kind: str
    storage: str
    schema: Schema
    arrays: dict[str, dict[str, Any]]
    grid: dict[str, Any]
    records: Sequence[Record]
    group: str = ""
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    per_shard: int = 0
    tables: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _digest: str = field(default="", init=False, compare=False, repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the data: equal for equal content in either format, independent of the splits."""
        if not self._digest:
            content = {
                "schema": self.schema.to_dict(),
                **{k: getattr(self, k) for k in ("kind", "arrays", "grid", "extra")},
            }
            object.__setattr__(self, "_digest", _digest(content, map(digest_entry, self.records)))
        return self._digest

    def split(self, name: str = "default") -> Split:
        """The split of that name.

        Raises:
            DataError: an unknown name; the message names the nearest known one.
        """
        if name not in self.splits:
            raise DataError(nearest(name, self.splits, "split"))
        return self.splits[name]

    def subjects(self, split: str = "default") -> dict[str, set[str]]:
        """Part -> its subjects.

        Raises:
            DataError: as :meth:`split`.
        """
        records, assignment = self.records, self.split(split).assignment
        if isinstance(records, Records) and isinstance(assignment, Assignment):
            rows: Iterable[tuple[str | None, str]] = zip(assignment.parts(), records.column("subject"))
        else:
            rows = ((assignment.get(r.key), r.subject) for r in records)
        found: dict[str, set[str]] = {part: set() for part in PARTS}
        for part, subject in rows:
            if part is not None:
                found[part].add(subject)
        return found

    def of_equal_data(self, **changes: Any) -> "Index":
        """An index of the same data with other splits, places or provenance; its digest stays as it is known."""
        index = replace(self, **changes)
        object.__setattr__(index, "_digest", self._digest)
        return index

    def save(self, folder: Path) -> None:
        """Write the index; an index that was there is replaced in one step, when all of the new one is written."""
        tables = {
            "records": write_records(folder, self.records, self.schema, self.arrays),
            "keys": write_keys(folder, self.records, {name: s.assignment for name, s in self.splits.items()}),
            "files": write_files(folder, self.files),
        }
        plain = ("kind", "storage", "arrays", "grid", "group", "provenance", "extra", "per_shard", "digest")
        splits = {name: {k: v for k, v in vars(s).items() if k != "assignment"} for name, s in self.splits.items()}
        header = {name: getattr(self, name) for name in plain} | {"schema": self.schema.to_dict(), "splits": splits}
        write_header(folder, header | {"tables": tables})
        remove_others(folder, tables.values())
        write_copy(folder, own_files(self, tables))

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read an index.

        Raises:
            DataError: no index in the folder, or one of another version.
            IntegrityError: an index that differs from what was written.
        """
        folder = Path(folder)
        header = read_header(folder)
        while True:
            try:
                return cls._of_version_1(header) if header["version"] == 1 else cls._open(folder, header)
            except FileNotFoundError as error:
                before, header = header, read_header(folder)
                if header == before:
                    raise IntegrityError(f"{error.filename or error}: missing; {RESTORE}") from error
                # another process has replaced the index meanwhile

    @classmethod
    def _open(cls, folder: Path, header: dict[str, Any]) -> "Index":
        content = {name: header[name] for name in header if name not in ("version", "digest", "tables")}
        tables = header["tables"]
        records, codes = open_records(folder, tables["records"], tables["keys"])
        content["splits"] = {
            name: Split(**split, assignment=Assignment(records, codes[name]))
            for name, split in content["splits"].items()
        }
        content["schema"] = Schema.from_dict(content["schema"])
        index = cls(**content, records=records, files=Files(folder, tables["files"]))
        object.__setattr__(index, "tables", tables)
        object.__setattr__(index, "_digest", header["digest"])
        return index

    @classmethod
    def _of_version_1(cls, content: dict[str, Any]) -> "Index":
        digest = _digest(content, map(digest_entry, content["records"]))
        zarr = content["storage"] == "zarr"
        records = [
            Record(**r, slot=next(iter(r["offsets"].values()), 0) if zarr else i)
            for i, r in enumerate(content["records"])
        ]
        schema = Schema.from_dict(content["schema"])
        given = {name: split["assignment"] for name, split in content["splits"].items()}
        found, codes = records_in_memory(records, schema, content["arrays"], given)
        splits = {
            name: Split(**split | {"assignment": Assignment(found, codes[name])})
            for name, split in content["splits"].items()
        }
        plain = {k: v for k, v in content.items() if k != "version"}
        index = cls(**plain | {"schema": schema, "records": found, "splits": splits})
        object.__setattr__(index, "_digest", digest)
        return index


def own_files(index: Index, tables: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """The files of an index: ``index.json``, its tables, and the table of what became of each row of a packing."""
    places = index.provenance.get("packing", {}).get("places")
    names = [entry["file"] for entry in (index.tables if tables is None else tables).values()]
    return [NAME, *names, *([places] if places else [])]


def array_checksum(array: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _digest(content: Mapping[str, Any], records: Iterable[Any]) -> str:
    """SHA-256 of the JSON text of some members of an index with sorted keys, the records among them one by one."""
    head = json.dumps({name: content[name] for name in ("arrays", "extra", "grid", "kind")}, sort_keys=True)
    found = hashlib.sha256(f'{head[:-1]}, "records": ['.encode())
    for i, record in enumerate(records):
        found.update(f"{', ' if i else ''}{json.dumps(record, sort_keys=True)}".encode())
    found.update(f'], "schema": {json.dumps(content["schema"], sort_keys=True)}}}'.encode())
    return found.hexdigest()
