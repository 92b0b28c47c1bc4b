"""The records of a data set as a sequence that reads them when they are used, and the sequences of their keys."""

import hashlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.arrow_files import ArrowFile, numbers_of
from shards.records import BATCH_ROWS, Record, from_columns
from shards.schema import Value

PARTS = ("train", "validation", "test")


Rows = NDArray[np.int64] | range


class Place(NamedTuple):
    """Where a volume is stored; see :class:`shards.records.Record`."""

    shard: str
    slot: int
    offset: int
    size: int
    crc: int


class _Batch:
    """A batch of records with its numbers as arrays."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.rows = batch
        self.keys, self.shards = batch.column("key"), batch.column("shard")
        self.values = {
            name.removeprefix("value."): batch.column(i)
            for i, name in enumerate(batch.schema.names)
            if name.startswith("value.")
        }
        self.numbers: dict[str, NDArray[Any]] = {
            name: numbers_of(batch.column(i))
            for i, name in enumerate(batch.schema.names)
            if name == "slot" or name.startswith(("offset.", "size.", "crc32c."))
        }


class Records(Sequence[Record]):
    """The records of a data set, in order. Equal to a list of the same records.

    Args:
        file: batches of :data:`shards.records.BATCH_ROWS` records, the last one shorter.
        count: number of records.
        hashes: (N,) sorted hashes of the keys, see :func:`key_hash`.
        rows: (N,) row of the record of each hash.
        folder: of the data set, where the file is in one.
        entry: of the file in the header.
    """

    def __init__(
        self,
        file: ArrowFile,
        count: int,
        hashes: NDArray[np.uint64],
        rows: NDArray[np.uint32],
        folder: Path | None = None,
        entry: Mapping[str, Any] | None = None,
    ) -> None:
        self.file, self.folder, self.entry = file, folder, dict(entry or {})
        self.hashes, self.rows = hashes, rows
        self._count = count
        self._batches: dict[int, _Batch] = {}

    def __len__(self) -> int:
        return self._count

    def _batch(self, row: int) -> tuple[_Batch, int]:
        """The batch of a row, and the row's place in it."""
        number, place = divmod(row, BATCH_ROWS)
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = _Batch(self.file.batch(number))
        return batch, place

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...

    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self._count))]
        batch, place = self._batch(range(self._count)[row])
        return next(from_columns(batch.rows.slice(place, 1)))

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, self._count, BATCH_ROWS):
            yield from from_columns(self._batch(start)[0].rows)

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def row(self, key: str) -> int:
        """The row of a key; -1 where no record has it."""
        wanted = key_hash(key)
        at = int(self.hashes.searchsorted(wanted))
        while at < self._count and self.hashes[at] == wanted:
            row = int(self.rows[at])
            if self.key(row) == key:
                return row
            at += 1
        return -1

    def key(self, row: int) -> str:
        """The key of a row."""
        batch, place = self._batch(row)
        return str(batch.keys[place])

    def values(self, row: int) -> dict[str, Value]:
        """Scalar variable -> value of a row, None where missing."""
        batch, place = self._batch(row)
        return {name: column[place].as_py() for name, column in batch.values.items()}

    @property
    def all_keys(self) -> "Keys":
        """All keys, in order."""
        return Keys(self)

    def column(self, name: str, rows: Rows | None = None) -> Iterator[Any]:
        """The values of one column in the order of ``rows``, by default of all; a batch is decoded at a time.

        For the names, see :func:`shards.records.record_schema`.
        """
        wanted = np.arange(self._count) if rows is None else np.asarray(rows)
        numbers = wanted // BATCH_ROWS
        for piece in np.split(wanted, np.flatnonzero(np.diff(numbers)) + 1):
            if len(piece):
                cells = self._batch(int(piece[0]))[0].rows.column(name).to_pylist()
                yield from (cells[place] for place in (piece % BATCH_ROWS).tolist())

    def has(self, variable: str) -> NDArray[np.bool_]:
        """(N,) whether each record has a volume."""
        batches = (self._batch(start)[0] for start in range(0, self._count, BATCH_ROWS))
        return np.concatenate([np.zeros(0, bool), *(batch.numbers[f"offset.{variable}"] >= 0 for batch in batches)])

    def place(self, row: int, variable: str) -> Place | None:
        """Where a volume of a record is stored; None where the record lacks it."""
        batch, place = self._batch(row)
        numbers = batch.numbers
        offset = numbers.get(f"offset.{variable}")
        if offset is None or offset[place] < 0:
            return None
        return Place(
            str(batch.shards[place]),
            int(numbers["slot"][place]),
            int(offset[place]),
            int(numbers[f"size.{variable}"][place]),
            int(numbers[f"crc32c.{variable}"][place]),
        )


