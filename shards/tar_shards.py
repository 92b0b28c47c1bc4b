"""Tar shards for the `webdataset` library, with known offsets for random access.

A record is ``KEY.json`` (its scalar values, and where its volumes lie) followed by ``KEY.VARIABLE.npy`` for each
volume. Time, owner and mode of the members are fixed, so equal content gives equal bytes. Data begin at
multiples of 512 bytes.
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

from shards.errors import DataError, IntegrityError
from shards.index import Index, Record
from shards.schema import Value

FOLDER = "shards"
BLOCK = tarfile.BLOCKSIZE
MODE = 0o444
LONGEST = 100  # bytes of a member's name in a ustar header


def _header(name: str, size: int) -> bytes:
    """The header that webdataset writes for a member with the arguments of :class:`TarWriter`."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, MODE, 0
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _end(size: int) -> bytes:
    """The end of an archive of ``size`` bytes: two blocks of zeros, then zeros up to a multiple of tar's record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _json(key: str, subject: str, values: Mapping[str, Value], affines: Mapping[str, Any]) -> bytes:
    places = {"affines": dict(affines)} if affines else {}  # data sets of earlier versions have none
    return json.dumps({"key": key, "subject": subject, "values": dict(values), **places}).encode()


class TarWriter:
    """Writes records with :class:`webdataset.TarWriter`; :meth:`flush` ends a shard.

    Args:
        folder: of the data set.
        shard: number of the first shard.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self.folder = folder / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard = shard
        self._file: BinaryIO | None = None
        self._writer: Any = None

    @property
    def name(self) -> str:
        """The current shard, relative to the data set's folder."""
        return f"{FOLDER}/shard-{self.shard:05d}.tar"

    def add(
        self,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        affines: Mapping[str, Any],
    ) -> dict[str, int]:
        """Write one record.

        Returns:
            Variable -> byte offset of its array.

        Raises:
            DataError: a key too long for a tar file.
        """
        for variable in arrays:
            if len(f"{key}.{variable}.npy") > LONGEST:
                raise DataError(
                    f"{key}: longer than a name in a tar file may be; shorten the ids, or use --format zarr"
                )
        if self._writer is None:
            self._open()
        self._writer.write({"__key__": key, "json": _json(key, subject, values, affines)})
        offsets = {}
        for variable, array in arrays.items():  # one call each: webdataset sorts the members of a call by name
            head = _npy_header(array.shape, array.dtype)
            offsets[variable] = self._writer.tarstream.offset + BLOCK + len(head)
            self._writer.write({"__key__": key, f"{variable}.npy": head + array.tobytes()})
        return offsets

    def _open(self) -> None:
        import webdataset  # it imports torch, which takes seconds

        self._file = (self.folder.parent / self.name).open("wb")
        self._writer = webdataset.TarWriter(self._file, user="", group="", mode=MODE, mtime=0, encoder=False)

    def flush(self) -> None:
        """Close the shard, so that the next record begins another."""
        if self._file is not None:
            self._writer.close()
            self._file.close()
            self._file, self._writer, self.shard = None, None, self.shard + 1


class TarReader:
    """Reads single arrays of tar shards by offset."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def read(self, record: Record, variable: str) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), unchecked.

        Raises:
            IntegrityError: the file is missing or too short.
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

    def damaged_members(self, file: str) -> Iterator[str]:
        """The members of a shard whose header, content or padding differs from what was written."""
        if not file.startswith(f"{FOLDER}/"):
            return
        raw = memoryview((self.folder / file).read_bytes())
        at = 0
        for record in (r for r in self.index.records if r.shard == file):
            values = _json(record.key, record.subject, record.values, record.affines)
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
        if raw[at:] != _end(at):
            yield "end of archive"
