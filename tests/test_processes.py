"""A pool of processes ends at Ctrl-C, whenever it comes, and with the process that started it."""

import gc
import multiprocessing.context
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

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
            pool.submit(int)
            pool.submit(time.sleep, 1)
            time.sleep(600)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == number + 1 and not any(map(psutil.pid_exists, started))


@pytest.mark.parametrize("name", ["signal", "socket", "numpy"])
def test_scripts_of_the_user_are_no_modules_of_python(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('a script of the user, no module of Python')")
    program = tmp_path / "bin" / "program"  # an installed one, whose path has the folder of the program
    program.parent.mkdir()
    program.write_text(
        "from shards.processes import process_pool\n"
        "if __name__ == '__main__':\n"
        "    with process_pool(1) as pool: print(pool.submit(int).result())\n"
    )
    command = [sys.executable, str(program)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


@pytest.mark.parametrize("milliseconds", range(0, 60, 5))
def test_ctrl_c_while_work_is_taken(milliseconds: int) -> None:
    """An interrupt that leaves a lock of the pool's queue held makes the pool's end wait for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # Python drops an exception raised in a destructor, here of what other tests left
    try:
        with pytest.raises(KeyboardInterrupt), process_pool(1) as pool:
            pool.submit(int).result()
            pressed = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGINT))
            pressed.start()
            while True:
                pool.submit(int)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
    pressed.join()


def test_ctrl_c_drops_what_has_not_begun() -> None:
    with pytest.raises(KeyboardInterrupt), process_pool(1) as pool:
        work = [pool.submit(time.sleep, 0.1) for _ in range(10_000)]
        work[0].result()
        raise KeyboardInterrupt
    dropped = [future for future in work if future.cancelled() or isinstance(future.exception(), BrokenProcessPool)]
    assert len(dropped) > 9_000


def test_ctrl_c_ends_work_that_has_begun() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), process_pool(2) as pool:
        for _ in range(2):
            pool.submit(int).result()
        pids = [*pool._processes]
        work = [pool.submit(time.sleep, 600) for _ in range(2)]
        while not all(future.running() for future in work):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60 and not any(map(psutil.pid_exists, pids))
    assert all(isinstance(future.exception(), BrokenProcessPool) for future in work)


def test_processes_end_with_the_one_that_started_them() -> None:
    """At work and waiting for work; Python's pool leaves them for ever."""
    program = (
        "import time\n"
        "from shards.processes import process_pool\n"
        "with process_pool(2) as pool:\n"
        "    work = [pool.submit(time.sleep, seconds) for seconds in (600, 1)]\n"
        "    work[1].result()\n"
        "    print(*pool._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root, text=True) as started:
        assert started.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in started.stdout.readline().split()]
        started.kill()
    assert len(processes) == 2 and psutil.wait_procs(processes, timeout=60)[1] == []
