"""Volumes in [0, 1] as float16, or as whole numbers times a scale."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, nearest

BLOCK = 2**17  # numbers whose indices, which NumPy makes of them, fit a processor's cache
LARGEST = {"float16": 0, "uint8": 255, "uint16": 65535}  # dtype -> the number that stands for 1; 0 for floats


def stored_as(dtype: str) -> dict[str, Any]:
    """``dtype``, and for whole numbers their ``scale``: entries of an index's ``arrays``.

    Raises:
        DataError: an unknown type.
    """
    if dtype not in LARGEST:
        raise DataError(nearest(dtype, LARGEST, "dtype"))
    return {"dtype": np.dtype(dtype).str} | ({"scale": 1 / LARGEST[dtype]} if LARGEST[dtype] else {})


def quantize(volume: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """A volume in [0, 1] in the type that it is stored in, each voxel rounded to the nearest; 0 and 1 stay exact."""
    if largest := LARGEST.get(dtype, 0):
        volume = np.rint(volume * np.float32(largest))
    return volume.astype(np.dtype(dtype).newbyteorder("<"))


def dequantize(stored: NDArray[Any], scale: float, out: NDArray[np.float16] | None = None) -> NDArray[np.float16]:
    """``stored`` times ``scale``, rounded once to float16.

    Args:
        stored: uint8 or uint16, contiguous.
        scale: of the array.
        out: contiguous array of the same shape to fill, instead of a new one.
    """
    found = np.empty(stored.shape, np.float16) if out is None else out
    numbers, values = stored.reshape(-1), found.reshape(-1)
    if stored.itemsize == 1:  # two at a time, in half the time
        even = numbers.size // 2 * 2
        _look_up(_pairs(scale), numbers[:even].view("<u2"), values[:even].view("<u4"))
        numbers, values = numbers[even:], values[even:]
    _look_up(_values(scale, stored.dtype.str), numbers, values)
    return found


def _look_up(table: NDArray[Any], numbers: NDArray[Any], values: NDArray[Any]) -> None:
    for i in range(0, numbers.size, BLOCK):
        np.take(table, numbers[i : i + BLOCK], out=values[i : i + BLOCK], mode="clip")  # "raise" copies `out`


@cache
def _values(scale: float, dtype: str) -> NDArray[np.float16]:
    """The value of each number that the type has."""
    return (np.arange(np.iinfo(dtype).max + 1) * scale).astype("<f2")


@cache
def _pairs(scale: float) -> NDArray[np.uint32]:
    """The two values of each pair of bytes, the first one in the lower half."""
    values = _values(scale, "|u1")
    first, second = np.broadcast_to(values, (256, 256)), np.broadcast_to(values[:, None], (256, 256))
    return np.stack([first, second], axis=-1).view("<u4").reshape(-1)
