"""Running tasks in processes, in the order in which they end."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from shards.environment import environment_variable
from shards.errors import DataError
from shards.processes import KILLED, process_pool

T = TypeVar("T")
R = TypeVar("R")
BLAS_THREADS = "OPENBLAS_NUM_THREADS"  # of NumPy; those of several processes would wait for one another
AHEAD = 2  # tasks per process that are begun or wait; bounds what is held in memory


def map_tasks(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """``function`` of each task, in the order in which they end.

    Args:
        function: picklable.
        tasks: picklable; taken as they are needed.
        workers: processes; 1: this one.

    Raises:
        DataError: a process was killed.
    """
    remaining = iter(tasks)
    first = list(islice(remaining, AHEAD * workers))
    workers = min(workers, len(first))
    if workers <= 1:
        yield from map(function, first)
        yield from map(function, remaining)
        return
    try:
        with environment_variable(BLAS_THREADS, "1"), process_pool(workers) as pool:
            pending: set[Future[R]] = {pool.submit(function, task) for task in first}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {pool.submit(function, task) for task in islice(remaining, len(done))}
                for future in done:
                    yield future.result()
    except BrokenProcessPool:
        raise DataError(f"{KILLED}; complete shards are reused") from None
