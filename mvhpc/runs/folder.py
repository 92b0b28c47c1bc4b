"""The run folder of a stage: journal, figures, the record ``stage.json``, the lock, and the identity of inputs."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, fingerprint
from mvhpc.runs.journal import Journal
from shards.errors import DataError
from shards.files import lock_file
from shards.index import Index
from shards.sheets import read_sheet

ANY_SPLIT = "auto"  # as the name of a split: of each model, its own
PAIR = (".hdr", ".img")  # two files of one volume
COMPRESSED, PLAIN = (".gz", ".mgz"), (".nii", ".mgh", *PAIR)  # files of volumes
TABLES = (".csv", ".tsv")


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


def identity(path: str | Path, split: str = "default", files_root: str = "") -> str:
    """A digest of an input's content, independent of its name.

    Packed data count by the checksums in their index, a model by those in its ``model.json``, any other file by its
    bytes. Of a BIDS tree, and of the volumes that a CSV or TSV names, not every byte is read: they count by the names
    and sizes of files, the tables of people and sessions, and the state of each volume (:func:`_state`).

    Args:
        path: of packed data, a trained model, a BIDS tree or a file.
        split: of packed data, the recorded split that counts; the other ones do not. :data:`ANY_SPLIT`: all count.
        files_root: of a CSV or TSV, the folder of the volumes that it names; empty: its own.

    Raises:
        FileNotFoundError: naming the path, where nothing is there; or the first volume that a table names, where none
            of them is there.
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
    for file in (path / "model" / "model.json", path / "model.json", path):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            volumes = _named_volumes(file, files_root) if file.suffix.casefold() in TABLES else []
            return fingerprint(digest, volumes) if volumes else digest
    if path.is_dir():
        files = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file()}
        states = {name: [file.stat().st_size, _state(file)] for name, file in files.items()}
        tables = {  # of people and sessions, with what describes their columns
            name: hashlib.sha256(file.read_bytes()).hexdigest()
            for name, file in files.items()
            if file.suffix in {".tsv", ".json"} and name.count(os.sep) <= 1
        }
        return fingerprint(states, tables)
    raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))


def description(folder: Path) -> str:
    """A digest of what a folder of results says of its content and of how it was made; empty for anything else.

    Versions do not count: a command that finds all complete writes its own. In packed data and in a model's folder a
    ``dataset_description.json`` is of predictions that were written there.
    """
    path = folder / "dataset_description.json"
    if any((folder / name).is_file() for name in ("index.json", "model.json")):
        return identity(folder)
    if not path.is_file():
        return ""
    text = path.read_text()
    with contextlib.suppress(ValueError):  # no JSON: it counts as it is
        return fingerprint(json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "Version"}))
    return fingerprint(text)


def _state(path: Path) -> str:
    """What changes with the content of a volume's file; empty for other files.

    A compressed one ends with a checksum of its voxels, which copies keep; of another one it is the time, in seconds,
    since archives and file servers keep no fractions.
    """
    if path.suffix in COMPRESSED:
        with contextlib.suppress(OSError), path.open("rb") as file:  # who reads it says why it cannot be read
            file.seek(-8, os.SEEK_END)
            return file.read().hex()
    return str(int(path.stat().st_mtime)) if path.suffix in PLAIN else ""


def _named_volumes(table: Path, files_root: str) -> list[Any]:
    """Size and state of each volume that a table's cells name, in order; None where it is not there."""
    try:
        rows = read_sheet(table).rows
    except DataError:  # who reads it says what is wrong with it
        return []
    cells = [Path(cell) for _, row in rows for cell in row.values() if cell.endswith((*COMPRESSED, *PLAIN))]
    parts = [[cell.with_suffix(end) for end in PAIR] if cell.suffix in PAIR else [cell] for cell in cells]
    files = [Path(files_root or table.parent, part) for pair in parts for part in pair]
    found = [[file.stat().st_size, _state(file)] if file.is_file() else None for file in files]
    if files and not any(found):
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(files[0]))
    return found


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
    with _lock(folder, patience) as descriptor:
        with contextlib.suppress(OSError):  # a full disk: the stage itself reports that
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} of {_host()}".encode())
        yield


def check_idle(folder: Path, patience: float = 120.0) -> None:
    """Check that no process executes a stage in a run folder, as :func:`exclusive` does.

    Raises:
        ConfigError: one is at work there.
    """
    if (folder / ".lock").is_file():
        with _lock(folder, patience):
            pass


@contextlib.contextmanager
def _lock(folder: Path, patience: float) -> Iterator[int]:
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        waits = 0.0 if _holder(path).endswith(_host()) else patience
        try:
            descriptor = stack.enter_context(lock_file(path, waits, required=False))
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: {_holder(path)} is at work there; wait for its end, or stop it and run this again"
            ) from error
        yield descriptor


def _host() -> str:
    return f"host {socket.gethostname()}"


def _holder(lock: Path) -> str:
    """The process that holds a lock, or held it last, as it wrote itself into the file."""
    return (lock.read_text() if lock.is_file() else "") or "another process"
