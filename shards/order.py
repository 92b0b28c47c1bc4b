"""The order of training samples, and prefetching in that order."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from shards.errors import DataError
from shards.permutation import permuted, round_keys

T = TypeVar("T")


class Order:
    """The order of training samples: a permutation per epoch, divided into global batches.

    A pure function of the step: the global batches do not depend on the number of workers, and a resumed run continues
    with the same ones. A batch may extend from one epoch into the next: within an epoch each sample comes exactly once.
    Only the entries of the batch are computed, so that neither time nor memory depends on the number of samples.

    Args:
        n: number of samples.
        batch: samples per step, over all workers.
        seed: of the permutations.

    Raises:
        DataError: no sample, or a batch without one.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if n < 1 or batch < 1:
            raise DataError(f"{n} samples in batches of {batch}: at least one sample and a batch of one are needed")
        self.n, self.batch, self.seed = n, batch, seed
        self._keys = functools.lru_cache(maxsize=2)(functools.partial(round_keys, seed))

    def __reduce__(self) -> tuple[type["Order"], tuple[int, int, int]]:
        return Order, (self.n, self.batch, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each sample has come at least once."""
        return -(-self.n // self.batch)

    def indices(self, step: int) -> list[int]:
        """The global batch of a step: position p = step * batch + i is entry p mod n of permutation p // n."""
        return self._entries(step * self.batch, self.batch)

    def part(self, step: int, rank: int, world: int) -> list[int]:
        """The contiguous part of a step's global batch that belongs to worker ``rank`` of ``world``."""
        start, end = self.batch * rank // world, self.batch * (rank + 1) // world
        return self._entries(step * self.batch + start, end - start)

    def _entries(self, start: int, count: int) -> list[int]:
        """The entries of ``count`` positions from ``start``."""
        epoch, entry = divmod(start, self.n)
        epochs, entries = np.divmod(np.arange(entry, entry + count), self.n)
        keys = np.stack([self._keys(epoch + i) for i in range((entry + count) // self.n + 1)])
        return [int(i) for i in permuted(entries, self.n, keys[epochs].T)]


def prefetch(load: Callable[[int], T], steps: Iterable[int], threads: int = 2, depth: int = 4) -> Iterator[T]:
    """Yield ``load(step)`` in the order of ``steps``, loaded ahead in threads.

    Args:
        load: called in threads. It should not call multithreaded operations, such as torch's indexing: each calling
            thread gets its own OpenMP team, and with more threads than cores all teams wait asleep, that of the
            training step too, which took 1.6 times as long on two cores.
        steps: may be endless.
        threads: number of loading threads.
        depth: largest number of results loaded ahead.

    Raises:
        Exception: raised by ``load``; it is raised here when its step is due.
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
