"""The run folder of a stage: journal, figures, the record ``stage.json``, the lock, and the identity of inputs."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, fingerprint
from mvhpc.runs.journal import Journal
from shards.files import lock_file
from shards.index import Index

ANY_SPLIT = "auto"  # as the name of a split: of each model, its own


class Run:
    """What a stage writes beside its result.

    Attributes:
        folder: the run folder.
        journal: events, followed by the progress bar and MLflow.
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

    def keep(self, path: Path, folder: str) -> None:
        """Let MLflow have a file of the result.

        Args:
            path: of the file, anywhere.
            folder: that MLflow puts it into.
        """
        self.journal.write("artifact", step=0, path=os.path.relpath(path, self.folder), folder=folder)


def identity(path: str | Path, split: str = "default") -> str:
    """A digest of an input's content, independent of its name.

    Args:
        path: of packed data, a trained model, a BIDS tree or a file.
        split: of packed data, the recorded split that counts; the other ones do not. :data:`ANY_SPLIT`: all count.

    Raises:
        FileNotFoundError: naming the path, where nothing is there.
    """
    path = Path(path)
    if (path / "index.json").is_file():
        index = Index.load(path)
        if split == ANY_SPLIT:
            return fingerprint(
                index.digest, {name: dict(recorded.assignment.items()) for name, recorded in index.splits.items()}
            )
        recorded = index.splits.get(split)
        return fingerprint(index.digest, dict(recorded.assignment.items()) if recorded else {})
    for model in (path / "model" / "model.json", path / "model.json", path):
        if model.is_file():
            return hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
        table = path / "participants.tsv"
        return fingerprint(files, table.read_text() if table.is_file() else "")
    raise FileNotFoundError(f"{path}: no such file or folder")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``stage.json``; empty where no stage was started there."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 120.0) -> Iterator[None]:
    """Hold the lock of a run folder while the block lasts, so that one process at a time executes a stage in it.

    The lock ends with the process. On a file system without locks nothing is locked.

    Args:
        folder: a run folder.
        patience: seconds to wait for a holder on another host. A file server needs some time to notice that a node
            died; a holder on this host is certainly alive and is not waited for.

    Raises:
        ConfigError: another process is at work there.
    """
    path, host = folder / ".lock", f"host {socket.gethostname()}"
    with contextlib.ExitStack() as stack:
        waits = 0.0 if _holder(path).endswith(host) else patience
        try:
            descriptor = stack.enter_context(lock_file(path, waits, required=False))
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: {_holder(path)} is at work there; wait for its end, or stop it and run this again"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the stage itself reports that
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} of {host}".encode())
        yield


def _holder(lock: Path) -> str:
    """The process that holds a lock, or held it last, as it wrote itself into the file."""
    return (lock.read_text() if lock.is_file() else "") or "another process"
