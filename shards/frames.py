"""An array as frames of Blosc (LZ4), each of some planes of its first axis and followed by its own CRC-32C.

Each frame is a chunk of a Zarr array. What is read in part is checked by the frame. Behind the last one lies a CRC-32C
of all these, which distinguishes volumes: that of bytes followed by their own CRC-32C depends on their number alone.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

CODEC = {"cname": "lz4", "clevel": 9}  # docs/storage.md compares others
FRAME_BYTES = 2**19  # at most, before compression, unless a plane is larger
CRC = struct.Struct("<I")
HEADER = struct.Struct("<4xIII")  # of a Blosc frame: bytes before compression, of a block, of the frame
blosc.use_threads = False  # threads of its own take turns, and do not survive a fork


def planes_per_frame(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """How many planes of the first axis a frame holds; it divides their number."""
    plane = int(np.prod(shape[1:])) * dtype.itemsize
    return max((n for n in range(1, shape[0] + 1) if shape[0] % n == 0 and n * plane <= FRAME_BYTES), default=1)


def codecs(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """Zarr's names of what makes a frame of numbers."""
    own = {"typesize": dtype.itemsize, "shuffle": "shuffle", "blocksize": 0}
    return [{"name": "blosc", "configuration": {**CODEC, **own}}, {"name": "crc32c"}]


def encode(array: NDArray[Any], planes: int) -> Iterator[bytes]:
    """The frames of a contiguous array, each with its CRC-32C."""
    codec = blosc.Blosc(**CODEC, shuffle=blosc.SHUFFLE)
    for i in range(0, len(array), planes):
        frame = codec.encode(array[i : i + planes])
        yield frame + CRC.pack(google_crc32c.value(frame))


def seal(frames: Sequence[bytes]) -> bytes:
    """What lies behind the last frame."""
    return CRC.pack(google_crc32c.value(b"".join(frame[-CRC.size :] for frame in frames)))


def decode(frames: NDArray[np.uint8], array: NDArray[Any]) -> None:
    """Fill an array with all its frames, whose bytes are those that were written."""
    view, target = frames.data, array.reshape(-1).view(np.uint8)
    done = at = 0
    while done < len(target):
        size, _, length = HEADER.unpack_from(view, at)
        blosc.decompress(view[at : at + length], target[done : done + size])
        done, at = done + size, at + length + CRC.size


def decode_checked(frame: NDArray[np.uint8], array: NDArray[Any]) -> None:
    """Fill an array with one frame, checked by the CRC-32C at its end.

    Raises:
        ValueError: a damaged frame.
    """
    content, end = frame[: -CRC.size], frame[-CRC.size :]
    if (
        google_crc32c.value(content) != CRC.unpack(end.tobytes())[0]
        or HEADER.unpack_from(content.data)[0] != array.nbytes
    ):
        raise ValueError("checksum")
    blosc.decompress(content, array)
