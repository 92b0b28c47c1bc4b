"""Zarr v3 arrays, one per volume variable: (records, *shape), a chunk per record, sharded, Zstandard-compressed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from shards.errors import IntegrityError
from shards.index import Index, Record, array_checksum
from shards.schema import Value

FOLDER = "data.zarr"
LEVEL = 3  # Zstandard's default


class ZarrWriter:
    """Buffers records and writes them as whole Zarr shards.

    Args:
        folder: the data set's folder.
        arrays: variable -> {shape, dtype}.
        row: number of records in the complete shards; rows after these are dropped.
        per_shard: records per shard.
    """

    name = ""  # a record of a Zarr store needs no file name

    def __init__(self, folder: Path, arrays: Mapping[str, Mapping[str, Any]], row: int, per_shard: int) -> None:
        self.row = row
        self.pending: list[dict[str, NDArray[Any]]] = []
        group = zarr.open_group(folder / FOLDER, mode="a", zarr_format=3)
        self.arrays: dict[str, zarr.Array[Any]] = {}
        for variable, spec in arrays.items():
            shape = tuple(spec["shape"])
            if variable not in group:
                group.create_array(
                    variable,
                    shape=(0, *shape),
                    dtype=spec["dtype"],
                    chunks=(1, *shape),
                    shards=(per_shard, *shape),
                    compressors=ZstdCodec(level=LEVEL, checksum=True),
                    fill_value=0,
                )
            array = group[variable]
            assert isinstance(array, zarr.Array)
            array.resize((row, *shape))
            self.arrays[variable] = array

    def add(
        self,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        affines: Mapping[str, Any],
    ) -> dict[str, int]:
        """Buffer one record, of which the index holds all but the arrays; returns variable -> its row."""
        self.pending.append(dict(arrays))
        return dict.fromkeys(arrays, self.row + len(self.pending) - 1)

    def flush(self) -> None:
        """Write the records added since the last flush."""
        if not self.pending:
            return
        end = self.row + len(self.pending)
        for variable, array in self.arrays.items():
            missing = np.zeros(array.shape[1:], array.dtype)
            array.resize((end, *array.shape[1:]))
            array[self.row : end] = np.stack([p.get(variable, missing) for p in self.pending])
        self.row, self.pending = end, []


class ZarrReader:
    """Reads single arrays of a Zarr store."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def read(self, record: Record, variable: str) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), unchecked.

        Raises:
            IntegrityError: metadata or chunk cannot be read or decoded.
        """
        try:
            if variable not in self._arrays:
                self._arrays[variable] = zarr.open_array(self.folder / FOLDER / variable, mode="r", zarr_format=3)
            return np.asarray(self._arrays[variable][record.offsets[variable]])
        except Exception as error:  # codecs raise many types on damaged bytes
            raise IntegrityError(
                f"{FOLDER}/{variable}: {record.key} cannot be read ({type(error).__name__})"
            ) from error

    def damaged_members(self, file: str) -> Iterator[str]:
        """The records whose arrays in a chunk file are damaged; none for metadata."""
        variable, _, chunk = file.removeprefix(f"{FOLDER}/").partition("/c/")
        if not chunk:
            return
        try:
            per_shard = zarr.open_array(self.folder / FOLDER / variable, mode="r", zarr_format=3).shards
        except Exception:  # its metadata are damaged too, and reported as a file of their own
            return
        assert per_shard is not None
        shard = int(chunk.split("/")[0])
        for record in self.index.records:
            if variable in record.offsets and record.offsets[variable] // per_shard[0] == shard:
                try:
                    intact = array_checksum(self.read(record, variable)) == record.checksums[variable]
                except IntegrityError:
                    intact = False
                if not intact:
                    yield f"{record.key} {variable}"
