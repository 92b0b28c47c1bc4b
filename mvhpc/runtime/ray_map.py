"""What actors on the nodes of a Ray cluster make of numbers, in the order in which it is done."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.runtime.ray_cluster import ray_session


def map_by_ray(actor: type, arguments: tuple[Any, ...], count: int, logs: Path, unit: str = "CPU") -> Iterator[Any]:
    """What actors make of numbers, in the order in which it is done.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine. There is one actor for each core or
    GPU of the cluster; Ray restarts those of a lost node.

    Args:
        actor: class whose instances make of a number something that JSON can hold.
        arguments: of the class.
        count: the numbers are 0 to ``count`` - 1.
        logs: folder for Ray's own logs where it fails.
        unit: ``CPU`` or ``GPU``, of an actor.

    Raises:
        OSError: that of an actor, as on a full disk.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's core writes advice to the terminal
    with ray_session(1, logs):
        import ray.data

        _quiet_ray_data()
        actors = max(1, min(count, int(ray.cluster_resources().get(unit, 0))))
        done = ray.data.from_items([{"index": index} for index in range(count)]).map_batches(
            _Calls,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_args=(actor, arguments),
            num_cpus=1,
            num_gpus=1 if unit == "GPU" else 0,
        )
        for row in done.iter_rows():
            result = json.loads(row["results"])
            if "error" in result:
                raise OSError(*result["error"])
            yield result["made"]


class _Calls:
    """Calls an actor with numbers that come as a column of Ray Data.

    Errors of a disk come back as data: of others Ray Data gives a text with all frames.
    """

    def __init__(self, actor: type, arguments: tuple[Any, ...]) -> None:
        self.actor = actor(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"results": [json.dumps(self._call(int(index))) for index in batch["index"]]}

    def _call(self, index: int) -> dict[str, Any]:
        try:
            return {"made": self.actor(index)}
        except OSError as error:
            return {"error": [error.errno, error.strerror or str(error), error.filename and str(error.filename)]}


def _quiet_ray_data() -> None:
    """Keep Ray Data's messages to its own log file, ``ray-data.log`` in the session's folder."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)
