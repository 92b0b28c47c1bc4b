"""Records of tar shards that are read as streams by `webdataset`: selected by part, checked, and counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shards.dataset import Dataset
from shards.errors import DataError, IntegrityError
from shards.index import array_checksum
from shards.record_table import Keys, Records

Arrays = dict[str, NDArray[Any]]


class StreamedRecords:
    """A stage of a webdataset pipeline: members of tar files -> (key, arrays) of the wanted records, as stored.

    Args:
        dataset: whose index says which records there are; its shards are not touched.
        keys: of the wanted records, which have all ``variables``.
        variables: volumes to read.
    """

    def __init__(self, dataset: Dataset, keys: Keys, variables: Sequence[str]) -> None:
        self.dataset, self.variables = dataset, list(variables)
        self.wanted = np.zeros(len(dataset), bool)
        self.wanted[keys.rows] = True
        self.members = {f"{variable}.npy" for variable in variables}
        names = compress(keys.records.column("shard"), self.wanted)
        self.counts = Counter(PurePosixPath(name).name for name in names)

    def wants(self, name: str) -> bool:
        """Whether to read a member of a tar file; others are skipped unread."""
        key, _, kind = name.partition(".")
        if kind not in self.members:
            return False
        records = self.dataset.index.records
        assert isinstance(records, Records)
        row = records.row(key)
        return row >= 0 and bool(self.wanted[row])

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Arrays]]:
        """Decode webdataset's samples.

        Raises:
            IntegrityError: a damaged array, or a shard without all of its records.
            DataError: a shard that the data set does not have.
        """
        url = ""
        found: set[str] = set()
        for sample in source:
            key = sample["__key__"]
            if sample["__url__"] != url or key in found:  # the same shard may come twice in a row
                self._check_count(url, len(found))
                url, found = sample["__url__"], set()
            found.add(key)
            yield key, {variable: self._array(sample, key, variable) for variable in self.variables}
        self._check_count(url, len(found))

    def _array(self, sample: dict[str, Any], key: str, variable: str) -> NDArray[Any]:
        spec, record = self.dataset.index.arrays[variable], self.dataset.record(key)
        content = sample.get(f"{variable}.npy".lower(), b"")  # webdataset converts names to lower case
        dtype, count = np.dtype(spec["dtype"]), int(np.prod(spec["shape"]))
        if len(content) < dtype.itemsize * count:
            raise IntegrityError(f"{sample['__url__']}: {key} {variable} is missing or cut off")
        array = np.frombuffer(content, dtype, count, len(content) - dtype.itemsize * count).reshape(spec["shape"])
        crc = record.crcs.get(variable)  # data sets of version 1 have none
        if array_checksum(array) != record.checksums[variable] if crc is None else google_crc32c.value(array) != crc:
            raise IntegrityError(f"{sample['__url__']}: {key} {variable} is damaged (checksum)")
        return array

    def _check_count(self, url: str, found: int) -> None:
        """A stream that is cut off between two members ends without an error of its own."""
        if not url:
            return
        shard = url.rpartition("/")[2]
        if shard not in self.counts:
            raise DataError(
                f"{url}: no shard of {self.dataset.folder} that holds wanted records; shards keep their names"
            )
        if found != self.counts[shard]:
            raise IntegrityError(f"{url}: {found} of {self.counts[shard]} records; the file is cut off or damaged")
