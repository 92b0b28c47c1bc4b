"""Converting the rows of a table to volumes, in parallel."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from shards.errors import DataError
from shards.participants import Reject, Row
from shards.preprocess.derivative import read_quality
from shards.processes import process_pool
from shards.volumes import Canonical, Space, brain_extent, canonical

T = TypeVar("T")
Extent = tuple[NDArray[Any], dict[str, float]]  # see shards.volumes.brain_extent


def convert(
    row: Row, spacing: float, shape: tuple[int, int, int], space: Space | None, dtype: str
) -> str | dict[str, Canonical]:
    """A row's canonical volumes by variable, or the reason for its rejection."""

    def one(path: Path) -> Canonical:
        volume = canonical(path, spacing, shape, space, dtype)
        return volume if space is None else _with_quality(volume, path)

    return _of_each(row, one)


def brain_extents(row: Row, spacing: float, space: Space | None) -> str | dict[str, Extent]:
    """The extents of a row's brains by variable, or the reason for its rejection."""
    return _of_each(row, lambda path: brain_extent(path, spacing, space))


def _of_each(row: Row, function: Callable[[Path], T]) -> str | dict[str, T]:
    """``function`` of each file of a row, or why it cannot be used."""
    found = {}
    for name, path in row.files.items():
        try:
            found[name] = function(path)
        except ValueError as error:
            return f"{name}: {error}"
        except OSError as error:
            return f"{name}: {error.strerror or 'file cannot be read'}"
        except MemoryError:
            return f"{name}: too large for this machine's memory"
    return found


def _with_quality(volume: Canonical, path: Path) -> Canonical:
    """A preprocessed volume with the figures and flags of its preprocessing, named ``preprocess.FIGURE``."""
    figures, flags = read_quality(path)
    before = {f"preprocess.{figure}": value for figure, value in figures.items()}
    return replace(volume, figures=volume.figures | before, flags=[f"preprocess.{flag}" for flag in flags])


def map_rows(
    function: Callable[[Row], str | dict[str, T]], rows: Sequence[Row | Reject], workers: int
) -> Iterator[tuple[Row | Reject, str | dict[str, T]]]:
    """Rows with ``function`` of each, or the reason for its rejection, in order.

    Args:
        function: picklable.
        rows: of the table.
        workers: processes; 1: this one.

    Raises:
        DataError: a process was killed.
    """
    if workers == 1:
        for row in rows:
            yield row, row.reason if isinstance(row, Reject) else function(row)
        return
    pending: deque[tuple[Row | Reject, Future[str | dict[str, T]] | str]] = deque()
    try:
        with process_pool(workers) as pool:
            for row in rows:
                pending.append((row, row.reason if isinstance(row, Reject) else pool.submit(function, row)))
                if len(pending) > 4 * workers:  # bounds the results held in memory
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most likely for lack of memory: use fewer workers; complete shards are reused"
        ) from None


def _result(row: Row | Reject, outcome: Future[str | dict[str, T]] | str) -> tuple[Row | Reject, str | dict[str, T]]:
    return row, outcome if isinstance(outcome, str) else outcome.result()
