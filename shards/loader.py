"""Reading a packed dataset, and the order in which training sees it."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, IntegrityError, nearest
from shards.index import PARTS, Index, Record, array_checksum
from shards.schema import Value
from shards.tar_shards import TarReader

T = TypeVar("T")


class Dataset:
    """Random access to a packed dataset of either format. Safe to share among threads and to pickle.

    Args:
        folder: where ``index.json`` lies.

    Raises:
        DataError: no packed dataset in the folder.
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
            split: which recorded split.

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
        """One volume, as stored, its checksum verified.

        Returns:
            Read-only array of the index's shape and dtype (volumes: float16 (H, W, D) in [0, 1], RAS).

        Raises:
            LookupError: no such record, or the volume is missing of it.
            IntegrityError: the stored bytes are not the ones written; names the member.
        """
        record = self.record(key)
        if variable not in record.checksums:
            raise LookupError(f"{self.folder}: {key} has no {variable}")
        array: NDArray[Any] = self._reader.read(record, variable)
        if array_checksum(array) != record.checksums[variable]:
            raise IntegrityError(f"{self.folder}: {key} {variable} is damaged (checksum); see `shards verify`")
        array.setflags(write=False)
        return array

    def damage(self, file: str) -> list[str]:
        """The damaged members of one file of the dataset."""
        return list(self._reader.damage(file))


def open_dataset(folder: str | Path) -> Dataset:
    """Open a packed dataset of either format; see :class:`Dataset`."""
    return Dataset(folder)


class Order:
    """The order in which samples are seen: a permutation per epoch, cut into global batches.

    A pure function of the step: any number of workers sees the same global batches, and a resumed run goes on where
    it was. A batch may reach from one epoch into the next: nothing is dropped, nothing repeated within an epoch.

    Args:
        n: samples.
        batch: samples per step over all workers together.
        seed: of the permutations.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if n < 1 or batch < 1:
            raise DataError(f"an order needs samples and a batch size of one or more, not {n} and {batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def __reduce__(self) -> tuple[type["Order"], tuple[int, int, int]]:
        return Order, (self.n, self.batch, self.seed)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each sample has been seen at least once."""
        return -(-self.n // self.batch)

    def indices(self, step: int) -> list[int]:
        """The global batch of a step: position p = step * batch + i is entry p mod n of permutation p // n."""
        start = step * self.batch
        return [int(self._epoch(p // self.n)[p % self.n]) for p in range(start, start + self.batch)]

    def part(self, step: int, rank: int, world: int) -> list[int]:
        """The contiguous share of a step's global batch that worker ``rank`` of ``world`` takes."""
        return self.indices(step)[self.batch * rank // world : self.batch * (rank + 1) // world]


def prefetch(load: Callable[[int], T], steps: Iterable[int], threads: int = 2, depth: int = 4) -> Iterator[T]:
    """Yield ``load(step)`` in the order of ``steps``, loaded ahead in threads.

    Args:
        load: called in threads; it keeps clear of what works with several threads itself, as torch's indexing does.
            Each caller gets an OpenMP team of its own, and with more threads than cores those of all teams sleep when
            they wait, those of a training step too, which then took 1.6 times as long on two cores.
        steps: may be endless.
        threads: that load.
        depth: results loaded ahead at most.

    Raises:
        Exception: what ``load`` raised, at its step's turn.
    """
    remaining = iter(steps)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    pending: deque[Future[T]] = deque()
    try:
        pending.extend(pool.submit(load, step) for step in itertools.islice(remaining, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(load, step) for step in itertools.islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