class Keys(Sequence[str]):
    """The keys of some records. Equal to a list of the same keys.

    Args:
        records: of the data set.
        rows: (N,) of the records; None for all.
    """

    def __init__(self, records: Records, rows: Rows | None = None) -> None:
        self.records = records
        self.rows = range(len(records)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "Keys": ...

    def __getitem__(self, place: int | slice) -> "str | Keys":
        if isinstance(place, slice):
            return Keys(self.records, self.rows[place])
        return self.records.key(int(self.rows[place]))

    def __iter__(self) -> Iterator[str]:
        return self.records.column("key", self.rows)

    def __contains__(self, key: object) -> bool:
        row = self.records.row(key) if isinstance(key, str) else -1
        return row >= 0 and bool(np.any(np.asarray(self.rows) == row))

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[str]) -> list[str]:
        return [*self, *other]

    def __radd__(self, other: Iterable[str]) -> list[str]:
        return [*other, *self]

    def having(self, variables: Iterable[str]) -> "Keys":
        """Those whose records have all of the volumes."""
        rows = np.asarray(self.rows, np.int64)
        for variable in variables:
            rows = rows[self.records.has(variable)[rows]]
        return Keys(self.records, rows)

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 100 else f"<{len(self):,} keys, {self[0]} to {self[-1]}>"


class Assignment(Mapping[str, str]):
    """Key -> part of a split, in the order of the records; records without a part are left out.

    Args:
        records: of the data set.
        codes: (N,) 0 for no part, 1 to 3 for :data:`PARTS`.
    """

    def __init__(self, records: Records, codes: NDArray[np.uint8]) -> None:
        self.records, self.codes = records, codes

    def __getitem__(self, key: str) -> str:
        row = self.records.row(key)
        if row < 0 or not self.codes[row]:
            raise KeyError(key)
        return PARTS[self.codes[row] - 1]

    def __len__(self) -> int:
        return int(np.count_nonzero(self.codes))

    def __iter__(self) -> Iterator[str]:
        return iter(Keys(self.records, np.flatnonzero(self.codes)))

    def values(self) -> ValuesView[str]:
        """The parts, in order."""
        return _Parts(self)

    def items(self) -> ItemsView[str, str]:
        """Pairs of key and part, in order."""
        return _Pairs(self)

    def parts(self) -> Iterator[str | None]:
        """The part of each record, None for none."""
        return ((None, *PARTS)[code] for code in self.codes.tolist())

    def keys_of(self, part: str) -> Keys:
        """The keys of one part."""
        return Keys(self.records, np.flatnonzero(self.codes == PARTS.index(part) + 1))

    def __repr__(self) -> str:
        return repr(dict(self)) if len(self) <= 100 else f"<parts of {len(self):,} records>"


class _Parts(ValuesView[str]):
    """Without looking up each key."""

    _mapping: Assignment

    def __iter__(self) -> Iterator[str]:
        return (part for part in self._mapping.parts() if part is not None)


class _Pairs(ItemsView[str, str]):
    """Without looking up each key."""

    _mapping: Assignment

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self._mapping, self._mapping.values())


def _equal(one: Sequence[Any], other: object) -> bool:
    if not isinstance(other, Sequence) or isinstance(other, str):
        return NotImplemented
    return len(one) == len(other) and all(a == b for a, b in zip(one, other))


def key_hash(key: str) -> np.uint64:
    """The hash by which a key is found: the first 8 bytes, little endian, that BLAKE2b makes of it."""
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
