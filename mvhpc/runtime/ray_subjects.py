"""Preprocessing of subjects on all cores or GPUs of a Ray cluster."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvhpc.runtime.ray_cluster import quiet_ray_data, ray_session
from shards.participants import Row
from shards.preprocess.subject import Job, Outcome, Worker


class _Actor:
    """Preprocesses subjects, whose numbers come as a column of Ray Data."""

    def __init__(self, job: Job, subjects: Sequence[list[Row]]) -> None:
        self.worker, self.subjects = Worker(job), subjects

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        done = [self.worker(self.subjects[int(index)]) for index in batch["index"]]
        return {"outcomes": [json.dumps([dataclasses.asdict(o) for o in outcomes]) for outcomes in done]}


def map_subjects_by_ray(job: Job, subjects: Sequence[list[Row]], *, logs: Path) -> Iterator[list[Outcome]]:
    """The outcomes of each subject, in the order in which they are done.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine. There is one actor for each core of
    the cluster, or for each GPU if the job's device is ``cuda``; Ray restarts those of a lost node. Paths of the
    source and of the results have to be the same on all nodes.

    Args:
        job: settings of the preprocessing.
        subjects: the scans of each.
        logs: folder for Ray's own logs where it fails.
    """
    unit = "GPU" if job.device == "cuda" else "CPU"
    subjects = [
        [dataclasses.replace(row, files={name: path.absolute() for name, path in row.files.items()}) for row in rows]
        for rows in subjects
    ]
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's core writes advice to the terminal
    with ray_session(1, logs):
        import ray.data

        quiet_ray_data()
        actors = max(1, min(len(subjects), int(ray.cluster_resources().get(unit, 0))))
        done = ray.data.from_items([{"index": index} for index in range(len(subjects))]).map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_args=(job, subjects),
            num_cpus=1,
            num_gpus=1 if unit == "GPU" else 0,
        )
        for row in done.iter_rows():
            yield [Outcome(**outcome) for outcome in json.loads(row["outcomes"])]
