"""Tar shards for the `webdataset` library, with known offsets for random access.

A record is ``KEY.json`` (its scalar values, and where its volumes lie) followed by ``KEY.VARIABLE.npy`` for each
volume. Time, owner and mode of the members are fixed, so equal content gives equal bytes. Data begin at
multiples of 512 bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, IntegrityError
from shards.index import Index
from shards.pieces import Piece, crc32c
from shards.record_table import Place
from shards.records import Record
from shards.schema import Value
from shards.stored_files import HashedFile, StoredFiles

FOLDER = "shards"
BLOCK = tarfile.BLOCKSIZE
MODE = 0o444
LONGEST = 100  # bytes of a member's name in a ustar header


def shard_path(number: int) -> str:
    """The tar file with a number, relative to the data set's folder."""
    return f"{FOLDER}/shard-{number:05d}.tar"


def _header(name: str, size: int) -> bytes:
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


class TarShard:
    """Writes one tar file.

    Args:
        folder: of the data set.
        number: of the shard.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = shard_path(number)
        self._file = HashedFile(folder / self.path)

    def add(
        self,
        slot: int,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        affines: Mapping[str, Any],
    ) -> dict[str, tuple[int, int, int]]:
        """Append one record.

        Returns:
            Variable -> byte offset of its array, size, CRC-32C.

        Raises:
            DataError: a key too long for a tar file.
        """
        for variable in arrays:
            if len(f"{key}.{variable}.npy") > LONGEST:
                raise DataError(
                    f"{key}: longer than a name in a tar file may be; shorten the ids, or use --format zarr"
                )
        self._member(f"{key}.json", _json(key, subject, values, affines))
        places = {}
        for variable, array in arrays.items():
            offset = self._member(f"{key}.{variable}.npy", _npy_header(array.shape, array.dtype), array)
            places[variable] = (offset, array.nbytes, crc32c(array))
        return places

    def _member(self, name: str, head: bytes, array: NDArray[Any] | None = None) -> int:
        """Append one member; returns the offset of its array."""
        size = len(head) + (0 if array is None else array.nbytes)
        self._file.write(_header(name, size) + head)
        offset = self._file.size
        if array is not None:
            self._file.write(array.reshape(-1).view(np.uint8))
        self._file.write(_padding(size))
        return offset

    def close(self) -> dict[str, dict[str, Any]]:
        """End the archive; returns path -> {bytes, sha256}."""
        self._file.write(_end(self._file.size))
        return {self.path: self._file.close()}

    def discard(self) -> None:
        """Remove the file."""
        self._file.discard()


class TarReader:
    """Reads single arrays of tar shards by offset."""

    def __init__(self, folder: Path, index: Index, files: StoredFiles) -> None:
        self.folder, self.index = folder, index
        self._files = files
        self._specs = {name: (tuple(a["shape"]), np.dtype(a["dtype"])) for name, a in index.arrays.items()}

    def read(self, key: str, variable: str, place: Place, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), checked where its CRC-32C is known.

        Raises:
            IntegrityError: the file is missing, too short or damaged.
        """
        array: NDArray[Any] = np.empty(*self._specs[variable]) if out is None else out
        try:
            if place.size:
                self._files.read_checked(place.shard, place.offset, array, place.crc)
            elif self._files.read_into(place.shard, place.offset, array) < array.nbytes:
                raise ValueError(f"{place.shard} ends within it")
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{self.folder}: {key} {variable} is damaged or missing ({error}); see `shards verify`"
            ) from error
        return array

    def locate(self, key: str, variable: str, place: Place) -> tuple[NDArray[Any], Place]:
        """A volume of a data set of version 1, unchecked, and its place with size and CRC-32C.

        Raises:
            IntegrityError: as :meth:`read`.
        """
        array = self.read(key, variable, place)
        return array, place._replace(size=array.nbytes, crc=crc32c(array))


def layout(records: Iterable[Record], arrays: Mapping[str, Mapping[str, Any]]) -> Iterator[Piece]:
    """The pieces of a tar file.

    Args:
        records: that it holds, in order.
        arrays: volume variable -> {shape, dtype} of one record's array.
    """
    at = 0

    def piece(name: str, size: int, **known: Any) -> Piece:
        nonlocal at
        at += size
        return Piece(at - size, size, name, **known)

    for record in records:
        content = _json(record.key, record.subject, record.values, record.affines)
        name = f"{record.key}.json"
        content = _header(name, len(content)) + content + _padding(len(content))
        yield piece(name, len(content), fixed=content)
        for variable in record.checksums:
            name = f"{record.key}.{variable}.npy"
            shape, dtype = tuple(arrays[variable]["shape"]), np.dtype(arrays[variable]["dtype"])
            head, size = _npy_header(shape, dtype), int(np.prod(shape)) * dtype.itemsize
            before, after = _header(name, len(head) + size) + head, _padding(len(head) + size)
            yield piece(name, len(before), fixed=before)
            known: dict[str, Any] = {"key": record.key, "variable": variable, "sha256": record.checksums[variable]}
            yield piece(name, size, crc=record.crcs.get(variable), **known)
            yield piece(name, len(after), fixed=after)
    yield piece("end of archive", len(_end(at)), fixed=_end(at))
