"""The files that hold the tables of an index: records, keys with splits, and the list of the data set's files.

Each is named ``TABLE-HASH``, with the first digits of its SHA-256. The header says of each: {file, bytes, sha256}, and
of Arrow files the pieces that are checked one by one, see :mod:`shards.arrow_files`.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.arrow_files import ArrowFile, checksums, mapped, numbers_of, write_arrow
from shards.errors import RESTORE, DataError, IntegrityError
from shards.files import atomic_file, sha256, write_bytes
from shards.record_table import PARTS, Assignment, Keys, Records, key_hash
from shards.records import BATCH_ROWS, Record, record_schema, to_columns
from shards.schema import Schema

NAMES = re.compile(r"(records|keys)-[0-9a-f]{12}\.arrow|files-[0-9a-f]{12}\.json")
UNFINISHED = re.compile(r"\.(records|keys|files|index)\b.*\.part")
Entry = dict[str, Any]


def write_records(folder: Path, records: Sequence[Record], schema: Schema, volumes: Iterable[str]) -> Entry:
    """Write the records; those that were read from this folder stay where they are.

    Returns:
        The header's entry.
    """
    if isinstance(records, Records) and records.folder and (folder / records.entry["file"]).is_file():
        return records.entry  # of the same name, so of the same content
    columns = record_schema(schema, volumes, records)
    return _write_arrow(folder, "records", columns, _batches(records, columns)) | {"rows": len(records)}


def write_keys(folder: Path, records: Sequence[Record], splits: Mapping[str, Mapping[str, str]]) -> Entry:
    """Write the keys' hashes and the assignment of each split.

    Returns:
        The header's entry.
    """
    batch = _key_batch(records, splits)
    return _write_arrow(folder, "keys", batch.schema, [batch])


def write_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Entry:
    """Write the list of files.

    Returns:
        The header's entry.
    """
    content = json.dumps(dict(files), indent=0, sort_keys=True).encode() + b"\n"
    digest = hashlib.sha256(content).hexdigest()
    name = f"files-{digest[:12]}.json"
    write_bytes(folder / name, content)
    return {"file": name, "bytes": len(content), "sha256": digest}


def _key_batch(records: Sequence[Record], splits: Mapping[str, Mapping[str, str]]) -> pa.RecordBatch:
    keys = records.all_keys if isinstance(records, Records) else [r.key for r in records]
    return _key_columns(keys, {name: _part_codes(keys, assignment) for name, assignment in splits.items()})


def _key_columns(keys: Sequence[str], splits: Mapping[str, NDArray[np.uint8]]) -> pa.RecordBatch:
    """The columns by which keys are found, and one column of parts for each split.

    Args:
        keys: of all records, in order.
        splits: name -> (N,) codes, see :class:`Assignment`.

    Raises:
        DataError: a key that two records have.
    """
    if isinstance(keys, Keys):
        hashes, rows = keys.records.hashes, keys.records.rows
    else:
        hashes = np.array([key_hash(key) for key in keys], np.uint64)
        rows = np.argsort(hashes, kind="stable").astype(np.uint32)
        hashes = hashes[rows]
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        found = [keys[rows[i]] for i in np.union1d(equal, equal + 1)]
        if twice := [key for key, count in Counter(found).items() if count > 1]:
            raise DataError(f"{twice[0]}: two records with this key")
    columns = {"hash": hashes, "row": rows, **{f"split.{name}": codes for name, codes in splits.items()}}
    return pa.record_batch({name: pa.array(values) for name, values in columns.items()})


def _part_codes(keys: Sequence[str], assignment: Mapping[str, str]) -> NDArray[np.uint8]:
    """(N,) codes of an assignment, see :class:`Assignment`."""
    if isinstance(assignment, Assignment) and isinstance(keys, Keys) and assignment.records is keys.records:
        return assignment.codes
    code = {part: i + 1 for i, part in enumerate(PARTS)}
    return np.array([code[assignment[key]] if key in assignment else 0 for key in keys], np.uint8)


def _batches(records: Iterable[Record], columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    remaining = iter(records)
    while rows := list(itertools.islice(remaining, BATCH_ROWS)):
        yield to_columns(rows, columns)


def _write_arrow(folder: Path, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Entry:
    """Write a file to its name, which is known when all of it is."""
    part = folder / f".{table}.part"
    try:
        with part.open("wb") as sink:
            ends = write_arrow(sink, schema, batches)
        crcs = checksums(mapped(part), ends)
        digest = sha256(part)
        name = f"{table}-{digest[:12]}.arrow"
        with atomic_file(folder / name) as target:
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return {"file": name, "bytes": ends[-1], "sha256": digest, "ends": ends, "crc32c": crcs}


def open_records(folder: Path, records: Entry, keys: Entry) -> tuple[Records, dict[str, NDArray[np.uint8]]]:
    """The records, and split -> code of each record's part.

    Raises:
        FileNotFoundError: one of the files is missing.
        IntegrityError: one of them is damaged.
    """
    for entry in (records, keys):
        if not NAMES.fullmatch(entry["file"]):
            raise IntegrityError(f"{folder}: {entry['file']!r} is no table of an index")
    found = ArrowFile.open(folder / records["file"], records["ends"], records["crc32c"])
    hashes, rows, codes = _read_keys(ArrowFile.open(folder / keys["file"], keys["ends"], keys["crc32c"]))
    return Records(found, records["rows"], hashes, rows, folder, records), codes


def records_in_memory(
    records: Sequence[Record], schema: Schema, volumes: Iterable[str], splits: Mapping[str, Mapping[str, str]]
) -> tuple[Records, dict[str, NDArray[np.uint8]]]:
    """As :func:`open_records`, of records that are in no such file."""
    columns = record_schema(schema, volumes, records)
    found = _in_memory("records", columns, _batches(records, columns))
    batch = _key_batch(records, splits)
    hashes, rows, codes = _read_keys(_in_memory("keys", batch.schema, [batch]))
    return Records(found, len(records), hashes, rows), codes


def _in_memory(name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> ArrowFile:
    sink = pa.BufferOutputStream()
    ends = write_arrow(sink, schema, batches)
    content = sink.getvalue()
    return ArrowFile(name, content, ends, checksums(content, ends))


def _read_keys(file: ArrowFile) -> tuple[NDArray[np.uint64], NDArray[np.uint32], dict[str, NDArray[np.uint8]]]:
    columns = {name: numbers_of(column) for name, column in zip(file.schema.names, file.batch(0).columns)}
    hashes, rows = columns.pop("hash"), columns.pop("row")
    return hashes, rows, {name.removeprefix("split."): codes for name, codes in columns.items()}


class Files(Mapping[str, dict[str, Any]]):
    """Path relative to the folder -> {bytes, sha256}; read from its file when it is first used.

    Args:
        folder: of the data set.
        entry: of the header.
    """

    def __init__(self, folder: Path, entry: Entry) -> None:
        self._path, self._entry = folder / entry["file"], entry
        self._content: dict[str, dict[str, Any]] | None = None

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._content is None:
            try:
                raw = self._path.read_bytes()
            except OSError as error:
                raise IntegrityError(f"{self._path.name}: {error.strerror}; restore it") from error
            if hashlib.sha256(raw).hexdigest() != self._entry["sha256"]:
                raise IntegrityError(f"{self._path.name}: damaged (checksum); {RESTORE}")
            self._content = json.loads(raw)
        return self._content

    def __getitem__(self, path: str) -> dict[str, Any]:
        return self._read()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def remove_others(folder: Path, entries: Iterable[Entry]) -> None:
    """Remove tables that the present index does not name, and what a process that was killed left of one."""
    named = {entry["file"] for entry in entries}
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) or (NAMES.fullmatch(path.name) and path.name not in named):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
