"""Files and folders written whole or not at all: a temporary name beside the target, fsync, rename."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MARKERS = ("index.json", "dataset_description.json")  # of packed data and BIDS trees; see is_complete


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` when the block ends well and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` when the block ends well and is removed otherwise.

    Raises:
        FileExistsError: where ``path`` is there already and not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(path: Path) -> bool:
    """Whether a result was written to its end, and not only begun by a process that was killed.

    A file is renamed to its final name when it is complete (:func:`atomic_file`). So is a BIDS tree
    (:func:`atomic_folder`), which holds a ``dataset_description.json``. A packed data set gets its ``index.json`` last
    (:class:`shards.writer.DatasetWriter`). Anything else in a folder may be partial, or another program's.
    """
    return path.is_file() or any((path / name).is_file() for name in MARKERS)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole."""
    with atomic_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole, as UTF-8."""
    write_bytes(path, text.encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
