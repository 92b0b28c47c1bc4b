"""A folder in /tmp that belongs to one process and does not outlive it for long."""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "mvhpc-", "lock"
_held: list[int] = []  # open for the life of the process


@functools.cache
def scratch_folder(parent: str = "/tmp") -> Path:
    """This process's folder, mode 0700, removed when it ends.

    Its path is short, for those of Ray's sockets in it may not exceed 107 bytes. A process that is killed cannot remove
    its folder: the next one does, for no lock is held in it any more.

    Args:
        parent: an existing folder on a file system of this machine.
    """
    sweep(Path(parent))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _held.append(os.open(folder / f".{LOCK}", os.O_CREAT | os.O_RDWR, 0o600))
    fcntl.flock(_held[-1], fcntl.LOCK_EX)
    (folder / f".{LOCK}").rename(folder / LOCK)  # there only once it is held
    return folder


def sweep(parent: Path) -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # still in use, no such folder, or gone by now
            if folder.lstat().st_uid != os.getuid():
                continue  # of a stranger's nothing is opened
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
