"""A pool of processes ends at Ctrl-C, whenever it comes."""

import multiprocessing.context
import os
import signal
import time

import psutil
import pytest

from shards.processes import process_pool


@pytest.mark.parametrize("number", [0, 1])
def test_ctrl_c_while_a_process_starts(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With work in the queue and no process to do it, Python's pool waits for ever."""
    start, before = multiprocessing.context.SpawnProcess.start, signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []

    def pressed(self: multiprocessing.context.SpawnProcess) -> None:
        if len(started) == number:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # here Python's handler raises
        start(self)
        started.append(self.pid)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", pressed)
    try:
        with pytest.raises(KeyboardInterrupt), process_pool(2) as pool:
            pool.submit(time.sleep, 600)
            pytest.fail("the pool is used")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 2 and not any(map(psutil.pid_exists, started))


def test_ctrl_c_drops_what_has_not_begun() -> None:
    with pytest.raises(KeyboardInterrupt), process_pool(1) as pool:
        work = [pool.submit(time.sleep, 0.1) for _ in range(10_000)]
        work[0].result()
        raise KeyboardInterrupt
    assert sum(future.cancelled() for future in work) > 9_000
