"""Runs a command so that all of its descendants end with it, or with its parent, even where the parent is killed.

A small intermediate process is the subreaper of the command: orphaned descendants become its children, so it finds all
of them. When its standard input closes, the parent wants it to stop, or has died. SIGTERM and SIGUSR2, which
SLURM sends to every process of a job, are not passed on to the command: the supervisor of the node handles them.
"""

import contextlib
import ctypes
import os
import select
import shlex
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
GRACE_S = 1.0  # between SIGTERM and SIGKILL; files are written atomically, so there is nothing to wait for
PYTHON = f"{shlex.quote(sys.executable)} -P"  # of a shell's line; -P: no module of the working folder shadows Python's
STOP = b"stop\n"


class ManagedProcess:
    """A running command.

    Args:
        command: program and arguments.
        environment: the complete environment of the command.
        log: file that its output is appended to; None: the output of this process.
        scratch: folder to remove where this process is killed and cannot remove it itself.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None, scratch: Path) -> None:
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launchers.process", str(scratch), *command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The command's exit status, 128 + the number of the signal that killed it; None while it runs."""
        return self._process.poll()

    def stop(self) -> int:
        """Stop the command and all of its descendants, and return its exit status."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError):
                stdin.write(STOP)
                stdin.close()
        return self._process.wait()


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stop_descendants(child: "subprocess.Popen[bytes] | None" = None, grace: float = GRACE_S) -> None:
    """Stop every descendant of this process: SIGTERM, then SIGKILL after ``grace`` seconds until none is left.

    Args:
        child: one of them, whose exit status is needed later.
        grace: seconds.
    """
    end = time.monotonic() + grace
    signalled: set[int] = set()
    while left := _descendants(child):
        late = time.monotonic() > end
        for process in left:
            if late or process.pid not in signalled:
                signalled.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.05)


def _descendants(child: "subprocess.Popen[bytes] | None") -> list[psutil.Process]:
    """Running descendants. Adopted ones that have ended are reaped; the status of ``child`` is kept."""
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
    """The intermediate process; returns the command's exit status."""
    become_subreaper()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # a handler: the command would inherit an ignored signal
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited by the command
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    request, closed = b"", False
    while not closed and child.poll() is None:
        if select.select([0], [], [], 0.1)[0]:
            request = os.read(0, len(STOP))
            closed = True
    stop_descendants(child)
    status = child.wait()
    if closed and request != STOP:  # the parent was killed
        shutil.rmtree(scratch, ignore_errors=True)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
