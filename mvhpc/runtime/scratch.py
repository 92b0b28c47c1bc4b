"""Temporary folders of one process, removed when it ends, or at the next start where it was killed."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.files import lock_file

PREFIX, LOCK = "mvhpc-", "lock"
_locks = contextlib.ExitStack()  # held for the lifetime of the process


def scratch_folder(parent: Path = Path("/tmp")) -> Path:
    """The folder of this process; see :func:`make_scratch`."""
    return _of_process(parent)


@functools.cache
def _of_process(parent: Path) -> Path:
    return make_scratch(parent)


def make_scratch(parent: Path, name: str = "") -> Path:
    """A new folder, mode 0700, removed when this process ends.

    Its path is short because the path of a socket of Ray may have 107 bytes. The folder of a killed process is removed
    by the next process, which finds its lock free.

    Args:
        parent: an existing folder on a local file system.
        name: what the folder's name says beside random letters.

    Raises:
        OSError: the folder cannot be made.
    """
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _locks.enter_context(lock_file(folder / f".{LOCK}"))
    (folder / f".{LOCK}").rename(folder / LOCK)  # visible only once it is locked
    return folder


@contextlib.contextmanager
def temporary_folder(parent: Path = Path("/tmp")) -> Iterator[Path]:
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
            if (folder / LOCK).is_file():
                with lock_file(folder / LOCK, patience=0):
                    shutil.rmtree(folder)
