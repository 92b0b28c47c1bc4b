"""Processes of this machine that preprocess subjects."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from shards.participants import Row
from shards.preprocess.subject import Job, Outcome, Worker

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
    context = multiprocessing.get_context("spawn")  # fork is unsafe where the caller has threads
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,))
    try:
        pending = {pool.submit(_preprocess, subjects[index]): index for index in indices}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its processes
    _worker = Worker(job)


def _preprocess(rows: list[Row]) -> list[Outcome]:
    return _worker(rows)
