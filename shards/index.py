"""The index of a packed data set: records, location and checksum of each volume, splits, provenance."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, IntegrityError, nearest
from shards.files import write_bytes
from shards.schema import Schema, Value

NAME = "index.json"
VERSION = 1
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Record:
    """One visit of one subject.

    Attributes:
        key: ``sub-X`` or ``sub-X_ses-Y``, unique.
        subject: ``sub-X``.
        group: the subject's group, which a split does not divide; named by its first subject.
        values: scalar variable -> value, None where missing.
        checksums: volume variable -> SHA-256 of the array's bytes (C order, little endian), without missing volumes.
        shard: the tar file, relative to the folder; empty in a Zarr store.
        offsets: volume variable -> byte offset of the array in the tar file, or row in the Zarr array.
        figures: ``VARIABLE.FIGURE`` -> value, of quality control; see :mod:`shards.qc.limits`;
            ``VARIABLE.preprocess.FIGURE`` where the scan was preprocessed.
        flags: ``VARIABLE.FIGURE`` of each limit of quality control that the scans violate.
        affines: volume variable -> (4, 4), from the voxels of the common grid to mm in the space of the source, where
            the volume lies; empty in data sets of earlier versions.
    """

    key: str
    subject: str
    group: str
    values: dict[str, Value]
    checksums: dict[str, str]
    shard: str
    offsets: dict[str, int]
    figures: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    affines: dict[str, list[list[float]]] = field(default_factory=dict)


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
    assignment: dict[str, str]


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``.

    Attributes:
        kind: ``volumes`` or ``latents``.
        storage: ``zarr`` or ``webdataset``.
        schema: the variables.
        arrays: volume variable -> {shape, dtype} of one record's array.
        grid: of the volumes: {spacing (mm), shape (voxels), affine (4 x 4, voxel to RAS mm, origin at the centre)}.
        group: the table's column of groups; empty for none.
        records: in the order of the table.
        files: path relative to the folder -> {bytes, sha256}, of every file except the index.
        splits: by name.
        provenance: software versions, arguments without paths, hash of the source.
        extra: further metadata of the writer (for latents: their scale and the autoencoder's hash).
    """

    kind: str
    storage: str
    schema: Schema
    arrays: dict[str, dict[str, Any]]
    grid: dict[str, Any]
    records: list[Record]
    group: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the data: equal for equal content in either format, independent of the splits."""
        content = self.to_dict()
        content["records"] = [
            [r.key, r.subject, r.values, r.checksums, *([r.affines] if r.affines else [])] for r in self.records
        ]
        parts = {k: content[k] for k in ("kind", "schema", "arrays", "grid", "records", "extra")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def split(self, name: str = "default") -> Split:
        """The split of that name.

        Raises:
            DataError: an unknown name; the message names the nearest known one.
        """
        if name not in self.splits:
            raise DataError(nearest(name, self.splits, "split"))
        return self.splits[name]

    def to_dict(self) -> dict[str, Any]:
        """The index as plain dictionaries, in the order of its file."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["schema"] = self.schema.to_dict()
        content["records"] = [dataclasses.asdict(r) for r in self.records]
        content["splits"] = {name: dataclasses.asdict(s) for name, s in self.splits.items()}
        return {"version": VERSION, **content}

    def save(self, folder: Path) -> None:
        """Write ``index.json`` atomically, with its own checksum in it."""
        write_bytes(folder / NAME, _serialize(self.to_dict()))

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read ``index.json``.

        Raises:
            DataError: no index in the folder, or one of another version.
            IntegrityError: an index that differs from what was written.
        """
        path = Path(folder) / NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{folder}: no packed data set here ({NAME}: {error.strerror})") from error
        try:
            content = json.loads(raw)
            content.pop("checksum")
            intact = _serialize(content) == raw
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise IntegrityError(f"{path}: damaged (its own checksum does not match); restore it or pack again")
        version = content.pop("version")
        if version != VERSION:
            raise DataError(f"{path}: format version {version}, this program reads {VERSION}")
        content["schema"] = Schema.from_dict(content["schema"])
        content["records"] = [Record(**r) for r in content["records"]]
        content["splits"] = {name: Split(**s) for name, s in content["splits"].items()}
        return cls(**content)


def array_checksum(array: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _serialize(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, allow_nan=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1, allow_nan=False).encode() + b"\n"
