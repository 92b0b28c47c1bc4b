"""Rows of any subjects by one predictor, as they come; subjects that fail do not stop the others."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from mvhpc.config import ConfigError
from mvhpc.inference.groups import GroupedPredictor
from mvhpc.inference.prediction_tables import Row
from shards.cpus import available_cores
from shards.order import prefetch

AHEAD = 2  # groups that are read while the network computes


@dataclass(frozen=True)
class Answered:
    """Some subjects' rows.

    Attributes:
        rows: of the subjects that were answered.
        failed: key -> reason, of the others.
        busy: seconds that a thread computed.
    """

    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    busy: float = 0.0


def answers(predictor: GroupedPredictor, keys: Sequence[str], threads: int) -> Iterator[Answered]:
    """The rows of ``keys``, a group at a time and in order.

    Args:
        predictor: of the query.
        keys: of the subjects.
        threads: groups that are predicted at the same time; each by one thread, since with more of them the last bits
            of a row depend on their number.
    """
    groups = predictor.groups(keys)

    def read(number: int) -> Any:
        try:
            return predictor.read(groups[number])
        except Exception as error:
            return error

    def answer(part: Sequence[str], inputs: Any) -> Answered:
        start = time.perf_counter()
        found = _checked(_group(predictor, part, inputs), predictor.want)
        return Answered(found.rows, found.failed, time.perf_counter() - start)

    inputs = zip(groups, prefetch(read, range(len(groups)), threads=1, depth=AHEAD), strict=True)
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "answers", torch.set_num_threads, (1,))
    pending: deque[Future[Answered]] = deque()
    try:
        for part, values in inputs:
            pending.append(pool.submit(answer, part, values))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # of this thread, whose matrix products take the pool's otherwise


def threads_of(device: torch.device, chosen: int, workers: int = 1) -> int:
    """Groups that a worker predicts at the same time: on a GPU one, on CPUs as many as it has cores.

    Args:
        device: of the network.
        chosen: by the user; 0: the cores of this machine divided among the workers.
        workers: on this machine.
    """
    return 1 if device.type != "cpu" else chosen or max(1, available_cores() // workers)


def _group(predictor: GroupedPredictor, keys: Sequence[str], inputs: Any) -> Answered:
    """The rows of a group; where it fails, those of each of its subjects alone."""
    try:
        if isinstance(inputs, Exception):
            raise inputs
        return Answered(predictor.answer(keys, inputs))
    except ConfigError:  # of the query, not of a subject
        raise
    except Exception as error:
        if len(keys) == 1:
            return Answered([], {keys[0]: " ".join(f"{error}".split()) or type(error).__name__})
    each = [_group(predictor, [key], _read(predictor, key)) for key in keys]
    return Answered([row for one in each for row in one.rows], {k: r for one in each for k, r in one.failed.items()})


def _read(predictor: GroupedPredictor, key: str) -> Any:
    try:
        return predictor.read([key])
    except Exception as error:
        return error


def _checked(found: Answered, want: Sequence[str]) -> Answered:
    """Rows whose answer is not finite are failures."""
    bad = {
        row["key"]: f"the answer for {name} is not finite"
        for row in found.rows
        for name in want
        if isinstance(row[name], float) and not math.isfinite(row[name])
    }
    return Answered([row for row in found.rows if row["key"] not in bad], found.failed | bad)
