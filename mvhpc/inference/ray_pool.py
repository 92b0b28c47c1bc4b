"""Predictions by several workers, among which Ray Data distributes batches of subjects.

Each worker loads the model and reads the shards itself; keys are sent, rows come back. Batches are the same as in a
single process, and so are all rows.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import ConfigError
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.prediction_tables import Row
from mvhpc.inference.predictor import PredictConfig
from mvhpc.runtime.devices import resolve_device
from mvhpc.runtime.ray_cluster import quiet_ray_data, ray_session
from shards.cpus import available_cores


class Worker:
    """One worker of the pool: a predictor whose batches are columns of Ray Data."""

    def __init__(self, config: PredictConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.predictor = open_predictor(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """``keys``, each a JSON list, to ``rows``, each a JSON list of rows; JSON keeps every bit of a float."""
        return {"rows": [json.dumps(self.predictor(json.loads(keys))) for keys in batch["keys"]]}


def map_batches(config: PredictConfig, batches: list[list[str]], logs: Path) -> Iterator[list[Row]]:
    """Predict batches of subjects by ``config.compute.workers`` workers.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine for the time it takes.

    Args:
        config: of the stage; ``compute.threads`` 0 divides the cores of this machine among the workers.
        batches: keys.
        logs: folder for Ray's own logs where it fails.

    Yields:
        The rows of one batch, in the order in which batches are done.

    Raises:
        ConfigError: more workers than Ray has cores or GPUs for.
    """
    compute = config.compute
    workers = min(compute.workers, len(batches))
    config = replace(config, model=str(Path(config.model).absolute()), data=str(Path(config.data).absolute()))
    unit = "GPU" if resolve_device(compute.device).type == "cuda" else "CPU"
    threads = compute.threads or max(1, available_cores() // workers)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's core writes advice to the terminal
    with ray_session(1, logs):
        import ray.data

        quiet_ray_data()
        available = int(ray.cluster_resources().get(unit, 0))
        if workers > available:
            raise ConfigError(
                f"compute.workers={compute.workers}: Ray has {available} {unit}s; take that many or fewer"
            )
        predictions = ray.data.from_items([{"keys": json.dumps(batch)} for batch in batches]).map_batches(
            Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(config, threads),
            num_cpus=1,
            num_gpus=1 if unit == "GPU" else 0,
        )
        for row in predictions.iter_rows():
            yield json.loads(row["rows"])
