"""A cache of stored volumes on a node's own disk, for data sets on a slow shared file system.

Each volume is a file, named by a hash of the data set's digest and of where the volume lies. All processes of a node
share the folder: files are renamed to their names when they are complete, and whoever adds one holds the lock of its
subfolder and removes those that were not used for the longest time, so that the limit is never exceeded. A volume is
checked whenever it is read; a damaged one is read from the data set again.
"""

import contextlib
import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.files import lock_file
from shards.pieces import crc32c
from shards.stored_files import StoredFiles

FOLDER, LIMIT = "SHARDS_CACHE", "SHARDS_CACHE_GB"  # variables of the environment
SUBFOLDERS = 64  # each with its share of the limit, so that few files are listed when one is added
PARTIAL = ".part"


@dataclass(frozen=True)
class Cache:
    """A folder with a limit.

    Attributes:
        folder: on a local disk; created where missing. Its files are readable by their owner alone.
        limit: bytes that its files have together, at most.
    """

    folder: Path
    limit: int

    @classmethod
    def from_environment(cls) -> "Cache | None":
        """The cache that ``SHARDS_CACHE`` and ``SHARDS_CACHE_GB`` name; None where neither is set.

        Raises:
            DataError: one without the other, or no positive number.
        """
        folder, limit = os.environ.get(FOLDER, ""), os.environ.get(LIMIT, "")
        if not folder and not limit:
            return None
        with contextlib.suppress(ValueError):
            if folder and 0 < float(limit) < 1e9:
                return cls(Path(folder), int(1e9 * float(limit)))
        raise DataError(f"{FOLDER}={folder} {LIMIT}={limit}: set both, a folder and a number of gigabytes above 0")

    def load(self, name: str, target: NDArray[np.uint8]) -> bool:
        """Fill an array with a file of the same size; False where there is none."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != target.nbytes or file.readinto(target.data) != target.nbytes:
                    return False
            os.utime(path)
        except OSError:
            return False
        return True

    def store(self, name: str, content: NDArray[np.uint8]) -> None:
        """Add or replace a file; others make room. A disk that cannot be written to is reported, and not an error."""
        path, room = self._path(name), self.limit // SUBFOLDERS
        if content.nbytes > room:
            warnings.warn(f"{LIMIT} is too small: it allows no volume above {room / 1e6:.3g} MB", stacklevel=2)
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock_file(path.parent / ".lock"):
                _make_room(path, room - content.nbytes)
                part = path.with_name(name + PARTIAL)
                part.write_bytes(content.data)
                part.replace(path)
        except OSError as error:
            warnings.warn(f"{FOLDER}={self.folder} is not used: {error.strerror}", stacklevel=2)

    def _path(self, name: str) -> Path:
        return self.folder / f"{int(name[:4], 16) % SUBFOLDERS:02d}" / name


def _make_room(path: Path, room: int) -> None:
    """Remove files beside ``path``, the last used ones last, until those that stay fit into ``room`` bytes."""
    found = []
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.endswith(PARTIAL):  # of a process that was killed: the lock is ours
                Path(entry.path).unlink()
            elif entry.name not in (".lock", path.name):
                found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    used = sum(size for _, size, _ in found)
    for _, size, old in sorted(found):
        if used <= room:
            return
        Path(old).unlink()
        used -= size


class CachedFiles(StoredFiles):
    """Reads pieces from a cache, and those that it lacks from the folder.

    Args:
        folder: that the paths are relative to.
        cache: for the pieces.
        digest: of the data set.
    """

    def __init__(self, folder: Path, cache: Cache, digest: str) -> None:
        super().__init__(folder)
        self._cache, self._digest = cache, digest

    def read_checked(self, path: str, offset: int, target: NDArray[Any], crc: int) -> None:
        """See :meth:`shards.stored_files.StoredFiles.read_checked`."""
        raw = target.reshape(-1).view(np.uint8)
        name = hashlib.blake2b(repr((self._digest, path, offset, raw.nbytes, crc)).encode(), digest_size=16).hexdigest()
        if self._cache.load(name, raw) and crc32c(raw) == crc:
            return
        super().read_checked(path, offset, target, crc)
        self._cache.store(name, raw)
