"""Processes of this machine that preprocess subjects."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from shards.participant_rows import Row
from shards.preprocess.subject import Job, Outcome, Worker
from shards.processes import process_pool

KILLED = "its process was killed: most likely too large for this machine's memory"
_worker: Worker  # of this process


def map_processes(job: Job, subjects: Sequence[list[Row]], workers: int) -> Iterator[list[Outcome]]:
    """The outcomes of each subject, in the order in which they are done; in this process where ``workers`` is 1.

    If a process is killed, the subjects that were in work are tried again by half as many processes, and so on; one
    that is killed alone is rejected. The others go on in new processes.
    """
    return map(Worker(job), subjects) if workers == 1 else _in_processes(job, subjects, workers)


def _in_processes(job: Job, subjects: Sequence[list[Row]], workers: int) -> Iterator[list[Outcome]]:
    left = list(subjects)
    while left:
        try:
            for rows, outcomes in _map(job, tuple(left), workers):
                left.remove(rows)
                yield outcomes
        except BrokenProcessPool:
            suspects, left = left[:workers], left[workers:]  # work begins in this order
            if workers > 1:
                yield from _in_processes(job, suspects, workers // 2)
            else:
                yield [Outcome(row.key, KILLED) for row in suspects[0]]


def _map(job: Job, subjects: Sequence[list[Row]], workers: int) -> Iterator[tuple[list[Row], list[Outcome]]]:
    """Each subject with its outcomes; at most ``workers`` are begun and not done."""
    remaining = iter(subjects)
    with process_pool(workers, _start, job) as pool:
        pending: dict[Future[list[Outcome]], list[Row]] = {}
        while True:
            for rows in islice(remaining, workers - len(pending)):
                pending[pool.submit(_preprocess, rows)] = rows
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()


def _start(job: Job) -> None:
    global _worker
    _worker = Worker(job)


def _preprocess(rows: list[Row]) -> list[Outcome]:
    return _worker(rows)
