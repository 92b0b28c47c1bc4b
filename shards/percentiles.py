"""Percentiles of many float32 values, with one count for all of them.

Values are counted by the upper 16 bits of their order-preserving integer form. An order statistic is then found among
the values that share these bits, a few per cent of all.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGN, LOWER = np.uint32(1 << 31), np.uint32(16)


class Ordered:
    """The order statistics of values.

    Args:
        values: float32 (n,), finite.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self._upper = _upper_bits(values)
        self._ends = np.cumsum(np.bincount(self._upper, minlength=1 << 16))
        self._groups: dict[int, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.values)

    def _group(self, number: int) -> tuple[int, NDArray[np.float32]]:
        """The rank of the first value with these upper bits, and all of them, sorted."""
        if number not in self._groups:
            self._groups[number] = np.sort(self.values[self._upper == number])
        return int(self._ends[number - 1]) if number else 0, self._groups[number]

    def at(self, rank: int) -> np.float32:
        """The value of a rank, from 0."""
        start, group = self._group(int(np.searchsorted(self._ends, rank, side="right")))
        value: np.float32 = group[rank - start]
        return value

    def below(self, bound: float, inclusive: bool = False) -> int:
        """How many values are less than ``bound``, or equal to it where ``inclusive``; in float32."""
        one = np.array([bound], np.float32)
        start, group = self._group(int(_upper_bits(one)[0]))
        return start + int(np.searchsorted(group, one[0], side="right" if inclusive else "left"))

    def quantile(self, q: Any, start: int = 0, stop: int | None = None) -> Any:
        """A quantile of the values of the ranks ``start`` to ``stop``, bit for bit that of :func:`numpy.quantile`.

        Args:
            q: a NumPy number from 0 to 1, in whose precision the rank is computed.
            start, stop: as in a slice.
        """
        last = (len(self.values) if stop is None else stop) - start - 1
        rank = last * q
        if rank >= last:
            return self.at(start + last)
        first = int(rank)
        low, high = self.at(start + first), self.at(start + first + 1)
        share = rank - type(q)(first)
        return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def _upper_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of integers that have the order of the values; -0 lies with 0."""
    bits = np.add(values, np.float32(0)).view(np.uint32)  # -0 + 0 is 0
    if (bits & SIGN).any():
        bits = np.where(bits & SIGN, ~bits, bits | SIGN)
    else:
        bits |= SIGN
    return (bits >> LOWER).astype(np.uint16)
