"""Tar shards as the `webdataset` library reads them, with known offsets for random access.

A record is ``KEY.json`` (its scalar values) followed by ``KEY.VARIABLE.npy`` for each volume. Headers are POSIX ustar
with every field but name and size fixed, so equal content gives equal bytes; data begin at multiples of 512 bytes.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import IntegrityError
from shards.index import Index, Record
from shards.schema import Value

FOLDER = "shards"
BLOCK = 512
END = bytes(2 * BLOCK)  # POSIX: an archive ends with two blocks of zeros


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o444, 0
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _json(key: str, subject: str, values: Mapping[str, Value]) -> bytes:
    return json.dumps({"key": key, "subject": subject, "values": dict(values)}).encode()


class TarWriter:
    """Writes records one after another; a shard is closed by :meth:`flush`."""

    def __init__(self, folder: Path, shard: int) -> None:
        self.folder = folder / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard = shard
        self.file: BinaryIO | None = None

    @property
    def name(self) -> str:
        """The current shard, relative to the dataset's folder."""
        return f"{FOLDER}/shard-{self.shard:05d}.tar"

    def add(
        self, key: str, subject: str, values: Mapping[str, Value], arrays: Mapping[str, NDArray[Any]]
    ) -> dict[str, int]:
        """Write one record; returns variable -> byte offset of its array."""
        if self.file is None:
            self.file = (self.folder.parent / self.name).open("wb")
        self._member(f"{key}.json", _json(key, subject, values))
        offsets = {}
        for variable, array in arrays.items():
            head = _npy_header(array.shape, array.dtype)
            offsets[variable] = self.file.tell() + BLOCK + len(head)
            self._member(f"{key}.{variable}.npy", head + array.tobytes())
        return offsets

    def _member(self, name: str, content: bytes) -> None:
        assert self.file is not None
        self.file.write(_header(name, len(content)) + content + _padding(len(content)))

    def flush(self) -> None:
        """Close the shard, so that the next record begins another."""
        if self.file is not None:
            self.file.write(END)
            self.file.close()
            self.file, self.shard = None, self.shard + 1


class TarReader:
    """Reads single arrays of tar shards by offset."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def read(self, record: Record, variable: str) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), unchecked.

        Raises:
            IntegrityError: the file is gone or too short.
        """
        spec = self.index.arrays[variable]
        dtype = np.dtype(spec["dtype"])
        size = int(np.prod(spec["shape"])) * dtype.itemsize
        try:
            with (self.folder / record.shard).open("rb") as file:
                raw = os.pread(file.fileno(), size, record.offsets[variable])
        except OSError as error:
            raise IntegrityError(f"{record.shard}: {error.strerror} ({record.key} {variable})") from error
        if len(raw) < size:
            raise IntegrityError(f"{record.shard}: ends within {record.key}.{variable}.npy")
        return np.frombuffer(raw, dtype).reshape(spec["shape"])

    def damage(self, file: str) -> Iterator[str]:
        """The members of a shard that are not, byte for byte, as written: headers, content and padding."""
        if not file.startswith(f"{FOLDER}/"):
            return
        raw = memoryview((self.folder / file).read_bytes())
        at = 0
        for record in (r for r in self.index.records if r.shard == file):
            values = _json(record.key, record.subject, record.values)
            members = [(f"{record.key}.json", values, hashlib.sha256(b"").hexdigest(), 0)]
            for variable, checksum in record.checksums.items():
                spec = self.index.arrays[variable]
                dtype = np.dtype(spec["dtype"])
                head = _npy_header(tuple(spec["shape"]), dtype)
                size = int(np.prod(spec["shape"])) * dtype.itemsize
                members.append((f"{record.key}.{variable}.npy", head, checksum, size))
            for name, known, checksum, size in members:
                before = _header(name, len(known) + size) + known
                start, end = at + len(before), at + len(before) + size
                after = _padding(len(known) + size)
                at = end + len(after)
                if (
                    raw[start - len(before) : start] != before
                    or hashlib.sha256(raw[start:end]).hexdigest() != checksum
                    or raw[end:at] != after
                ):
                    yield name
        if raw[at:] != END:
            yield "end of archive"
