"""The process beside a program that replays the journals of its stages, one after another, into their MLflow store.

It costs a stage nothing where the store is slow, locked or gone. The program writes two lines of JSON per stage to its
standard input: at the start the run folder, the attempt and the environment, and in the end how the stage ended. After
the last replay it answers with the databases that it holds open, path -> inode. It ends when its standard input does;
a stage whose end it was not told has been killed.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from mvhpc.runs.mlflow_store import explain, open_databases
from mvhpc.runs.mlflow_sync import catch_up, record_end, record_kill, sync

PERIOD_S = 3.0  # between two replays
MAX_LOAD = 0.05  # of one core and of the store


def warn(folder: Path, reason: str) -> None:
    """Print that the store lacks something."""
    print(f"MLflow: {reason}. The run goes on; {folder} keeps what is missing for the next start.", file=sys.stderr)


def replay(folder: Path, attempt: str) -> None:
    """Sync a run folder every few seconds until the stage has ended.

    Args:
        folder: the run folder.
        attempt: which start of the stage this process belongs to.
    """
    lines: list[str] = []
    over = threading.Event()

    def read_ending() -> None:
        lines.append(sys.stdin.readline())
        over.set()

    threading.Thread(target=read_ending, daemon=True).start()
    pause, last, warned = 0.0, False, False
    while not last:
        last = over.wait(pause)
        start = time.monotonic()
        try:
            if last and lines[0]:
                record_end(folder, attempt, json.loads(lines[0]))
            elif last:
                record_kill(folder, attempt)
            sync(folder)
            if not pause:
                catch_up(folder.parent, over.is_set)
        except Exception as error:
            logging.getLogger(__name__).exception("MLflow")
            if not warned:
                warn(folder, f"the store cannot be used now ({explain(error)})")
            warned = True
        pause = max(PERIOD_S, (time.monotonic() - start) / MAX_LOAD)


def inode(path: str) -> int:
    """The number of a file in its file system; 0 where there is none."""
    try:
        return Path(path).stat().st_ino
    except OSError:
        return 0


def serve() -> None:
    """Replay one stage after another, as the lines of standard input say."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # MLflow prints there
    for line in iter(sys.stdin.readline, ""):
        begun = json.loads(line)
        folder = Path(begun["folder"])
        os.environ.clear()
        os.environ.update(begun["environment"])
        logging.basicConfig(
            filename=folder / "log.txt", format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        replay(folder, begun["attempt"])
        with contextlib.suppress(OSError):  # the disk is full
            logging.basicConfig(handlers=[logging.NullHandler()], force=True)  # closes the file
        answer = json.dumps({path: inode(path) for path in open_databases()})
        with contextlib.suppress(BrokenPipeError):  # the program did not wait for it
            os.write(answers, f"{answer}\n".encode())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the stage, whose end ends this process
        signal.signal(number, signal.SIG_IGN)
    logging.raiseExceptions = False  # where the disk is full, the log is the least that is lost
    os.umask(0o077)  # the store and its figures are their owner's
    serve()
