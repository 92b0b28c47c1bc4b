"""Atomic files and folders (temporary name beside the target, flushed to disk, renamed), and file locks."""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from shards.errors import DataError

MARKERS = ("index.json", "dataset_description.json", "model.json")  # see is_complete
LOCK = ".shards.lock"  # in the folder of a data set that is written
LOCK_POLL_S = 0.2
LEAVING_S = 2.0  # a part that ends holds the folder alone for a moment
NOT_FETCHED = "a link whose content is not here; fetch it first (datalad get, git annex get)"


def is_dangling(path: Path) -> bool:
    """Whether a path is a link to nothing, as those of DataLad and git-annex before their content is fetched."""
    return path.is_symlink() and not path.exists()


def file_state(path: Path) -> tuple[int, int, int, int]:
    """Inode, size and times of a file: another tuple where its content may be another one.

    The time of the last change of the inode is among them, since `cp -p` and `rsync --inplace` set the time of the
    content to that of their source.

    Raises:
        OSError: no such file.
    """
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` where the block succeeds and is removed otherwise."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` where the block succeeds and is removed otherwise.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is not empty; remove it or choose another name")
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name beside ``path`` of this call alone: on two nodes, or in two containers, processes have equal numbers."""
    return path.with_name(f".{path.name}.{uuid4().hex[:16]}.part")


def is_complete(path: Path) -> bool:
    """Whether a result was written to its end, and not only begun by a process that was killed.

    A file is renamed to its final name when it is complete (:func:`atomic_file`). So is a BIDS tree or a model
    (:func:`atomic_folder`), which holds a ``dataset_description.json`` or a ``model.json``. A packed data set gets its
    ``index.json`` last (:class:`shards.writer.DatasetWriter`). Anything else in a folder may be partial, or another
    program's.
    """
    return path.is_file() or any((path / name).is_file() for name in MARKERS)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_once(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8, readable by its owner alone, unless the file has content.

    Of several processes, also on several nodes, the text of the first one stays. An empty file counts as absent.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size:
            return
        path.unlink()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as part:
        part.write(text.encode())
        part.flush()
        os.fsync(part.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part.name, path)
    sync(path.parent)


def check_output(source: Path, out: Path) -> None:
    """Refuse a folder for results that is their source, or no folder.

    Raises:
        DataError: naming ``out``.
    """
    if source.resolve() == out.resolve():
        raise DataError(f"{out} is the source; choose another folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose a folder")


def free_suffix(paths: Sequence[Path]) -> str:
    """``.old-N`` with the least N for which no path with that suffix exists."""
    number = 1
    while any(path.with_name(f"{path.name}.old-{number}").exists() for path in paths):
        number += 1
    return f".old-{number}"


def rename_aside(paths: Sequence[Path]) -> list[Path]:
    """Rename files or folders to ``NAME.old-N``, with the least N that is free for all of them.

    Returns:
        Their new paths.
    """
    suffix = free_suffix(paths)
    return [path.rename(path.with_name(path.name + suffix)) for path in paths]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked_folder(folder: Path, part: str = "") -> Iterator[None]:
    """Hold the folder of a data set while the block lasts: alone, or for a part of the work beside other parts.

    Files are locked, since NFS shows the lock of a folder to no other machine. The last process removes them; those of
    processes that were killed are removed by the next one.

    Args:
        folder: of the data set.
        part: name of the part; empty to hold the folder alone.

    Raises:
        DataError: no such folder, another process holds it, or the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            patience = LEAVING_S if part else 0
            descriptor = stack.enter_context(lock_file(folder / LOCK, patience, shared=bool(part)))
            if part:
                stack.enter_context(lock_file(folder / f"{LOCK}-{part}", patience=0))
        except BlockingIOError:
            busy = f"{folder} is being written by another process"
            raise DataError(f"{busy}, or part {part} of it" if part else busy) from None
        except OSError as error:
            raise DataError(f"{folder / LOCK}: cannot be locked ({error.strerror})") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # other parts go on
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in sorted(folder.glob(f"{LOCK}*"), reverse=True):  # that of the folder comes last
                    path.unlink()


@contextlib.contextmanager
def lock_file(path: Path, patience: float = math.inf, *, required: bool = True, shared: bool = False) -> Iterator[int]:
    """Hold a lock on a file while the block lasts; yield its descriptor, open for reading and writing.

    The file is created where it is missing, readable by its owner alone, and stays. The lock is the operating
    system's: it ends with the process, however that ends. Whoever holds it may remove or rename the file: a process
    that waited for it meanwhile takes the lock of a new file of that name.

    Args:
        path: of the lock file; its folder exists.
        patience: seconds to wait for the holder; 0: do not wait.
        required: raise where the file system has no locks; otherwise nothing is locked there.
        shared: other processes may hold a shared lock at the same time; otherwise the lock is exclusive.

    Raises:
        BlockingIOError: the lock is still held when patience ends.
        OSError: the file cannot be opened, or the file system has no locks.
    """
    end = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _wait_for_lock(descriptor, path, end, required, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if _is_same_file(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path, end: float, required: bool, kind: int) -> None:
    while True:
        try:
            fcntl.flock(descriptor, kind | (0 if end == math.inf else fcntl.LOCK_NB))
            return
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise BlockingIOError(error.errno, "locked by another process", str(path)) from None
            time.sleep(min(LOCK_POLL_S, max(0.0, end - time.monotonic())))
        except OSError:  # this file system has no locks
            if required:
                raise
            return


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name; it is another one after its holder removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
