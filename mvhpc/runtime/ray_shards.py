"""Packing of shards on all cores of a Ray cluster."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvhpc.runtime.ray_map import map_by_ray
from shards.packing.make import Job, Shard, make_shard
from shards.packing.plan import Task


class _Actor:
    """Makes the shard of a task with some number."""

    def __init__(self, job: Job, tasks: Sequence[Task]) -> None:
        self.job, self.tasks = job, tasks

    def __call__(self, index: int) -> dict[str, Any]:
        return make_shard(self.tasks[index], self.job).to_dict()


def map_shards_by_ray(job: Job, tasks: Sequence[Task], *, logs: Path) -> Iterator[Shard]:
    """The shards of each task, in the order in which they are done.

    Paths of the source and of the data set have to be the same on all nodes; see
    :func:`mvhpc.runtime.ray_map.map_by_ray`.

    Args:
        job: what the shards have in common.
        tasks: the shards.
        logs: folder for Ray's own logs where it fails.
    """
    if not tasks:
        return
    job = dataclasses.replace(job, folder=job.folder.absolute(), partial=job.partial.absolute())
    tasks = [_absolute(task) for task in tasks]
    for shard in map_by_ray(_Actor, (job, tasks), len(tasks), logs):
        yield Shard.from_dict(shard)


def _absolute(task: Task) -> Task:
    """The task with absolute paths of its files."""
    items = []
    for item in task.items:
        files = {name: path.absolute() for name, path in item.row.files.items()}
        items.append(dataclasses.replace(item, row=dataclasses.replace(item.row, files=files)))
    return dataclasses.replace(task, items=tuple(items))
