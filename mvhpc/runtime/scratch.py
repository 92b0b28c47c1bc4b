"""Temporary folders of one process, removed when it ends, or at the next start where it was killed."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvhpc.config import ConfigError
from shards.files import lock_file

PREFIX, LOCK = "mvhpc-", "lock"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # where TMPDIR cannot be used
MAX_PATH = 40  # bytes of a folder for Ray: the path of a Unix socket has at most 107, and Ray adds up to 65
RANDOM = 8  # letters that tempfile adds to a name
_locks = contextlib.ExitStack()  # held for the lifetime of the process


def short_parent(below: int) -> Path:
    """The folder for the temporary files of Ray, whose sockets need short paths.

    It is the first that can be written to and is short enough: that of ``tempfile`` (``TMPDIR``), ``/tmp``,
    ``/var/tmp``, ``/dev/shm``.

    Args:
        below: bytes that the path of Ray's folder has below this one.

    Raises:
        ConfigError: there is none.
    """
    for parent in (tempfile.gettempdir(), *SHORT):
        if len(os.fsencode(parent)) + below <= MAX_PATH and os.access(parent, os.W_OK | os.X_OK):
            return Path(parent)
    raise ConfigError(
        f"no folder for the temporary files of Ray: {', '.join(SHORT)} cannot be written to; set TMPDIR to a folder on "
        f"a local disk whose path has at most {MAX_PATH - below} bytes"
    )


def scratch_folder(parent: Path | None = None) -> Path:
    """The folder of this process in ``parent``, by default :func:`short_parent`; see :func:`make_scratch`."""
    return _of_process(parent or short_parent(len(f"/{PREFIX}/") + 2 * RANDOM))


@functools.cache
def _of_process(parent: Path) -> Path:
    return make_scratch(parent)


def make_scratch(parent: Path, name: str = "") -> Path:
    """A new folder, mode 0700, removed when this process ends.

    The folder of a killed process is removed by the next process, which finds its lock free.

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
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
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
