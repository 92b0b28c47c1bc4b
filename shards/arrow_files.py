"""Arrow IPC files in memory maps, checked in pieces: each piece when it is first used."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import RESTORE, IntegrityError

SUFFIX = ".arrow"


def write_arrow(sink: Any, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> list[int]:
    """Write batches of records as an Arrow IPC file.

    Args:
        sink: a binary file or an output stream of Arrow; it is left open.
        schema: of the batches.
        batches: in order.

    Returns:
        The byte at which each piece of the file ends: the schema with the first batch, the other batches, the footer.
    """
    ends = []
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            ends.append(sink.tell())
    return [*ends, sink.tell()]


def mapped(path: Path) -> pa.Buffer:
    """A memory map of a file. Python opens it: Arrow refuses names that are not of the locale's encoding."""
    with path.open("rb") as file:
        empty = not file.seek(0, os.SEEK_END)
        return pa.py_buffer(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def checksums(buffer: pa.Buffer, ends: Iterable[int]) -> list[int]:
    """CRC-32C of each piece of a file."""
    raw = np.frombuffer(buffer, np.uint8)
    found, start = [], 0
    for end in ends:
        found.append(int(google_crc32c.value(raw[start:end])))
        start = end
    return found


class ArrowFile:
    """The batches of an Arrow IPC file.

    Args:
        name: of the file, for messages.
        content: the file, usually a memory map.
        ends: see :func:`write_arrow`.
        crcs: CRC-32C of each piece.

    Raises:
        IntegrityError: another size than what was written, or a damaged schema, first batch or footer.
    """

    def __init__(self, name: str, content: pa.Buffer, ends: list[int], crcs: list[int]) -> None:
        self.name, self._crcs = name, crcs
        self._starts, self._ends = [0, *ends[:-1]], ends
        self._raw: NDArray[np.uint8] = np.frombuffer(content, np.uint8)
        if len(self._raw) != ends[-1]:
            raise IntegrityError(f"{name}: {len(self._raw):,} bytes, written with {ends[-1]:,}; restore it")
        self._checked = bytearray(len(ends))
        self._check(0)
        self._check(len(ends) - 1)
        self._file = pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(use_threads=False))
        self.schema: pa.Schema = self._file.schema

    @classmethod
    def open(cls, path: Path, ends: list[int], crcs: list[int]) -> "ArrowFile":
        """Map a file into memory.

        Raises:
            FileNotFoundError: no such file.
            IntegrityError: as above.
        """
        return cls(path.name, mapped(path), ends, crcs)

    def _check(self, piece: int) -> None:
        if not self._checked[piece]:
            if google_crc32c.value(self._raw[self._starts[piece] : self._ends[piece]]) != self._crcs[piece]:
                raise IntegrityError(f"{self.name}: damaged (checksum of piece {piece}); {RESTORE}")
            self._checked[piece] = 1

    def __len__(self) -> int:
        return len(self._ends) - 1

    def batch(self, number: int) -> pa.RecordBatch:
        """A batch; it is checked on first use.

        Raises:
            IntegrityError: its bytes differ from those written.
        """
        self._check(number)
        return self._file.get_batch(number)


def numbers_of(column: pa.Array) -> NDArray[Any]:
    """A column of integers without missing ones, in place; Arrow's own conversion would import pandas."""
    dtype = np.dtype(str(column.type))
    if not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)
