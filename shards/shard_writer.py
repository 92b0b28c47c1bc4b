"""Writing one shard of a packed data set, by any process; its bytes are a function of its content."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, nearest
from shards.index import array_checksum
from shards.schema import Value
from shards.tar_shards import TarShard
from shards.zarr_store import ZarrShard

STORAGES = ("webdataset", "zarr")
SHARD_BYTES = 64 * 2**20  # large enough for sequential reads, small enough for many shards
SHARD_RECORDS = 1024  # bounds the table of chunks that a Zarr reader fetches with each access


@dataclass(frozen=True)
class Stored:
    """Where the volumes of one record are; see :class:`shards.records.Record`."""

    checksums: dict[str, str]
    crcs: dict[str, int]
    offsets: dict[str, int]
    sizes: dict[str, int]
    shard: str
    slot: int


def records_per_shard(arrays: Mapping[str, Mapping[str, Any]]) -> int:
    """How many records a shard holds, by the size of one record's arrays."""
    size = sum(int(np.prod(a["shape"])) * np.dtype(a["dtype"]).itemsize for a in arrays.values())
    return max(1, min(SHARD_RECORDS, SHARD_BYTES // max(size, 1)))


class ShardWriter:
    """Writes one shard, record by record: a tar file, or a file for each variable of a Zarr store.

    Args:
        folder: of the data set.
        storage: ``zarr`` or ``webdataset``.
        number: of the shard, from 0; a file of this number is replaced.
        arrays: volume variable -> {shape, dtype} of one record's array.
        per_shard: places in the shard.

    Raises:
        DataError: an unknown storage.
    """

    def __init__(
        self, folder: Path, storage: str, number: int, arrays: Mapping[str, Mapping[str, Any]], per_shard: int
    ) -> None:
        if storage not in STORAGES:
            raise DataError(nearest(storage, STORAGES, "format"))
        self.number, self.per_shard, self.arrays = number, per_shard, arrays
        self.used = 0  # places, also those that stay empty
        self._store = TarShard(folder, number) if storage == "webdataset" else ZarrShard(folder, number, per_shard)

    def add(
        self,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        affines: Mapping[str, Any],
    ) -> Stored:
        """Write one record to the next place.

        Args:
            key, subject, values, affines: see :class:`shards.records.Record`.
            arrays: volume variable -> array of the declared shape and dtype; variables left out are missing.

        Raises:
            DataError: an array whose name, shape or dtype was not declared, or a full shard.
        """
        if self.used >= self.per_shard:
            raise DataError(f"{key}: shard {self.number} is full ({self.per_shard} records)")
        for name, array in arrays.items():
            if name not in self.arrays:
                raise DataError(f"{key}: {nearest(name, self.arrays, 'volume')}")
            spec = self.arrays[name]
            if list(array.shape) != list(spec["shape"]) or array.dtype != np.dtype(spec["dtype"]):
                raise DataError(
                    f"{key} {name}: {array.dtype} {array.shape}, declared as {spec['dtype']} {tuple(spec['shape'])}"
                )
        ordered = {name: np.ascontiguousarray(arrays[name]) for name in self.arrays if name in arrays}
        found = self._store.add(self.used, key, subject, values, ordered, affines)
        self.used += 1
        return Stored(
            checksums={name: array_checksum(array) for name, array in ordered.items()},
            crcs={name: place[2] for name, place in found.items()},
            offsets={name: place[0] for name, place in found.items()},
            sizes={name: place[1] for name, place in found.items()},
            shard=self._store.path,
            slot=self.number * self.per_shard + self.used - 1,
        )

    def skip(self) -> None:
        """Leave the next place empty."""
        self.used += 1

    def close(self) -> dict[str, dict[str, Any]]:
        """End the shard and flush it to the disk.

        Returns:
            Path relative to the folder -> {bytes, sha256}; nothing for a shard of a Zarr store without any volume.
        """
        return self._store.close()

    def discard(self) -> None:
        """Remove what was written."""
        self._store.discard()
