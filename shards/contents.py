"""Which volumes each file of a packed data set holds, and where."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import tar_shards, zarr_store
from shards.index import Index
from shards.pieces import Piece
from shards.record_table import Records


@dataclass(frozen=True)
class FileContent:
    """The volumes in one file, ordered by offset; each array has one entry for each.

    Attributes:
        number: of the shard.
        variable: of a file of a Zarr store; empty for a tar file, which has all.
        rows: of the records.
        offsets, sizes, crcs: of the stored bytes.
    """

    number: int
    variable: str
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crcs: NDArray[np.int64]


class Contents:
    """The volumes in each shard file. Without an entry for data sets of version 1, whose index has no sizes.

    Args:
        index: as read from its folder.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        assert isinstance(index.records, Records)
        self.records = index.records
        self.files = dict(self._files()) if index.per_shard else {}

    def _files(self) -> Iterator[tuple[str, FileContent]]:
        slots, tar = self._column("slot"), self.index.storage == "webdataset"
        stored: list[tuple[NDArray[np.int64], ...]] = []  # rows, offsets, sizes, CRCs of each variable
        for variable in self.arrays:
            numbers = [self._column(f"{what}.{variable}") for what in ("offset", "size", "crc32c")]
            rows = np.flatnonzero(numbers[1])
            stored.append((rows, *(column[rows] for column in numbers)))
        if tar:
            stored = [tuple(map(np.concatenate, zip(*stored)))]
        for variable, columns in zip([""] if tar else self.arrays, stored):
            for content in self._by_number(variable, slots, *columns):
                axes = 0 if tar else len(self.arrays[variable]["shape"])
                number = content.number
                yield tar_shards.shard_path(number) if tar else zarr_store.shard_path(variable, number, axes), content

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Volume variable -> {shape, dtype}."""
        return self.index.arrays

    def _column(self, name: str) -> NDArray[Any]:
        batches = [self.records.file.batch(i) for i in range(len(self.records.file))]
        found: NDArray[Any] = np.concatenate([batch.column(name).to_numpy() for batch in batches])
        return found

    def _by_number(
        self,
        variable: str,
        slots: NDArray[np.int64],
        rows: NDArray[np.int64],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        crcs: NDArray[np.int64],
    ) -> Iterator[FileContent]:
        numbers = slots[rows] // self.index.per_shard
        order = np.lexsort((offsets, numbers))
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(order)]):
            own = order[start:end]
            yield FileContent(int(numbers[own[0]]), variable, rows[own], offsets[own], sizes[own], crcs[own])

    def layout(self, file: str, size: int) -> list[Piece]:
        """The pieces of a shard file of ``size`` bytes; nothing for any other file."""
        content = self.files.get(file)
        if content is not None:
            records = [self.records[int(row)] for row in np.unique(content.rows)]
        elif file.startswith(f"{tar_shards.FOLDER}/"):  # of version 1
            records = [record for record in self.records if record.shard == file]
        else:
            return []
        records.sort(key=lambda record: record.slot)
        if content is None or not content.variable:
            return list(tar_shards.layout(records, self.arrays))
        return list(zarr_store.layout(records, content.variable, size))
