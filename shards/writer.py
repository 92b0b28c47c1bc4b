"""Writing a packed data set by one process: atomic."""

import contextlib
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, nearest
from shards.files import locked_folder, sha256, sync, write_bytes
from shards.header import NAME
from shards.index import Index, Record, Split
from shards.schema import Schema, Value
from shards.shard_writer import STORAGES, ShardWriter, records_per_shard
from shards.zarr_coordinates import store_files

PARTIAL = ".partial"


class DatasetWriter:
    """Writes records in the order of :meth:`add`.

    Everything is written to ``FOLDER/.partial`` and moved by :meth:`finish`; ``index.json`` comes last, and a folder
    without it holds no data set. What an interrupted writer left is replaced. Other files are not touched.

    Args:
        folder: created where missing.
        storage: ``zarr`` or ``webdataset``.
        kind: ``volumes`` or ``latents``.
        schema: the variables.
        arrays: volume variable -> {shape, dtype} of one record's array.
        grid: of the volumes, see :class:`shards.index.Index`.
        group: the table's column that ``group`` of :meth:`add` stands for.

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
        self.per_shard = records_per_shard(self.arrays)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked_folder(self.folder))
        self._unlock = weakref.finalize(self, lock.close)
        self._partial = self.folder / PARTIAL
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._keys: set[str] = set()
        self._complete = 0  # shards
        self._shard: ShardWriter | None = None

    def close(self) -> None:
        """Release the folder without a data set in it."""
        self._unlock()

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
        self.files |= self._shard.close()
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
            write_bytes(self._partial / name, content)  # a process that is killed leaves nothing of it in the folder
            (self._partial / name).replace(self.folder / name)
            self.files[name] = _file_entry(self.folder / name)
        for source in sorted(p for p in self._partial.iterdir() if p.is_dir()):
            target = self.folder / source.name
            shutil.rmtree(target, ignore_errors=True)  # of a writer that was interrupted here
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
