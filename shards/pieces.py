"""The pieces that a file of a packed data set consists of, and whether each is what was written."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c


def crc32c(stored: Any) -> int:
    """CRC-32C of bytes, or of a contiguous array's."""
    return int(google_crc32c.value(stored))


@dataclass(frozen=True)
class Piece:
    """Some consecutive bytes of a file. The pieces of a file follow each other without gaps.

    Attributes:
        offset: byte at which it begins.
        size: bytes.
        name: what it belongs to, for messages; empty where nothing is known of it.
        fixed: its bytes, where they follow from the index.
        crc: CRC-32C of the bytes of a stored volume.
        sha256: of these bytes, in data sets of version 1.
        own_crc: its last four bytes are the CRC-32C of those before.
        key, variable: of the stored volume.
    """

    offset: int
    size: int
    name: str
    fixed: bytes | None = None
    crc: int | None = None
    sha256: str = ""
    own_crc: bool = False
    key: str = ""
    variable: str = ""

    def matches(self, raw: bytes) -> bool:
        """Whether these are the bytes that were written; True where that is not known."""
        if len(raw) != self.size:
            return False
        if self.fixed is not None:
            return raw == self.fixed
        if self.own_crc:
            return crc32c(raw[:-4]) == int.from_bytes(raw[-4:], "little")
        if self.crc is not None:
            return crc32c(raw) == self.crc
        return not self.sha256 or hashlib.sha256(raw).hexdigest() == self.sha256


def read_pieces(descriptor: int, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bytes | None]]:
    """Each piece with its bytes in an open file; None where they differ from those written, or cannot be read."""
    for piece in pieces:
        try:
            raw = _read(descriptor, piece.offset, piece.size)
        except OSError:  # a bad sector
            yield piece, None
        else:
            yield piece, raw if piece.matches(raw) else None


def _read(descriptor: int, offset: int, size: int) -> bytes:
    raw = b""
    while len(raw) < size and (more := os.pread(descriptor, size - len(raw), offset + len(raw))):
        raw = raw + more if raw else more  # one call reads at most 2 GiB
    return raw
