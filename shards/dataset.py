"""Reading a packed data set."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shards.errors import DataError, IntegrityError, nearest
from shards.index import PARTS, Index, array_checksum
from shards.record_table import Assignment, Keys, Records
from shards.records import Record
from shards.schema import Value
from shards.tar_shards import TarReader
from shards.zarr_store import ZarrReader


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
        assert isinstance(self.index.records, Records)
        self._records = self.index.records
        reader = TarReader if self.index.storage == "webdataset" else ZarrReader
        self._reader: TarReader | ZarrReader = reader(self.folder, self.index)

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Path]]:
        return Dataset, (self.folder,)

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

    def read(self, key: str, variable: str) -> NDArray[Any]:
        """One volume as stored, its checksum verified.

        Returns:
            Read-only array of the index's shape and dtype (volumes: float16 (H, W, D) in [0, 1], RAS).

        Raises:
            LookupError: no such record, or a record without that volume.
            IntegrityError: the stored bytes differ from those written; names the record and the volume.
        """
        row = self._row(key)
        place = self._records.place(row, variable)
        if place is None:
            raise LookupError(f"{self.folder}: {key} has no {variable}")
        array = self._reader.read(key, variable, place)
        if not place.size and array_checksum(array) != self._records[row].checksums[variable]:
            raise IntegrityError(f"{self.folder}: {key} {variable} is damaged (checksum); see `shards verify`")
        array.setflags(write=False)
        return array

    def damaged_members(self, file: str) -> list[str]:
        """The damaged members of one file of the data set."""
        return list(self._reader.damaged_members(file))


def open_dataset(folder: str | Path) -> Dataset:
    """Open a packed data set of either format; see :class:`Dataset`."""
    return Dataset(folder)
