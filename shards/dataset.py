"""Reading a packed data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.cache import Cache, CachedFiles
from shards.errors import DataError, IntegrityError, nearest
from shards.index import PARTS, Index, array_checksum
from shards.quantization import dequantize
from shards.record_table import Assignment, Keys, Place, Records
from shards.records import Record
from shards.schema import Value
from shards.stored_files import StoredFiles
from shards.tar_shards import TarReader
from shards.zarr_store import ZarrReader


class Dataset:
    """Random access to a packed data set of either format. Thread-safe and picklable.

    Args:
        folder: the folder with ``index.json``.
        cache: on a local disk, for a folder on a slow one; by default that of the environment, see
            :mod:`shards.cache`.

    Raises:
        DataError: no packed data set in the folder, or a cache that the environment does not name whole.
        IntegrityError: a damaged index.
    """

    def __init__(self, folder: str | Path, cache: Cache | None = None) -> None:
        self.folder, self._given_cache = Path(folder), cache
        self._cache = cache or Cache.from_environment()
        self.index = Index.load(self.folder)
        assert isinstance(self.index.records, Records)
        self._records = self.index.records
        files = CachedFiles(self.folder, self._cache, self.index.digest) if self._cache else StoredFiles(self.folder)
        reader = TarReader if self.index.storage == "webdataset" else ZarrReader
        self._reader: TarReader | ZarrReader = reader(self.folder, self.index, files)

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Path, Cache | None]]:
        return Dataset, (self.folder, self._given_cache)

    def __len__(self) -> int:
        return len(self._records)

    def keys(self, part: str | None = None, split: str = "default") -> Keys:
        """Keys in the order of the index.

        Args:
            part: ``train``, ``validation`` or ``test``; None or ``all`` for every key.
            split: name of a recorded split.

        Returns:
            A sequence that reads the keys when they are used, equal to a list of the same keys.

        Raises:
            DataError: an unknown part or split.
        """
        if part is None or part == "all":
            return self._records.all_keys
        if part not in PARTS:
            raise DataError(nearest(part, [*PARTS, "all"], "part"))
        assignment = self.index.split(split).assignment
        assert isinstance(assignment, Assignment)
        return assignment.keys_of(part)

    def record(self, key: str) -> Record:
        """The record of a key.

        Raises:
            LookupError: no such key.
        """
        return self._records[self._row(key)]

    def _row(self, key: str) -> int:
        row = self._records.row(key)
        if row < 0:
            raise LookupError(f"{self.folder}: no record {key!r}")
        return row

    def values(self, key: str) -> dict[str, Value]:
        """Scalar variable -> number, class, or None where missing."""
        return self._records.values(self._row(key))

    def has(self, key: str, variable: str) -> bool:
        """Whether the record has that volume."""
        return self._records.place(self._row(key), variable) is not None

    def read(self, key: str, variable: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One volume, its checksum verified.

        Args:
            key, variable: of the volume.
            out: array to fill, such as a part of a batch: C-contiguous, of the shape and type that is returned. What it
                holds after an error is undefined.

        Returns:
            ``out``, or a read-only array of the index's shape. Volumes: float16 (H, W, D) in [0, 1], RAS. Tissue maps,
            ``VOLUME_GM`` and others: uint8, 255 times the probability.

        Raises:
            LookupError: no such record, or a record without that volume.
            IntegrityError: the stored bytes differ from those written; names the record and the volume.
            ValueError: an ``out`` that does not fit.
        """
        if self.index.arrays.get(variable, {}).get("scale") is None:
            return self.read_stored(key, variable, out)
        return self._decode(self.read_stored(key, variable), variable, out)

    def read_stored(self, key: str, variable: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As :meth:`read`, in the index's dtype; stored integers with a ``scale`` are to be multiplied by it."""
        place, spec = self._place(key, variable), self.index.arrays[variable]
        if out is not None:
            _check_fit(out, spec["shape"], spec["dtype"])
        array = self._reader.read(key, variable, place, out)
        if not place.size:
            self._compare(key, variable, array)
        if out is None:
            array.setflags(write=False)
        elif array is not out:  # of version 1
            out[...] = array
            return out
        return array

    def read_box(self, key: str, variable: str, start: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """A part of a volume, as of :meth:`read`.

        A Zarr store reads and checks the chunks that the part touches: some planes of the first axis each. Tar files
        have one checksum for a volume, which is read whole; so are the volumes of a cache.

        Args:
            key, variable: of the volume.
            start: (3,), its first voxel.
            shape: (3,), voxels.

        Raises:
            ValueError: a part that is not inside the volume.
            LookupError, IntegrityError: as :meth:`read`.
        """
        place, whole = self._place(key, variable), self.index.arrays[variable]["shape"]
        if not len(start) == len(shape) == len(whole) or any(
            not 0 <= a < a + n <= size for a, n, size in zip(start, shape, whole)
        ):
            raise ValueError(
                f"{key} {variable}: no box of {list(shape)} voxels at {list(start)} in {list(whole)} voxels"
            )
        found = None
        if isinstance(self._reader, ZarrReader) and not self._cache:
            found = self._reader.read_box(key, variable, place, start, shape)
        if found is None:
            box = tuple(slice(a, a + n) for a, n in zip(start, shape))
            found = np.ascontiguousarray(self.read_stored(key, variable)[box])
        return self._decode(found, variable)

    def _place(self, key: str, variable: str) -> Place:
        place = self._records.place(self._row(key), variable)
        if place is None:
            raise LookupError(f"{self.folder}: {key} has no {variable}")
        return place

    def _decode(self, stored: NDArray[Any], variable: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """What stored numbers stand for."""
        scale = self.index.arrays[variable].get("scale")
        if out is not None:
            _check_fit(out, stored.shape, np.float16)
        found = stored if scale is None else dequantize(stored, scale, out)
        if out is None:
            found.setflags(write=False)
        return found

    def _compare(self, key: str, variable: str, array: NDArray[Any]) -> None:
        if array_checksum(array) != self.record(key).checksums[variable]:
            raise IntegrityError(f"{self.folder}: {key} {variable} is damaged (checksum); see `shards verify`")

    def locate(self, key: str, variable: str) -> Place:
        """Where a volume of a data set of version 1 is stored, with the size and CRC-32C that its index lacks.

        The volume is read and compared with its SHA-256.

        Raises:
            LookupError, IntegrityError: as :meth:`read`.
        """
        array, place = self._reader.locate(key, variable, self._place(key, variable))
        self._compare(key, variable, array)
        return place


def _check_fit(out: NDArray[Any], shape: Sequence[int], dtype: Any) -> None:
    if out.shape != tuple(shape) or out.dtype != np.dtype(dtype) or not out.flags.c_contiguous:
        raise ValueError(f"out: {out.dtype} {out.shape}, expected contiguous {np.dtype(dtype)} {tuple(shape)}")


def open_dataset(folder: str | Path, cache: Cache | None = None) -> Dataset:
    """Open a packed data set of either format; see :class:`Dataset`."""
    return Dataset(folder, cache)
