"""The order in which training sees samples, and loading them ahead in that order."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

T = TypeVar("T")


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
