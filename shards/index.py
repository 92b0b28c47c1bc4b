"""The index of a packed dataset: what it holds, where each volume lies, checksums, splits, provenance."""

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
        group: name of the set of subjects that stay on one side of a split (the first of them).
        values: scalar variable -> value, None where missing.
        checksums: volume variable -> SHA-256 of the array's bytes (C order, little endian); missing ones are left out.
        shard: the tar file, relative to the folder; empty in a Zarr store.
        offsets: volume variable -> byte offset of the array in the tar file, or row in the Zarr array.
    """

    key: str
    subject: str
    group: str
    values: dict[str, Value]
    checksums: dict[str, str]
    shard: str
    offsets: dict[str, int]


@dataclass(frozen=True)
class Split:
    """Who is on which side, and how that was drawn.

    Attributes:
        method: ``fractions`` or ``folds``.
        seed: of the draw.
        fractions: train, validation and test, for ``fractions``.
        folds: [this fold (from 1), how many], for ``folds``.
        group: the table's column whose equal values stay on one side; empty for none.
        assignment: key -> ``train``, ``validation`` or ``test``.
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
        group: the table's column that records were grouped by; empty for none.
        records: in the order of the table.
        files: path relative to the folder -> {bytes, sha256}, of every file but the index.
        splits: by name.
        provenance: software versions, arguments without paths, hash of the source.
        extra: what the writer adds (for latents: their scale and the autoencoder's hash).
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
        """SHA-256 that identifies the data: equal for equal content in either format, whatever the splits."""
        content = self.to_dict()
        content["records"] = [[r.key, r.subject, r.values, r.checksums] for r in self.records]
        parts = {k: content[k] for k in ("kind", "schema", "arrays", "grid", "records", "extra")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def split(self, name: str = "default") -> Split:
        """The split of that name.

        Raises:
            DataError: naming the nearest known one.
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
        """Write ``index.json`` whole, with its own checksum in it."""
        write_bytes(folder / NAME, _render(self.to_dict()))

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read ``index.json``.

        Raises:
            DataError: no index in the folder, or one of another version.
            IntegrityError: an index that is not, byte for byte, as it was written.
        """
        path = Path(folder) / NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{folder}: no packed dataset here ({NAME}: {error.strerror})") from error
        try:
            content = json.loads(raw)
            content.pop("checksum")
            whole = _render(content) == raw
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise IntegrityError(f"{path}: damaged (its own checksum does not match); pack again or restore it")
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


def _render(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, allow_nan=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1, allow_nan=False).encode() + b"\n"
