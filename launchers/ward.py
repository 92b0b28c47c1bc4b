"""A command whose whole offspring ends with it, or with whoever started it, even if that is killed.

A small process stands between: orphans among the command's descendants become its children, so it finds all of them;
when its standard input ends, its parent has told it to stop or is dead. SIGTERM and SIGUSR2, which SLURM sends to every
process of a job, do not reach the command through it: the supervisor of the node alone decides what they mean.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
GRACE_S = 5.0  # between SIGTERM and SIGKILL
STOP = b"stop\n"


class Ward:
    """A running command.

    Args:
        command: program and arguments.
        environment: all of its environment.
        log: file that its output is appended to; None: this process's own output.
        scratch: folder that is removed where this process is killed, having no more time to do it itself.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None, scratch: Path) -> None:
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launchers.ward", str(scratch), *command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The command's exit status, 128 + the signal where one killed it; None while it goes on."""
        return self._process.poll()

    def end(self) -> int:
        """End it and all its offspring, and return its exit status; where it is over already, only that."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError):
                stdin.write(STOP)
                stdin.close()
        return self._process.wait()


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace: float = GRACE_S) -> None:
    """End every descendant of this process: SIGTERM, then, after ``grace`` seconds, SIGKILL until none is left."""
    end = time.monotonic() + grace
    number = signal.SIGTERM
    told: set[int] = set()
    while True:
        _reap()
        # A zombie whose parent lives still is that one's to reap.
        left = [p for p in psutil.Process().children(recursive=True) if _running(p)]
        if not left:
            return
        for process in left:
            if process.pid not in told or number == signal.SIGKILL:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
                told.add(process.pid)
        if time.monotonic() > end:
            number = signal.SIGKILL
        time.sleep(0.05)


def _running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(scratch: str, command: Sequence[str]) -> int:
    """What the process between does; returns the command's exit status."""
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # not ignored, which the command would inherit
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which the command inherits
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    said = b""
    ended = False
    while not ended:
        if child.poll() is not None:
            break
        if select.select([0], [], [], 0.1)[0]:
            said = os.read(0, len(STOP))
            ended = True
    status = child.poll()
    if status is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        status = child.poll()
    if status is None:
        child.kill()
        status = child.wait()
    end_descendants()
    if ended and said != STOP:  # whoever started this was killed
        shutil.rmtree(scratch, ignore_errors=True)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
