"""Temporary folders of one process, removed when it ends, or at the next start where it was killed."""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX, LOCK = "mvhpc-", "lock"
_locks: list[int] = []  # descriptors, open for the lifetime of the process


def scratch_folder(parent: str = "/tmp") -> Path:
    """The folder of this process, mode 0700, removed when the process ends.

    Its path is short because the path of a socket of Ray may have 107 bytes. The folder of a killed process is removed
    by the next process, which finds its lock free.

    Args:
        parent: an existing folder on a local file system.
    """
    return _create(Path(parent))


@functools.cache
def _create(parent: Path) -> Path:
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _locks.append(os.open(folder / f".{LOCK}", os.O_CREAT | os.O_RDWR, 0o600))
    fcntl.flock(_locks[-1], fcntl.LOCK_EX)
    (folder / f".{LOCK}").rename(folder / LOCK)  # visible only once it is locked
    return folder


@contextlib.contextmanager
def temporary_folder(parent: str = "/tmp") -> Iterator[Path]:
    """A new folder in :func:`scratch_folder`, removed on exit."""
    folder = Path(tempfile.mkdtemp(prefix="", dir=scratch_folder(parent)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders of killed processes of this user."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, not such a folder, or removed meanwhile
            if folder.lstat().st_uid != os.getuid():
                continue  # never open a file of another user
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
