"""The rows of all subjects of a query: by this process or by several workers, on disk as they come."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mvhpc.config import ConfigError
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.answers import answers, threads_of
from mvhpc.inference.groups import GroupedPredictor
from mvhpc.inference.prediction_tables import Row
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.ray_pool import pool_answers
from mvhpc.inference.row_store import RowStore
from mvhpc.runs.folder import Run
from mvhpc.runtime.devices import processor, resolve_device, resolve_precision
from shards.progress import Progress

ROWS = "rows"  # in the run folder, while the query is being answered
NAMED = 3  # failures in one message


def answer_everybody(
    config: PredictConfig,
    predictor: GroupedPredictor,
    keys: Sequence[str],
    query: str,
    description: Mapping[str, Any],
    run: Run,
) -> tuple[dict[str, Row], dict[str, str], float]:
    """The row of every subject; those of an interrupted run are taken over.

    Returns:
        key -> row, key -> reason of those that failed, whose cells are empty, and subjects per second.

    Raises:
        ConfigError: nobody could be answered.
    """
    device, workers = resolve_device(config.compute.device), config.compute.workers
    precision = f"{resolve_precision(config.compute.precision, device)}"
    bits = {"draws": config.draws, "group": predictor.group, "device": processor(device), "precision": precision}
    store = RowStore(run.folder / ROWS, {**description, **bits}, predictor.schema, config.want)
    todo = [key for key in keys if key not in store.rows]
    if len(todo) < len(keys):
        print(f"{query}: {len(keys) - len(todo)} of {len(keys)} are answered already", file=sys.stderr)
    threads = threads_of(device, config.compute.threads)
    stream = answers(predictor, todo, threads)
    if workers > 1 and todo:
        stream = pool_answers(config, todo, predictor.group, run.folder / "logs")
        workers = min(workers, len(todo))
        threads = threads_of(device, config.compute.threads, workers)
    failed: dict[str, str] = {}
    start, before = time.monotonic(), len(store.rows)
    interval = Interval(workers * threads)
    with Progress(query, len(keys), "subject", initial=len(keys) - len(todo)) as bar:
        for found in stream:
            failed |= found.failed
            interval.add(len(found.rows), found.busy)
            if store.add(found.rows):
                run.journal.write("metrics", step=len(store.rows), metrics=interval.metrics())
            bar.update(len(found.rows) + len(found.failed))
    store.flush()
    rate = (len(store.rows) - before) / max(time.monotonic() - start, 1e-9)
    if failed:
        few = "; ".join(f"{key}: {reason}" for key, reason in list(failed.items())[:NAMED])
        print(f"{query}: {len(failed)} of {len(keys)} failed: {few}", file=sys.stderr)
        if not store.rows:
            raise ConfigError(f"{query}: nobody could be answered; {few}")
    columns = next(iter(store.rows.values()))
    empty = {name: dict.fromkeys(cell, ()) if name == "draws" else None for name, cell in columns.items()}
    for key, reason in failed.items():
        store.rows[key] = {**empty, "key": key, "subject": subject_of(key), "flag": f"failed: {reason}"}
    return store.rows, failed, rate


class Interval:
    """Throughput and use of the devices since the last call of :meth:`metrics`; ``threads`` compute at a time."""

    def __init__(self, threads: int) -> None:
        self._threads, self._start, self._rows, self._busy = threads, time.monotonic(), 0, 0.0

    def add(self, rows: int, busy: float) -> None:
        """Count rows, and the seconds that a thread computed them."""
        self._rows, self._busy = self._rows + rows, self._busy + busy

    def metrics(self) -> dict[str, float]:
        """For the journal."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        found = {
            "system/samples_per_second": self._rows / seconds,
            "system/device_busy_percent": min(100.0, 100 * self._busy / seconds / self._threads),
        }
        self._start, self._rows, self._busy = now, 0, 0.0
        return found
