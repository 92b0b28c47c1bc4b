"""Measures all volumes of a data set, one record after another, by one or several processes."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards.audit.alignment import Affine, Aligner, Array, centred, pyramid
from shards.audit.measure import MIDDLE, Measured, Reference, correlation, encode, measure
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.processes import KILLED, process_pool
from shards.progress import progress

SAMPLE = 100  # brains, evenly spread over the records, from which the mean brain is made
KEPT = 0.75  # of them, the most alike
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
    """The mean brain of each variable that has any volume; see :func:`_mean_brain`."""
    references = {}
    for variable in variables:
        keys = [key for key in list(dataset.keys()) if dataset.has(key, variable)]
        if keys:
            references[variable] = _mean_brain(dataset, variable, keys[:: -(-len(keys) // SAMPLE)])
    return references


def _mean_brain(dataset: Dataset, variable: str, keys: Sequence[str]) -> Reference:
    """The mean of the brains that are most like their first, unaligned mean, so that faulty ones have no part in it."""
    spacing = float(dataset.index.grid["spacing"])

    def levels() -> Iterator[tuple[str, list[Array]]]:
        for key in keys:
            yield key, pyramid(dataset.read(key, variable), spacing)

    first = Aligner(centred(_sum(found for _, found in levels()), spacing), spacing)
    fits: dict[str, Affine] = {}
    likeness: dict[str, float] = {}
    for key, found in progress(levels(), f"mean {variable}", len(keys), "volume"):
        fits[key] = first.fit(found)
        likeness[key] = correlation(first.warp(found[MIDDLE], MIDDLE, fits[key]), first.mean[MIDDLE])
    best = sorted(keys, key=lambda key: -likeness[key])[: max(1, round(KEPT * len(keys)))]
    members = {key: fits[key] for key in keys if key in best}
    total = _sum(
        [first.warp(volume, level, members[key]) for level, volume in enumerate(found)]
        for key, found in levels()
        if key in members
    )
    return Reference(Aligner([volume / np.float32(len(members)) for volume in total], spacing), members, spacing)


def _sum(brains: Iterable[list[Array]]) -> list[Array]:
    """Of each level of the brains."""
    total: list[Array] = []
    for levels in brains:
        total = [a + b for a, b in zip(total, levels)] if total else levels
    return total


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
    keys = list(dataset.keys())
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
        raise DataError(KILLED) from None


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
