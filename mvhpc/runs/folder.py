"""What a run folder is: its journal and figures, its record ``stage.json``, its lock, and the identity of inputs."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, fingerprint
from mvhpc.runs.journal import Journal
from shards.index import Index


class Run:
    """What a stage writes to beside its result.

    Attributes:
        folder: the run folder.
        journal: metrics and figures in the order they came; the tracker and the progress bar follow it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder)

    @contextlib.contextmanager
    def figure(self, name: str, step: int = 0) -> Iterator[Path]:
        """The path of ``figures/NAME`` to write a picture to; journalled once it is written."""
        path = self.folder / "figures" / name
        path.parent.mkdir(exist_ok=True)
        yield path
        self.journal.write("artifact", step=step, path=str(path.relative_to(self.folder)))


def identity(path: str | Path, split: str = "default") -> str:
    """What the content of an input is, whatever it is called: shards, a trained model, a BIDS tree or a file.

    Args:
        path: of the input.
        split: of packed data, the only recorded split that counts.

    Raises:
        FileNotFoundError: naming the path, where there is nothing.
    """
    path = Path(path)
    if (path / "index.json").is_file():
        index = Index.load(path)
        recorded = index.splits.get(split)
        return fingerprint(index.digest, recorded.assignment if recorded else {})
    for model in (path / "model" / "model.json", path / "model.json", path):
        if model.is_file():
            return hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
        table = path / "participants.tsv"
        return fingerprint(files, table.read_text() if table.is_file() else "")
    raise FileNotFoundError(f"{path}: no such file or folder")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``stage.json``; empty where no stage was ever started there."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 120.0) -> Iterator[None]:
    """Nobody else executes a stage in ``folder`` meanwhile.

    By a lock of the file system, which ends with this process however that ends; where there are no such locks, not at
    all.

    Args:
        folder: a run folder.
        patience: seconds until a server of files has noticed that a node died which held the lock.

    Raises:
        ConfigError: another process is at work there.
    """
    host = f"host {socket.gethostname()}"
    with (folder / ".lock").open("a+") as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read() or "another process"
                if holder.endswith(host) or time.monotonic() > end:
                    raise ConfigError(
                        f"{folder}: {holder} is at work there; wait for its end, or stop it and run this again"
                    ) from error
                time.sleep(1)
            except OSError:  # no such locks here
                break
        with contextlib.suppress(OSError):  # a full disc is the stage's own affair
            file.truncate(0)
            file.write(f"process {os.getpid()} of {host}")
            file.flush()
        yield
