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
GRACE_S = 1.0  # between SIGTERM and SIGKILL; what is written is written whole, so there is nothing to wait for
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
                [sys.executable, "-m", "launchers.process", str(scratch), *command],
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


def end_descendants(child: "subprocess.Popen[bytes] | None" = None, grace: float = GRACE_S) -> None:
    """End every descendant of this process: SIGTERM, then, after ``grace`` seconds, SIGKILL until none is left.

    Args:
        child: one of them, whose exit status is wanted.
        grace: seconds.
    """
    end = time.monotonic() + grace
    told: set[int] = set()
    while left := _descendants(child):
        late = time.monotonic() > end
        for process in left:
            if late or process.pid not in told:
                told.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.05)


def _descendants(child: "subprocess.Popen[bytes] | None") -> list[psutil.Process]:
    """Those that still run; adopted ones that have ended are let go, and of ``child`` the status is kept."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
            elif child is not None and process.pid == child.pid:
                child.poll()
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return running


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
    said, ended = b"", False
    while not ended and child.poll() is None:
        if select.select([0], [], [], 0.1)[0]:
            said = os.read(0, len(STOP))
            ended = True
    end_descendants(child)
    status = child.wait()
    if ended and said != STOP:  # whoever started this was killed
        shutil.rmtree(scratch, ignore_errors=True)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
