"""Preprocessing of subjects on all cores or GPUs of a Ray cluster."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvhpc.runtime.ray_map import map_by_ray
from shards.participant_rows import Row
from shards.preprocess.subject import Job, Outcome, Worker


class _Actor:
    """Preprocesses the subject with some number."""

    def __init__(self, job: Job, subjects: Sequence[list[Row]]) -> None:
        self.worker, self.subjects = Worker(job), subjects

    def __call__(self, index: int) -> list[dict[str, Any]]:
        return [dataclasses.asdict(outcome) for outcome in self.worker(self.subjects[index])]


def map_subjects_by_ray(job: Job, subjects: Sequence[list[Row]], *, logs: Path) -> Iterator[list[Outcome]]:
    """The outcomes of each subject, in the order in which they are done.

    There is one actor for each core of the cluster, or for each GPU if the job's device is ``cuda``. Paths of the
    source and of the results have to be the same on all nodes; see :func:`mvhpc.runtime.ray_map.map_by_ray`.

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
    for outcomes in map_by_ray(_Actor, (job, subjects), len(subjects), logs, unit):
        yield [Outcome(**outcome) for outcome in outcomes]
