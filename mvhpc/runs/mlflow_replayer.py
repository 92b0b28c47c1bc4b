"""The process that replays journals into MLflow, as the program beside it sees it.

It stays for the next stage of the same program: importing MLflow takes four seconds of a core, more than a short stage.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from mvhpc.runs.mlflow_process import inode, warn

GRACE_S = 60.0  # how long a stage that has ended waits for the last replay
_idle: list["Replayer"] = []


class Replayer:
    """A process of :mod:`mvhpc.runs.mlflow_process`.

    Attributes:
        process: its process.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "mvhpc.runs.mlflow_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self._databases: dict[str, int] = {}  # that it holds open, and their inodes

    def begin(self, folder: Path, attempt: str) -> None:
        """Let it replay a run folder from now on.

        Args:
            folder: the run folder.
            attempt: which start of the stage this is.
        """
        self._write({"folder": str(folder.absolute()), "attempt": attempt, "environment": dict(os.environ)})

    def end(self, folder: Path, ending: dict[str, Any]) -> None:
        """Tell it how the stage ended, wait for its last replay, and keep it for the next stage.

        If it does not answer within :data:`GRACE_S`, it is killed.
        """
        self._write(ending)
        answers = self.process.stdout
        assert answers is not None
        if not select.select([answers], [], [], GRACE_S)[0]:
            warn(folder, f"no answer within {GRACE_S:.0f} s")
        elif line := answers.readline():
            self._databases = json.loads(line)
            _idle.append(self)
            return
        self.process.kill()
        self.close()

    def leave(self, ending: dict[str, Any]) -> None:
        """Tell it how the stage ended, and let it end by itself after its last replay, since somebody waits."""
        self._write(ending)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def usable(self) -> bool:
        """Whether it lives, and every database that it holds open is still there under its name."""
        return self.process.poll() is None and all(inode(path) == number for path, number in self._databases.items())

    def close(self) -> None:
        """End it, after what it is doing."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()

    def _write(self, content: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it is dead: `end` finds that out
            print(json.dumps(content), file=self.process.stdin, flush=True)


def replayer() -> Replayer:
    """A process that an earlier stage of this program is done with, or a new one."""
    while _idle:
        found = _idle.pop()
        if found.usable():
            return found
        found.close()
    return Replayer()


@atexit.register
def close_idle() -> None:
    """End the processes that no stage uses."""
    while _idle:
        _idle.pop().close()
