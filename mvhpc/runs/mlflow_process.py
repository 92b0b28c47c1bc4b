"""The process beside a stage that replays its journal into the MLflow store.

It costs the stage nothing where the store is slow, locked or gone. It ends when its standard input does: the stage
writes one line of JSON there, how it ended, or is gone.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from mvhpc.runs.mlflow_store import explain
from mvhpc.runs.mlflow_sync import catch_up, record_end, sync

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
        if last:
            killed = {"status": "KILLED", "outcome": {"error": "killed"}}
            record_end(folder, attempt, json.loads(lines[0]) if lines[0] else killed)
        start = time.monotonic()
        try:
            sync(folder)
            if not pause:
                catch_up(folder.parent, over.is_set)
        except Exception as error:
            logging.getLogger(__name__).exception("MLflow")
            if not warned:
                warn(folder, f"the store cannot be used now ({explain(error)})")
            warned = True
        pause = max(PERIOD_S, (time.monotonic() - start) / MAX_LOAD)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the stage, whose end ends this process
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)  # the store and its figures are their owner's
    run_folder = Path(sys.argv[1])
    logging.basicConfig(filename=run_folder / "log.txt", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    replay(run_folder, sys.argv[2])
