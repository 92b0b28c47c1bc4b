"""Measures all volumes of a data set, one record after another, by one or several processes."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.audit.alignment import Affine, Aligner, Array, pyramid
from shards.audit.measure import Measured, Reference, encode, measure
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.processes import process_pool
from shards.progress import progress

SAMPLE = 100  # brains of which the mean brain is the mean
BATCH = 8  # records of one job of a process
NO_PICTURE = np.zeros((0, 0), np.uint8)


@dataclass(frozen=True)
class Look:
    """What is kept of one record.

    Attributes:
        key: of the record.
        volumes: variable -> what is kept of its volume, but the picture; missing ones are left out.
        picture: of all its volumes, one below another, WebP; empty without any.
    """

    key: str
    volumes: dict[str, Measured]
    picture: bytes


def mean_brains(dataset: Dataset, variables: Sequence[str]) -> dict[str, Reference]:
    """The mean brain of each variable that has any volume.

    It is the mean of up to :data:`SAMPLE` brains, evenly spread over the records and aligned to their first mean.
    """
    spacing = float(dataset.index.grid["spacing"])
    references = {}
    for variable in variables:
        keys = [key for key in dataset.keys() if dataset.has(key, variable)]
        keys = keys[:: -(-len(keys) // SAMPLE)] if keys else []
        if not keys:
            continue
        first = Aligner(_mean(dataset, variable, keys, spacing), spacing)
        found: dict[str, Affine] = {}
        total: list[Array] = []
        for key in progress(keys, f"mean {variable}", unit="volume"):
            levels = pyramid(dataset.read(key, variable), spacing)
            found[key] = first.fit(levels)
            warped = [first.warp(volume, level, found[key]) for level, volume in enumerate(levels)]
            total = [a + b for a, b in zip(total, warped)] if total else warped
        references[variable] = Reference(Aligner([s / len(keys) for s in total], spacing), found, spacing)
    return references


def _mean(dataset: Dataset, variable: str, keys: Sequence[str], spacing: float) -> list[Array]:
    total: NDArray[np.float32] = sum(dataset.read(key, variable).astype(np.float32) for key in keys)
    return pyramid(total / len(keys), spacing)


def look(folder: Path, references: Mapping[str, Reference], height: int, workers: int) -> Iterator[Look]:
    """Measure every record of a data set, in order; the result does not depend on ``workers``.

    Args:
        folder: of the data set.
        references: of its volume variables.
        height: of the picture of a volume, pixels.
        workers: processes; 1: this one.

    Raises:
        IntegrityError: a damaged volume; names it.
        DataError: a process was killed.
    """
    dataset = open_dataset(folder)
    keys = dataset.keys()
    if workers == 1:
        for key in progress(keys, "audit", unit="record"):
            yield _look(dataset, key, references, height)
        return
    yield from progress(_by_processes(folder, keys, references, height, workers), "audit", len(keys), "record")


def _by_processes(
    folder: Path, keys: Sequence[str], references: Mapping[str, Reference], height: int, workers: int
) -> Iterator[Look]:
    pending: deque[Future[list[Look]]] = deque()
    try:
        with process_pool(workers, _start, folder, references, height) as pool:
            for first in range(0, len(keys), BATCH):
                pending.append(pool.submit(_look_at_all, keys[first : first + BATCH]))
                if len(pending) > 2 * workers:  # bounds the results held in memory
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, most likely for lack of memory: use fewer workers") from None


_state: tuple[Dataset, Mapping[str, Reference], int]  # of a worker process


def _start(folder: Path, references: Mapping[str, Reference], height: int) -> None:
    global _state
    _state = open_dataset(folder), references, height


def _look_at_all(keys: Sequence[str]) -> list[Look]:
    dataset, references, height = _state
    return [_look(dataset, key, references, height) for key in keys]


def _look(dataset: Dataset, key: str, references: Mapping[str, Reference], height: int) -> Look:
    volumes = {
        variable: measure(dataset.read(key, variable).astype(np.float32), key, reference, height)
        for variable, reference in references.items()
        if dataset.has(key, variable)
    }
    picture = encode([v.picture for v in volumes.values()]) if volumes else b""
    return Look(key, {name: replace(v, picture=NO_PICTURE) for name, v in volumes.items()}, picture)
