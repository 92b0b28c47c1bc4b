"""Records of tar shards that are read as streams by `webdataset`: selected by part, checked, and counted."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.dataset import Dataset
from shards.errors import DataError, IntegrityError
from shards.index import array_checksum

Arrays = dict[str, NDArray[Any]]


class StreamedRecords:
    """A stage of a webdataset pipeline: members of tar files -> (key, arrays) of the wanted records, as stored.

    Args:
        dataset: whose index says which records there are; its shards are not touched.
        keys: of the wanted records, which have all ``variables``.
        variables: volumes to read.
    """

    def __init__(self, dataset: Dataset, keys: Iterable[str], variables: Sequence[str]) -> None:
        self.dataset, self.variables = dataset, list(variables)
        self.keys = frozenset(keys)
        self.members = {f"{variable}.npy" for variable in variables}
        self.counts = Counter(dataset.record(key).shard for key in self.keys)

    def wants(self, name: str) -> bool:
        """Whether to read a member of a tar file; others are skipped unread."""
        key, _, kind = name.partition(".")
        return kind in self.members and key in self.keys

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Arrays]]:
        """Decode webdataset's samples.

        Raises:
            IntegrityError: a damaged array, or a shard without all of its records.
        """
        url, found = "", 0
        for sample in source:
            if sample["__url__"] != url:
                self._check_count(url, found)
                url, found = sample["__url__"], 0
            found += 1
            key = sample["__key__"]
            yield key, {variable: self._array(sample, key, variable) for variable in self.variables}
        self._check_count(url, found)

    def _array(self, sample: dict[str, Any], key: str, variable: str) -> NDArray[Any]:
        try:
            content = sample[f"{variable}.npy".lower()]  # webdataset converts names to lower case
            array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        except (KeyError, ValueError, EOFError) as error:
            raise IntegrityError(f"{sample['__url__']}: {key} {variable} cannot be read ({error!r})") from error
        if array_checksum(array) != self.dataset.record(key).checksums[variable]:
            raise IntegrityError(f"{sample['__url__']}: {key} {variable} is damaged (checksum)")
        return array

    def _check_count(self, url: str, found: int) -> None:
        """A stream that is cut off between two members ends without an error of its own."""
        if not url:
            return
        shard = next((name for name in self.counts if PurePosixPath(name).name == url.rpartition("/")[2]), None)
        if shard is None:
            raise DataError(f"{url}: not a shard of {self.dataset.folder}; shards keep their names")
        if found != self.counts[shard]:
            raise IntegrityError(f"{url}: {found} of {self.counts[shard]} records; the file is cut off or damaged")
