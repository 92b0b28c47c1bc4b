"""Files written past the page cache."""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

BLOCK = 4096  # bytes: a multiple of what any disc writes at once


class Direct:
    """A new file, written past the page cache where the file system allows it, and the digest of its content.

    As FastPersist does (Wang et al. 2024): to copy into the cache what nobody reads soon took more of the processor's
    time than all else in a checkpoint.

    Args:
        path: the file.
        buffer: memory that nobody else uses meanwhile; address and size are multiples of :data:`BLOCK`.

    Attributes:
        size: bytes written.
        sha: their SHA-256, once they are flushed.
        error: what a write failed with.
    """

    def __init__(self, path: Path, buffer: mmap.mmap | memoryview) -> None:
        self.size, self.sha = 0, hashlib.sha256()
        self.error: OSError | None = None
        self._buffer, self._used = memoryview(buffer), 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._cached(False)

    def write(self, content: Any) -> int:
        """Add ``content``, a buffer of bytes; how many it were."""
        rest = memoryview(content).cast("B")
        size = rest.nbytes
        while rest:
            part = rest[: len(self._buffer) - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            rest = rest[len(part) :]
            if self._used == len(self._buffer):
                self.flush()
        self.size += size
        return size

    def flush(self) -> None:
        """Write what the buffer holds, in whole blocks: where it ends within one, the file is over."""
        self.sha.update(self._buffer[: self._used])
        view = self._buffer[: -(-self._used // BLOCK) * BLOCK]
        self._used = 0
        while view:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._cached(True):
                    self.error = error  # kept, for torch reports a sentence of its own
                    raise

    def _cached(self, cached: bool) -> bool:
        """Write through the cache or past it; whether that is a change."""
        before = fcntl.fcntl(self._file, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)  # Linux alone has it
        wanted = before & ~direct if cached else before | direct
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(self._file, fcntl.F_SETFL, wanted)
        return before != wanted

    def close(self) -> None:
        """Cut off what filled the last block, and flush to the disc."""
        try:
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
        finally:
            os.close(self._file)
