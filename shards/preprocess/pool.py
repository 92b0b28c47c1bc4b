"""Processes of this machine that preprocess subjects."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool

from shards.participant_rows import Row
from shards.preprocess.subject import Job, Outcome, Worker
from shards.processes import process_pool

KILLED = "its process was killed: most likely too large for this machine's memory"
_worker: Worker  # of this process


def map_processes(job: Job, subjects: Sequence[list[Row]], workers: int) -> Iterator[list[Outcome]]:
    """The outcomes of each subject, in the order in which they are done; in this process where ``workers`` is 1.

    If a process is killed, the subjects that are not done yet go on in new ones; a subject whose own process is killed
    is rejected.
    """
    if workers == 1:
        yield from map(Worker(job), subjects)
        return
    left = list(range(len(subjects)))
    try:
        for index, outcomes in _map(job, subjects, left, workers):
            left.remove(index)
            yield outcomes
    except BrokenProcessPool:
        for index in list(left):
            try:
                for _, outcomes in _map(job, subjects, [index], 1):
                    yield outcomes
            except BrokenProcessPool:
                yield [Outcome(row.key, KILLED) for row in subjects[index]]


def _map(
    job: Job, subjects: Sequence[list[Row]], indices: Sequence[int], workers: int
) -> Iterator[tuple[int, list[Outcome]]]:
    with process_pool(workers, _start, job) as pool:
        pending = {pool.submit(_preprocess, subjects[index]): index for index in indices}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()


def _start(job: Job) -> None:
    global _worker
    _worker = Worker(job)


def _preprocess(rows: list[Row]) -> list[Outcome]:
    return _worker(rows)
