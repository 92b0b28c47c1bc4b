"""A pool of processes that Ctrl-C ends at any moment, and that end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from shards.environment import environment_variable

KILLED = "a worker process was killed, most likely for lack of memory: use fewer workers"  # of a BrokenProcessPool
SAFE_PATH = "PYTHONSAFEPATH"  # without it a signal.py in the working folder would be taken for Python's own


@contextlib.contextmanager
def process_pool(
    workers: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes, which leave Ctrl-C to this one. In the end, work that has not begun is dropped.

    After Ctrl-C, where one of them or this process was killed, or where nobody takes the results, the processes are
    ended at once: what they write must be atomic.

    Args:
        workers: number of processes.
        start: called with ``arguments`` in each process first.
    """
    context = multiprocessing.get_context("spawn")  # fork is unsafe where the caller has threads
    with environment_variable(SAFE_PATH, "1"):  # from the pool on: its locks start a process that tracks them
        pool = _Pool(workers, context, initializer=_start, initargs=(start, arguments))
        try:
            yield pool
        except (KeyboardInterrupt, GeneratorExit, BrokenProcessPool):
            pool.end()  # where a process was killed, also one that was started while the pool ended the others
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """A pool that is not interrupted while it takes work.

    An interrupt could leave a lock of its queue held, or work without a process to do it: in its end it would wait for
    ever.
    """

    def submit(self, *arguments: Any, **keywords: Any) -> "Future[Any]":
        with _interrupts_held():
            return super().submit(*arguments, **keywords)

    def end(self) -> None:
        """End the processes in the middle of their work; the pool then finds itself broken."""
        for process in list(self._processes.values()):
            process.terminate()


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed; Python's pool would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
