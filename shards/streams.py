"""Records of tar shards that are read as streams by `webdataset`: selected by part, checked, and counted."""

import re
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

NAME = re.compile(r"shard-\d+\.tar")
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

    def count(self, opened: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A stage behind the one that opens shards; the next shard is opened when all records of one were taken.

        Raises:
            IntegrityError: a shard without all of its records, or without any.
            DataError: a shard that the data set does not have.
        """
        for source in opened:
            shard = _Shard(source["url"])
            yield {**source, "url": shard}
            self._check_count(shard)

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Arrays]]:
        """Decode webdataset's samples.

        Raises:
            IntegrityError: a damaged array.
        """
        for sample in source:
            key = sample["__key__"]
            sample["__url__"].found += 1
            yield key, {variable: self._array(sample, key, variable) for variable in self.variables}

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

    def _check_count(self, url: "_Shard") -> None:
        """A stream that is cut off between two members, or holds zeros, ends without an error of its own."""
        shard = shard_name(url)
        if url.found and shard not in self.counts:
            raise DataError(
                f"{url}: no shard of {self.dataset.folder} that holds wanted records; shards keep their names"
            )
        if url.found != self.counts[shard]:
            raise IntegrityError(f"{url}: {url.found} of {self.counts[shard]} records; the file is cut off or damaged")


def shard_name(url: str) -> str:
    """The name of the shard in a URL, with more behind it in ``pipe:aws s3 cp URL -`` and signed URLs do."""
    return (NAME.findall(url) or [""])[-1]


class _Shard(str):
    """The URL of an opened shard, with the number of its records so far."""

    found = 0
