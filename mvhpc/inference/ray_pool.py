"""Predictions by several workers: Ray Data spreads batches of subjects over them.

Each worker holds a whole model and reads the shards itself; only keys go out and rows come back. A batch is cut
beforehand and answered as a whole, so every row is the one that a single process gives.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import Compute, ConfigError
from mvhpc.inference.predictions import Row
from mvhpc.inference.predictor import open_predictor
from mvhpc.runtime.devices import resolve_device
from mvhpc.runtime.ray_cluster import ray_session
from shards.cpus import available_cores


class Worker:
    """One worker of the pool: a predictor that takes and gives what Ray Data carries."""

    def __init__(self, question: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.predictor = open_predictor(**question)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """``keys``, each a JSON list, to ``rows``, each a JSON list of rows; JSON keeps every bit of a float."""
        return {"rows": [json.dumps(self.predictor(json.loads(keys))) for keys in batch["keys"]]}


def spread(question: dict[str, Any], batches: list[list[str]], compute: Compute, logs: Path) -> Iterator[list[Row]]:
    """Answer batches of subjects by ``compute.workers`` workers.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine for the time it takes.

    Args:
        question: arguments of :func:`~mvhpc.inference.predictor.open_predictor`.
        batches: keys.
        compute: workers, device, and threads per worker (0 divides this machine's cores among the workers).

        logs: folder that takes Ray's own logs where it fails.

    Yields:
        The rows of one batch, in whatever order batches are done.

    Raises:
        ConfigError: more workers than Ray has cores or GPUs for.
    """
    workers = min(compute.workers, len(batches))
    question = question | {name: str(Path(question[name]).absolute()) for name in ("model", "data")}
    unit = "GPU" if resolve_device(compute.device).type == "cuda" else "CPU"
    threads = compute.threads or max(1, available_cores() // workers)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of Ray's core, which else writes advice to the terminal
    with ray_session(1, logs):
        import ray.data

        _quiet()
        available = int(ray.cluster_resources().get(unit, 0))
        if workers > available:
            raise ConfigError(
                f"compute.workers={compute.workers}: Ray has {available} {unit}s; ask for that many or fewer"
            )
        answers = ray.data.from_items([{"keys": json.dumps(batch)} for batch in batches]).map_batches(
            Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(question, threads),
            num_cpus=1,
            num_gpus=1 if unit == "GPU" else 0,
        )
        for answer in answers.iter_rows():
            yield json.loads(answer["rows"])


def _quiet() -> None:
    """Leave Ray Data's notes to its own log file, ``ray-data.log`` in the session's folder."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)
