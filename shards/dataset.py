"""Reading a packed data set."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shards.errors import DataError, IntegrityError, nearest
from shards.index import PARTS, Index, Record, array_checksum
from shards.schema import Value
from shards.tar_shards import TarReader


class Dataset:
    """Random access to a packed data set of either format. Thread-safe and picklable.

    Args:
        folder: the folder with ``index.json``.

    Raises:
        DataError: no packed data set in the folder.
        IntegrityError: a damaged index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        self._records = {r.key: r for r in self.index.records}
        self._reader = self._open()

    def _open(self) -> Any:
        if self.index.storage == "webdataset":
            return TarReader(self.folder, self.index)
        from shards.zarr_store import ZarrReader  # zarr takes a second to import

        return ZarrReader(self.folder, self.index)

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Path]]:
        return Dataset, (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def keys(self, part: str | None = None, split: str = "default") -> list[str]:
        """Keys in the order of the index.

        Args:
            part: ``train``, ``validation`` or ``test``; None or ``all`` for every key.
            split: name of a recorded split.

        Raises:
            DataError: an unknown part or split.
        """
        if part is None or part == "all":
            return list(self._records)
        if part not in PARTS:
            raise DataError(nearest(part, [*PARTS, "all"], "part"))
        assignment = self.index.split(split).assignment
        return [key for key in self._records if assignment.get(key) == part]

    def record(self, key: str) -> Record:
        """The record of a key.

        Raises:
            LookupError: no such key.
        """
        if key not in self._records:
            raise LookupError(f"{self.folder}: no record {key!r}")
        return self._records[key]

    def values(self, key: str) -> dict[str, Value]:
        """Scalar variable -> number, class, or None where missing."""
        return dict(self.record(key).values)

    def has(self, key: str, variable: str) -> bool:
        """Whether the record has that volume."""
        return variable in self.record(key).checksums

    def read(self, key: str, variable: str) -> NDArray[Any]:
        """One volume as stored, its checksum verified.

        Returns:
            Read-only array of the index's shape and dtype (volumes: float16 (H, W, D) in [0, 1], RAS).

        Raises:
            LookupError: no such record, or a record without that volume.
            IntegrityError: the stored bytes differ from those written; names the record and the volume.
        """
        record = self.record(key)
        if variable not in record.checksums:
            raise LookupError(f"{self.folder}: {key} has no {variable}")
        array: NDArray[Any] = self._reader.read(record, variable)
        if array_checksum(array) != record.checksums[variable]:
            raise IntegrityError(f"{self.folder}: {key} {variable} is damaged (checksum); see `shards verify`")
        array.setflags(write=False)
        return array

    def damaged_members(self, file: str) -> list[str]:
        """The damaged members of one file of the data set."""
        return list(self._reader.damaged_members(file))


def open_dataset(folder: str | Path) -> Dataset:
    """Open a packed data set of either format; see :class:`Dataset`."""
    return Dataset(folder)
