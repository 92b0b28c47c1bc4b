"""Writing a packed dataset, whole or not at all, and going on after an interruption."""

import dataclasses
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, nearest
from shards.files import sha256, sync, write_bytes
from shards.index import NAME, Index, Record, Split, array_checksum
from shards.schema import Schema, Value
from shards.tar_shards import TarWriter

STORAGES = ("webdataset", "zarr")
PARTIAL = ".partial"
SHARD_BYTES = 64 * 2**20  # large enough for sequential reads, small enough to have many to share out
SHARD_RECORDS = 1024  # bounds the chunk table that a Zarr reader fetches with each access


class DatasetWriter:
    """Packs records in the order of :meth:`add`.

    Everything is written to ``FOLDER/.partial`` and moved by :meth:`finish`; ``index.json`` comes last, and a folder
    without it holds no dataset. Other files in the folder are left alone.

    Args:
        folder: made where missing.
        storage: ``zarr`` or ``webdataset``.
        kind: ``volumes`` or ``latents``.
        schema: the variables.
        arrays: volume variable -> {shape, dtype} of one record's array.
        grid: of the volumes, see :class:`shards.index.Index`.
        group: the table's column that ``group`` of :meth:`add` stands for.
        token: what is being written; what an interrupted writer of the same token left is kept, its records in
            ``records`` and its notes in ``notes``. None starts afresh.

    Raises:
        DataError: the folder holds a dataset already, another one writes it, or an argument cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        storage: str,
        kind: str,
        schema: Schema,
        arrays: Mapping[str, Mapping[str, Any]],
        grid: Mapping[str, Any],
        group: str = "",
        token: str | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise DataError(nearest(storage, STORAGES, "format"))
        self.folder = Path(folder)
        if (self.folder / NAME).exists():
            raise DataError(f"{self.folder} already holds a packed dataset; remove it or choose another folder")
        self.storage, self.kind, self.schema, self.group = storage, kind, schema, group
        self.arrays = {
            name: {"shape": [int(n) for n in spec["shape"]], "dtype": np.dtype(spec["dtype"]).str}
            for name, spec in arrays.items()
        }
        self.grid = dict(grid)
        self.records: list[Record] = []
        self.notes: list[Any] = []
        self.files: dict[str, dict[str, Any]] = {}
        self._saved_records = self._saved_notes = 0
        self._bytes = sum(int(np.prod(a["shape"])) * np.dtype(a["dtype"]).itemsize for a in self.arrays.values())
        self._per_shard = max(1, min(SHARD_RECORDS, SHARD_BYTES // max(self._bytes, 1)))
        self._partial = self.folder / PARTIAL
        self._journal = self._partial / "journal.jsonl"
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._resume(token)
        self._keys = {r.key for r in self.records}
        self._store = self._open_store()

    def _lock(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._unlock()
            raise DataError(f"{self.folder} is being written by another writer") from None

    def close(self) -> None:
        """Let others write the folder; what is complete stays for a writer with the same token to go on from."""
        self._unlock()

    def _resume(self, token: str | None) -> None:
        lines = []
        if token is not None and self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the line that was being written when the process ended
                    break
        if not lines or lines[0].get("token") != token:
            lines = [{"token": token}]
            shutil.rmtree(self._partial)
            self._partial.mkdir()
        for line in lines[1:]:
            self.records += [Record(**r) for r in line["records"]]
            self.notes += line["notes"]
            self.files |= line["files"]
        self._saved_records, self._saved_notes = len(self.records), len(self.notes)
        for path in self._written():
            path.unlink()
        write_bytes(self._journal, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _open_store(self) -> Any:
        if self.storage == "webdataset":
            return TarWriter(self._partial, len(self.files))
        from shards.zarr_store import ZarrWriter  # zarr takes a second to import

        return ZarrWriter(self._partial, self.arrays, len(self.records), self._per_shard)

    def _written(self) -> list[Path]:
        """Data files that the journal does not know yet."""
        found = (p for p in self._partial.rglob("*") if p.is_file() and p.name != "zarr.json" and p != self._journal)
        return sorted(p for p in found if p.relative_to(self._partial).as_posix() not in self.files)

    def note(self, item: Any) -> None:
        """Keep a JSON-able ``item`` with the records, for a resumed writer to find in ``notes``."""
        self.notes.append(item)

    def add(
        self,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        group: str = "",
    ) -> None:
        """Append one record.

        Args:
            key: unique; letters, digits, ``-`` and ``_``.
            subject: whose record it is.
            values: scalar variable -> value; those not named are missing.
            arrays: volume variable -> array of the declared shape and dtype; those not named are missing.
            group: see :class:`shards.index.Record`; the subject where empty.

        Raises:
            DataError: a key seen before, or an array of another name, shape or dtype than declared.
        """
        if key in self._keys:
            raise DataError(f"{key}: added twice")
        for name, array in arrays.items():
            if name not in self.arrays:
                raise DataError(f"{key}: {nearest(name, self.arrays, 'volume')}")
            spec = self.arrays[name]
            if list(array.shape) != spec["shape"] or array.dtype != np.dtype(spec["dtype"]):
                raise DataError(
                    f"{key} {name}: {array.dtype} {array.shape}, declared were {spec['dtype']} {tuple(spec['shape'])}"
                )
        self._keys.add(key)
        known = {v.name: values.get(v.name) for v in self.schema.scalars}
        ordered = {name: np.ascontiguousarray(arrays[name]) for name in self.arrays if name in arrays}
        shard = self._store.name
        offsets = self._store.add(key, subject, known, ordered)
        checksums = {name: array_checksum(array) for name, array in ordered.items()}
        self.records.append(Record(key, subject, group or subject, known, checksums, shard, offsets))
        if len(self.records) - self._saved_records >= self._per_shard:
            self._flush()

    def _flush(self) -> None:
        self._store.flush()
        new = {}
        for path in self._written():
            sync(path)
            new[path.relative_to(self._partial).as_posix()] = _describe(path)
        self.files |= new
        line = {
            "records": [dataclasses.asdict(r) for r in self.records[self._saved_records :]],
            "notes": self.notes[self._saved_notes :],
            "files": new,
        }
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._saved_records, self._saved_notes = len(self.records), len(self.notes)

    def finish(
        self,
        splits: Mapping[str, Split] | None = None,
        provenance: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Index:
        """Move everything to its place and write the index.

        Args:
            splits: by name.
            provenance: software, arguments, source.
            extra: anything JSON-able that belongs to the data.
            files: further small files of the dataset, by name.

        Returns:
            The index as written.
        """
        if len(self.records) > self._saved_records:
            self._flush()
        for path in sorted(self._partial.rglob("zarr.json")):
            sync(path)
            self.files[path.relative_to(self._partial).as_posix()] = _describe(path)
        for name, content in (files or {}).items():
            write_bytes(self.folder / name, content)
            self.files[name] = _describe(self.folder / name)
        for source in sorted(p for p in self._partial.iterdir() if p.is_dir()):
            target = self.folder / source.name
            shutil.rmtree(target, ignore_errors=True)  # of a writer that ended between these moves and the index
            source.replace(target)
        sync(self.folder)
        index = Index(
            kind=self.kind,
            storage=self.storage,
            schema=self.schema,
            arrays=self.arrays,
            grid=self.grid,
            records=self.records,
            group=self.group,
            files=dict(sorted(self.files.items())),
            splits=dict(splits or {}),
            provenance=dict(provenance or {}),
            extra=dict(extra or {}),
        )
        index.save(self.folder)
        shutil.rmtree(self._partial)
        self.close()
        return index


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
