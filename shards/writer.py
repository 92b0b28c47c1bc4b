"""Writing a packed data set: atomic, and resumable after an interruption."""

import dataclasses
import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, nearest
from shards.files import lock_folder, sha256, sync, write_bytes
from shards.header import NAME, VERSION
from shards.index import Index, Record, Split
from shards.schema import Schema, Value
from shards.shard_writer import STORAGES, ShardWriter, records_per_shard
from shards.zarr_coordinates import store_files

PARTIAL = ".partial"


class DatasetWriter:
    """Writes records in the order of :meth:`add`.

    Everything is written to ``FOLDER/.partial`` and moved by :meth:`finish`; ``index.json`` comes last, and a folder
    without it holds no data set. Other files in the folder are not touched.

    Args:
        folder: created where missing.
        storage: ``zarr`` or ``webdataset``.
        kind: ``volumes`` or ``latents``.
        schema: the variables.
        arrays: volume variable -> {shape, dtype} of one record's array.
        grid: of the volumes, see :class:`shards.index.Index`.
        group: the table's column that ``group`` of :meth:`add` stands for.
        token: identifies the content. A writer resumes after the complete shards of an interrupted writer with the
            same token: ``records`` hold what these contain. None starts from the beginning.

    Raises:
        DataError: the folder holds a data set already, another process writes to it, or an argument cannot be used.
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
            raise DataError(f"{self.folder} already holds a packed data set; remove it or choose another folder")
        self.storage, self.kind, self.schema, self.group = storage, kind, schema, group
        self.arrays = {
            name: {**spec, "shape": [int(n) for n in spec["shape"]], "dtype": np.dtype(spec["dtype"]).str}
            for name, spec in arrays.items()
        }
        self.grid = dict(grid)
        self.records: list[Record] = []
        self.files: dict[str, dict[str, Any]] = {}
        self._saved_records = 0
        self.per_shard = records_per_shard(self.arrays)
        self._partial = self.folder / PARTIAL
        self._journal = self._partial / "journal.jsonl"
        self._partial.mkdir(parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, lock_folder(self.folder))
        self._resume(token)
        self._keys = {r.key for r in self.records}
        self._shard: ShardWriter | None = None

    def close(self) -> None:
        """Release the folder; complete shards stay for a writer with the same token."""
        self._unlock()

    def _resume(self, token: str | None) -> None:
        lines = self._read_journal()
        first = {"version": VERSION, "token": token}
        if token is None or not lines or lines[0] != first:
            lines = []
        files = {name: entry for line in lines[1:] for name, entry in line["files"].items()}
        for name in {name.partition("/")[0] for name in files}:
            if not (self._partial / name).exists() and (self.folder / name).exists():
                (self.folder / name).replace(self._partial / name)  # finish() was interrupted before the index
        if not lines or not all((self._partial / name).is_file() for name in files):
            lines, files = [first], {}
            self._journal.unlink(missing_ok=True)  # first, so that a journal never lists what is gone
            for path in self._partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.files = files
        for line in lines[1:]:
            self.records += [Record(**r) for r in line["records"]]
        self._saved_records = len(self.records)
        self._complete = len(lines) - 1
        for path in self._written():
            path.unlink()
        write_bytes(self._journal, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _read_journal(self) -> list[dict[str, Any]]:
        """The complete lines: a token, then records and files of each shard."""
        lines = []
        if self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the process was killed while it wrote this line
                    break
        return lines

    def _written(self) -> list[Path]:
        """Data files that are not in the journal yet."""
        found = (p for p in self._partial.rglob("*") if p.is_file() and p != self._journal)
        return sorted(p for p in found if p.relative_to(self._partial).as_posix() not in self.files)

    def add(
        self,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        group: str = "",
        figures: Mapping[str, float] | None = None,
        flags: Sequence[str] = (),
        affines: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one record.

        Args:
            key: unique; letters, digits, ``-`` and ``_``.
            subject: ``sub-X``.
            values: scalar variable -> value; variables left out are missing.
            arrays: volume variable -> array of the declared shape and dtype; variables left out are missing.
            group: see :class:`shards.index.Record`; the subject where empty.
            figures, flags, affines: see :class:`shards.index.Record`.

        Raises:
            DataError: a duplicate key, or an array whose name, shape or dtype was not declared.
        """
        if key in self._keys:
            raise DataError(f"{key}: added twice")
        if self._shard is None:
            self._shard = ShardWriter(self._partial, self.storage, self._complete, self.arrays, self.per_shard)
        known = {v.name: as_value(values.get(v.name), v.kind) for v in self.schema.scalars}
        places = {name: np.asarray(affine, float).tolist() for name, affine in (affines or {}).items()}
        stored = self._shard.add(key, subject, known, arrays, places)
        self._keys.add(key)
        found: dict[str, Any] = {"figures": dict(figures or {}), "flags": list(flags), "affines": places}
        self.records.append(Record(key, subject, group or subject, known, **vars(stored), **found))
        if self._shard.used == self.per_shard:
            self._flush()

    def _flush(self) -> None:
        assert self._shard is not None
        new = self._shard.close()
        self.files |= new
        line = {
            "records": [dataclasses.asdict(r) for r in self.records[self._saved_records :]],
            "files": new,
        }
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._saved_records = len(self.records)
        self._shard, self._complete = None, self._complete + 1

    def finish(
        self,
        splits: Mapping[str, Split] | None = None,
        provenance: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Index:
        """Move the files to their final place and write the index.

        Args:
            splits: by name.
            provenance: software, arguments, source.
            extra: further JSON-able metadata.
            files: further small files of the data set, by name.

        Returns:
            The index as written.
        """
        if self._shard is not None:
            self._flush()
        if self.storage == "zarr":
            described = (self.arrays, self.grid, self.schema, self.records)
            for name, content in store_files(*described, len(self.records), self.per_shard).items():
                (self._partial / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._partial / name, content)
                self.files[name] = _file_entry(self._partial / name)
        for name, content in (files or {}).items():
            write_bytes(self.folder / name, content)
            self.files[name] = _file_entry(self.folder / name)
        for source in sorted(p for p in self._partial.iterdir() if p.is_dir()):
            target = self.folder / source.name
            shutil.rmtree(target, ignore_errors=True)  # of an interrupted writer with another token
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
            per_shard=self.per_shard,
        )
        index.save(self.folder)
        shutil.rmtree(self._partial)
        self.close()
        return index


def as_value(value: Value, kind: str) -> Value:
    """A scalar as it is stored: words of categories, else floating-point numbers."""
    return value if value is None or kind == "categorical" else float(value)


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
