"""Files that are written once, with their hash, and read in pieces by many threads."""

import functools
import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shards.errors import IntegrityError

BLOCK = 2**19
OPEN_FILES = 128  # of one reader; far fewer than the usual limit of a process, 1024


class HashedFile:
    """A new file, of which the hash is known when it is closed.

    Args:
        path: its folder is created where missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.size = path, 0
        self._file, self._hash = path.open("wb"), hashlib.sha256()

    def write(self, content: Any) -> int:
        """Append bytes, or a contiguous array; returns the offset at which they begin."""
        start = self.size
        raw = memoryview(content).cast("B")
        self._file.write(raw)
        self._hash.update(raw)
        self.size += len(raw)
        return start

    def close(self) -> dict[str, Any]:
        """Flush the file to the disk; returns its {bytes, sha256}."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class _Descriptor:
    """An open file; closed when nobody uses it any more, also where a cache has dropped it during a read."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class StoredFiles:
    """Reads pieces of the files of a folder. Thread-safe; the latest files stay open.

    Args:
        folder: that the paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = functools.lru_cache(OPEN_FILES)(self._open_anew)

    def _open_anew(self, path: str) -> _Descriptor:
        parts = PurePosixPath(path).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise IntegrityError(f"{self.folder}: {path!r} is no file of this data set")
        return _Descriptor(self.folder / path)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset`` on; fewer where the file ends.

        Raises:
            OSError: the file cannot be read.
        """
        file = self._open(path)
        raw = os.pread(file.number, size, offset)
        while 0 < len(raw) < size and (more := os.pread(file.number, size - len(raw), offset + len(raw))):
            raw += more  # one call reads at most 2 GiB
        return raw

    def read_into(self, path: str, offset: int, array: NDArray[Any]) -> int:
        """Fill a contiguous array with the bytes from ``offset`` on; returns how many there were.

        Raises:
            OSError: the file cannot be read.
        """
        file = self._open(path)
        raw, done = array.reshape(-1).view(np.uint8).data, 0
        while done < len(raw) and (count := os.preadv(file.number, [raw[done:]], offset + done)):
            done += count
        return done

    def read_checked(self, path: str, offset: int, target: NDArray[Any], crc: int) -> None:
        """Fill a contiguous array with the bytes from ``offset`` on, of which the CRC-32C is known.

        Raises:
            OSError: the file cannot be read.
            ValueError: it ends before, or has other bytes.
        """
        file = self._open(path)
        raw, done, found = target.reshape(-1).view(np.uint8), 0, 0
        while done < len(raw):  # in blocks that are still in the processor's cache when they are checked
            count = os.preadv(file.number, [raw[done : done + BLOCK].data], offset + done)
            if not count:
                raise ValueError(f"{path} ends within it")
            found = google_crc32c.extend(found, raw[done : done + count])
            done += count
        if found != crc:
            raise ValueError("checksum")

    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            OSError: the file cannot be read.
        """
        file = self._open(path)  # held until the call is over: the cache may drop it meanwhile
        return os.fstat(file.number).st_size
